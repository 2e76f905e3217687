"""The network of a board: whether what the inventory says of it can be, in messages that name the key."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from testbed.errors import UsageError
from testbed.yaml_file import shown

if TYPE_CHECKING:
    from testbed.inventory import ImageSettings

#: A name of the DNS: not digits alone at its end, which is an address, if anything.
_DOMAIN = re.compile(
    r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)*(?![0-9]+\.?$)[a-z0-9]([a-z0-9-]*[a-z0-9])?\.?", re.IGNORECASE
)
_HIGHEST_PORT = 65535


def check_network(name: str, settings: ImageSettings) -> None:
    """Raises UsageError for what no network can be made of."""
    address = _interface(name, settings.address) if settings.address is not None else None
    if settings.gateway is not None:
        _check_gateway(name, settings.gateway, address)
    for server in settings.name_servers:
        if not _is_address(server):
            raise UsageError(_complaint(name, "name_servers", "addresses such as 192.0.2.1", server))
    for server in settings.time_servers:
        time_source(server, name)
    if settings.wifi is not None and settings.country is None:
        raise UsageError(
            f'{name}: image.country: a wireless network (image.wifi) needs the country whose rules hold, such as "DE"'
        )


def notes_on(name: str, settings: ImageSettings) -> tuple[str, ...]:
    """What can be meant so, and often is not."""
    told = []
    lacks = [key for key in ("gateway", "name_servers") if not getattr(settings, key)]
    if settings.address is not None and lacks:
        keys = " and ".join(f"image.{key}" for key in lacks)
        told.append(f"{name}: there is no {keys}; the first boot has to reach the package archive to install chrony")
    if settings.country is not None and settings.wifi is None:
        told.append(f"{name}: image.country holds for a wireless network only, and there is no image.wifi")
    return tuple(told)


def check_host(name: str, host: str, settings: ImageSettings) -> None:
    """Raises UsageError where the board would be looked for at another address than it gets."""
    if settings.address is not None and _is_address(host) and host != _bare(settings.address):
        raise UsageError(
            f"{name}: host is {host}, and image.address is {settings.address}: the board would not answer there; "
            "make them one"
        )


def check_alone(device: str, settings: Mapping[str, ImageSettings]) -> None:
    """Raises UsageError where another device of its inventory would get its address or its host name."""
    address = settings[device].address
    for name, other in settings.items():
        if name == device:
            continue
        if address is not None and other.address is not None and _bare(other.address) == _bare(address):
            raise UsageError(
                f"{device}: image.address: {_bare(address)} is the address of {name} too; each board needs its own"
            )
        if host_name_of(name) == host_name_of(device):
            raise UsageError(
                f"{device} and {name} would have one host name, {host_name_of(name)}; rename one in the inventory"
            )


def host_name_of(device: str) -> str:
    """A name of the inventory, as a board can have it."""
    return device.lower().replace("_", "-").replace(".", "-")


def time_source(server: str, name: str) -> tuple[str, int | None]:
    """Host and port of a time server: an address or a name, `:port` after an IPv4 address or a name; UsageError."""
    if _is_address(server):
        return server, None
    host, colon, port = server.partition(":")
    is_host = _is_address(host) or _DOMAIN.fullmatch(host) is not None
    if not is_host or (colon and not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= _HIGHEST_PORT)):
        raise UsageError(_complaint(name, "time_servers", "hosts such as 192.0.2.1, time.lab or time.lab:123", server))
    return host, int(port) if colon else None


def _interface(name: str, address: str) -> ipaddress.IPv4Interface:
    try:
        return ipaddress.IPv4Interface(address)
    except ValueError:
        expected = 'an address with the length of its network such as "192.0.2.11/24"'
        raise UsageError(_complaint(name, "address", expected, address)) from None


def _check_gateway(name: str, gateway: str, address: ipaddress.IPv4Interface | None) -> None:
    if address is None:
        raise UsageError(f"{name}: image.gateway: {gateway} needs image.address; without one, DHCP tells the gateway")
    try:
        found = ipaddress.IPv4Address(gateway)
    except ValueError:
        raise UsageError(_complaint(name, "gateway", "an address such as 192.0.2.1", gateway)) from None
    if found not in address.network:
        raise UsageError(f"{name}: image.gateway: {gateway} is not in the network of image.address ({address.network})")


def _is_address(text: str) -> bool:
    """Of IPv4 or IPv6; without a zone, in which anything may stand."""
    try:
        return "%" not in text and bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def _bare(address: str) -> str:
    return address.partition("/")[0]


def _complaint(name: str, key: str, expected: str, got: str) -> str:
    return f"{name}: image.{key}: expected {expected}, got {shown(got)}"
