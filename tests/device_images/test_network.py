"""What an inventory says of a board's network: what cannot be is refused by the key's name, what can be is rendered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from testbed.device_images.render import render
from testbed.errors import UsageError
from testbed.inventory import ImageSettings
from tests.device_images.boards import GOLDEN, WIFI_PASSWORD, board, profile

PI = "raspberry_pi_os_trixie"
AT = {"address": "192.0.2.11/24", "gateway": "192.0.2.1", "name_servers": ("192.0.2.1",)}
BY_WIFI = {"wifi": "lab", "country": "DE", "wifi_password": WIFI_PASSWORD}


def pi(**settings):
    return board(PI, profile("raspberry_pi_5_8gb"), **settings)


def file_of(made, name):
    return next((file.text for file in render(made) if file.path.endswith(name)), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"address": "192.0.2.300/24"}, 'board_1: image.address: expected an address .*, got "192.0.2.300/24"'),
        ({"address": "192.0.2.11/33"}, "image.address: expected"),
        ({"gateway": "192.0.2.1"}, "image.gateway: 192.0.2.1 needs image.address"),
        ({**AT, "gateway": "192.0.2"}, 'image.gateway: expected an address such as 192.0.2.1, got "192.0.2"'),
        ({**AT, "gateway": "198.51.100.1"}, r"198.51.100.1 is not in the network of image.address \(192.0.2.0/24\)"),
        ({**AT, "name_servers": ("ns.lab",)}, 'image.name_servers: expected addresses such as 192.0.2.1, got "ns.lab"'),
        ({**AT, "name_servers": ("fe80::1%a b",)}, "image.name_servers: expected"),
        ({"wifi": "lab", "wifi_password": WIFI_PASSWORD}, "image.country: a wireless network"),
        ({"wifi": "lab", "country": "DE"}, "give the password of 'lab' by `--wifi-password-file FILE`"),
        ({"wifi_password": WIFI_PASSWORD}, "write its name into the inventory"),
        *(
            ({"time_servers": (server,)}, "image.time_servers: expected hosts such as")
            for server in (
                "bad host; rm -rf /", "time.lab:", "time.lab:0", "time.lab:65536", "time.lab:1 prefer", "192.0.2.300",
                "-x", "", "time.lab\nserver evil", "2001:db8::1:x",
            )
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_the_name_of_its_key(settings, message):
    with pytest.raises(UsageError, match=message):
        pi(**settings)


@pytest.mark.parametrize(
    ("server", "line"),
    [
        ("192.0.2.1", "server 192.0.2.1 iburst"),
        ("10.0.2.2:1123", "server 10.0.2.2 port 1123 iburst"),
        ("Time-1.lab", "server Time-1.lab iburst"),
        ("0.debian.pool.ntp.org:123", "server 0.debian.pool.ntp.org port 123 iburst"),
        ("2001:db8::1", "server 2001:db8::1 iburst"),
    ],
)
def test_time_servers_are_hosts_with_or_without_a_port(server, line):
    files = yaml.safe_load(file_of(pi(time_servers=(server,)), "user-data"))["write_files"]
    (sources,) = [each["content"] for each in files if each["path"].endswith(".sources")]
    assert sources == f"{line}\n"


def test_an_address_is_that_of_the_wireless_network_where_there_is_one():
    network = yaml.safe_load(file_of(pi(**AT, **BY_WIFI), "network-config"))["network"]
    assert network["ethernets"]["wired"] == {"match": {"name": "e*"}, "dhcp4": True, "optional": True}
    assert network["wifis"]["wlan0"] == {
        "dhcp4": False,
        "addresses": ["192.0.2.11/24"],
        "routes": [{"to": "default", "via": "192.0.2.1"}],
        "optional": True,
        "nameservers": {"addresses": ["192.0.2.1"]},
        "regulatory-domain": "DE",
        "access-points": {"lab": {"password": WIFI_PASSWORD}},
    }


def test_so_it_is_on_a_jetson():
    stock = GOLDEN["jetson_orin_jetpack_6_agx_as_nx_by_wifi"]()
    made = replace(stock, settings=replace(stock.settings, **AT))
    assert "\n[ipv4]\nmethod=manual\naddress1=192.0.2.11/24,192.0.2.1\ndns=192.0.2.1;\n\n" in file_of(
        made, "wifi.nmconnection"
    )
    assert file_of(made, "wired.nmconnection") is None


def test_a_jetson_asks_the_name_servers_without_an_address_of_its_own_too():
    stock = GOLDEN["jetson_nano_jetpack_4"]()
    made = replace(stock, settings=ImageSettings(name_servers=("192.0.2.1",)))
    assert "\n[ipv4]\nmethod=auto\ndns=192.0.2.1;\n" in file_of(made, "wired.nmconnection")


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        (AT, []),
        ({"country": "DE"}, ["board_1: image.country holds for a wireless network only, and there is no image.wifi"]),
        (
            {"address": "192.0.2.11/24"},
            [
                (
                    "board_1: there is no image.gateway and image.name_servers; the first boot has to reach the "
                    "package archive to install chrony"
                )
            ],
        ),
    ],
)
def test_what_may_not_be_meant_is_noted(settings, notes):
    assert list(pi(**settings).notes) == notes


@pytest.mark.parametrize(("of", "mode"), [("jetson_orin_nano_8gb", "99W"), ("jetson_orin_nano_8gb", "MAXN")])
def test_a_power_mode_that_the_profile_does_not_know_is_refused_with_the_list(of, mode):
    with pytest.raises(
        UsageError, match=rf"power_mode: {of} has no power mode '{mode}'; .* are: 15W, 25W, 7W, MAXN_SUPER"
    ):
        board("jetson_orin_jetpack_6", profile(of), power_mode=mode)
