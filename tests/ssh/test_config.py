"""What becomes of a user's SSH configuration: lines in, the target out."""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path

import pytest

from testbed.errors import DeviceError
from testbed.inventory import Access
from testbed.process_identity import login_name
from testbed.ssh.config import CIPHERS, Target, resolve


@pytest.fixture
def of(tmp_path):
    def resolve_with(text: str, name: str = "board", **access) -> Target:
        file = tmp_path / "ssh_config"
        file.write_text(text, encoding="utf-8")
        return resolve(Access(name, ssh_config=str(file), **access))

    return resolve_with


def test_the_inventory_outweighs_the_configuration(of):
    target = of("Host board\n HostName 10.1.2.3\n Port 2200\n User ann\n", user="bob", port=2300)
    assert (target.host, target.port, target.user) == ("10.1.2.3", 2300, "bob")


def test_include_and_match_are_followed(of, tmp_path):
    (tmp_path / "more").write_text("Host board\n HostName included.example\n", encoding="utf-8")
    target = of(f"Include {tmp_path / 'more'}\nMatch host included.example\n Port 2201\n")
    assert (target.host, target.port) == ("included.example", 2201)


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("HostName 10.0.0.1", "10.0.0.1"),
        ("HostName Lab.Example", "lab.example"),
        ("HostName 10.0.0.1\n Port 2222", "[10.0.0.1]:2222"),
        ("HostName 10.0.0.1\n Port 2222\n HostKeyAlias orin", "orin"),
    ],
)
def test_the_name_that_known_hosts_has_for_it(of, lines, name):
    assert of(f"Host board\n {lines}\n").host_key_name == name


def test_tokens_tildes_and_variables_in_paths(of, monkeypatch):
    monkeypatch.setenv("LAB_KEYS", "/keys")
    target = of("Host board\n User ann\n IdentityFile %d/.ssh/%r@%h\n IdentityFile ${LAB_KEYS}/a%%b\n")
    assert target.identity_files == (Path.home() / ".ssh/ann@board", Path("/keys/a%b"))


def test_known_hosts_files_with_blanks_in_their_names(of):
    target = of('Host board\n UserKnownHostsFile /a/one "/b/two words"\n GlobalKnownHostsFile none\n')
    assert target.user_known_hosts == (Path("/a/one"), Path("/b/two words"))
    assert target.global_known_hosts == ()


@pytest.mark.parametrize(
    ("line", "agent"),
    [
        ("", "/run/agent"),
        ("IdentityAgent none", None),
        ("IdentityAgent $OTHER", "/run/other"),
        ("IdentityAgent /x", "/x"),
    ],
)
def test_which_agent_is_asked(of, monkeypatch, line, agent):
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    monkeypatch.setenv("OTHER", "/run/other")
    assert of(f"Host board\n {line}\n").agent == agent


def test_jump_hosts_are_resolved_too_each_with_its_own_lines(of):
    text = (
        "Host board\n ProxyJump gate,carl@inner:2202\n"
        "Host gate\n HostName gate.example\n User gil\n ProxyJump outer\n"
        "Host inner\n HostName 192.168.1.1\n ProxyJump never\n"
    )
    way = of(text).path
    assert [(hop.alias, hop.host, hop.port, hop.user) for hop in way[:-1]] == [
        ("outer", "outer", 22, of("").user),
        ("gate", "gate.example", 22, "gil"),
        ("inner", "192.168.1.1", 2202, "carl"),  # the way to it is settled by who names it, as ssh -J does
    ]


def test_jump_hosts_in_a_circle_end(of):
    with pytest.raises(DeviceError, match="round in circles"):
        of("Host board\n ProxyJump other\nHost other\n ProxyJump board\n")


def test_a_proxy_command_gets_its_tokens(of):
    target = of("Host board\n HostName 10.0.0.9\n Port 24\n User ann\n ProxyCommand nc -x proxy %h %p # %r %% %n\n")
    assert target.proxy_command == "nc -x proxy 10.0.0.9 24 # ann % board"


def test_what_cannot_be_followed_is_named_in_one_message(of):
    with pytest.raises(DeviceError) as caught:
        of(
            "Host board\n PKCS11Provider /lib/card.so\n ProxyJump gate\n Ciphers chacha20-poly1305@openssh.com\n"
            "Host gate\n KnownHostsCommand /bin/keys %H\n PubkeyAuthentication no\n"
        )
    message = str(caught.value)
    for part in (
        "PKCS11Provider",
        "ciphers that paramiko does not have",
        "(for board)",
        "KnownHostsCommand",
        "(for gate)",
    ):
        assert part in message
    assert "PubkeyAuthentication no" in message
    assert "`ssh_config:` in the inventory" in message


def test_ciphers_are_what_both_admit_in_our_order(of):
    assert of("").algorithms.ciphers == CIPHERS
    admitted = of("Host board\n Ciphers aes256-ctr,aes128-gcm@openssh.com,chacha20-poly1305@openssh.com\n").algorithms
    assert admitted.ciphers == ("aes128-gcm@openssh.com", "aes256-ctr")


def test_small_things_that_matter(of):
    target = of(
        "Host board\n ConnectTimeout 3\n ServerAliveInterval 7\n ServerAliveCountMax 2\n AddressFamily inet6\n"
        " IdentitiesOnly yes\n HashKnownHosts yes\n Compression yes\n StrictHostKeyChecking accept-new\n"
    )
    assert (target.connect_timeout_seconds, target.keep_alive_seconds, target.keep_alive_count) == (3, 7, 2)
    assert target.family is socket.AF_INET6
    assert target.only_these_identities
    assert target.hash_known_hosts
    assert target.compression
    assert target.lax_host_keys == "accept-new"


@pytest.mark.parametrize("text", ["Nonsense yes\n", "Host board\n IdentityFile ${NO_SUCH_VARIABLE}/x\n"])
def test_a_configuration_that_is_wrong_is_quoted(of, text):
    with pytest.raises(DeviceError, match=r"(?i)nonsense|NO_SUCH_VARIABLE"):
        of(text)


def test_a_configuration_file_that_is_not_there():
    with pytest.raises(DeviceError, match="/no/such/file"):
        resolve(Access("board", ssh_config="/no/such/file"))


def test_a_user_without_a_name_is_called_by_number(monkeypatch):
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert login_name() == str(os.getuid())
