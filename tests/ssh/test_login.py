"""Getting to a device over SSH, or being told why not: host keys, keys, agents, jump hosts, dead addresses."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from testbed.errors import DeviceError, HostKeyError
from testbed.inventory import Access
from testbed.ssh import SshConnection, connect
from tests.ssh_server import SshServer, free_port, new_key

pytestmark = pytest.mark.sshd


@pytest.fixture
def server(tmp_path):
    with SshServer(tmp_path / "server") as server:
        yield server


def whoami(access: Access, **settings) -> str:
    connection = connect("board", access, **settings)
    try:
        return connection.run(["id", "-un"]).strip()
    finally:
        connection.close()


def fingerprint(key: Path) -> str:
    shown = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, text=True, check=True).stdout
    return shown.split()[1]


def refused(access: Access, kind: type[DeviceError] = DeviceError, **settings) -> str:
    with pytest.raises(kind) as caught:
        connect("board", access, **settings)
    assert isinstance(caught.value, HostKeyError) == (kind is HostKeyError)
    return str(caught.value)


# Host keys


def test_an_unknown_host_is_refused_with_its_fingerprint_and_the_way_out(server):
    server.known_hosts.unlink()
    message = refused(server.access, HostKeyError)
    assert f"ED25519 {fingerprint(server.host_key)}" in message
    assert "testbed trust board" in message
    assert not server.known_hosts.exists()
    assert "Accepted publickey" not in server.log.read_text(encoding="utf-8")


def test_a_changed_host_key_is_refused_with_both_fingerprints_and_the_line(server):
    old = fingerprint(server.host_key)
    server.stop()
    server.change_host_key()
    server.start()
    message = refused(server.access, HostKeyError)
    assert old in message
    assert fingerprint(server.host_key) in message
    assert f"{server.known_hosts}:1" in message
    assert "testbed trust board" in message
    assert "Accepted publickey" not in server.log.read_text(encoding="utf-8")


def test_a_lax_configuration_does_not_make_us_lax(server):
    server.known_hosts.unlink()
    server.ssh_config.write_text(server.client_config(StrictHostKeyChecking="no"), encoding="utf-8")
    assert "`StrictHostKeyChecking no` is not followed" in refused(server.access, HostKeyError)


def test_a_revoked_key_is_refused_though_it_is_known(server):
    known = server.known_hosts.read_text(encoding="utf-8")
    server.known_hosts.write_text(f"{known}@revoked * {known.split(maxsplit=1)[1]}", encoding="utf-8")
    assert "was revoked" in refused(server.access, HostKeyError)


def test_a_certificate_authority_is_said_to_be_of_no_use(tmp_path):
    """OpenSSH's own client trusts the machine by it."""
    authority, host_key = new_key(tmp_path / "authority"), tmp_path / "server/host_ed25519"
    options = f"HostCertificate {host_key}-cert.pub"
    server = SshServer(tmp_path / "server", options=options)
    command = ["ssh-keygen", "-q", "-s", authority, "-I", "test", "-h", "-n", "127.0.0.1", f"{host_key}.pub"]
    subprocess.run(command, check=True)
    public = authority.with_suffix(".pub").read_text(encoding="utf-8")
    server.known_hosts.write_text(f"# the lab's\n@cert-authority [127.0.0.*]:{server.port} {public}", encoding="utf-8")
    not_followed = f"A certificate authority ({server.known_hosts}:2) is not followed: paramiko asks no server"
    with server:
        subprocess.run(["ssh", "-F", server.ssh_config, "-o", "BatchMode=yes", "board", "true"], check=True)
        message = refused(server.access, HostKeyError)
        assert f"is not known: ED25519 {fingerprint(server.host_key)}" in message
        assert not_followed in message
        assert "testbed trust board" in message
        old = new_key(tmp_path / "old").with_suffix(".pub").read_text(encoding="utf-8")
        with server.known_hosts.open("a", encoding="utf-8") as file:
            file.write(f"[127.0.0.1]:{server.port} {old}")
        message = refused(server.access, HostKeyError)
        assert "has CHANGED" in message
        assert not_followed in message


@pytest.mark.parametrize("form", ["hashed", "pattern", "alias", "among others"])
def test_the_forms_of_a_known_hosts_line(server, form):
    key = server.known_hosts.read_text(encoding="utf-8").split(maxsplit=1)[1]
    if form == "hashed":
        subprocess.run(["ssh-keygen", "-q", "-H", "-f", server.known_hosts], check=True, capture_output=True)
        assert "127.0.0.1" not in server.known_hosts.read_text(encoding="utf-8")
    elif form == "alias":
        server.ssh_config.write_text(server.client_config(HostKeyAlias="orin"), encoding="utf-8")
        server.known_hosts.write_text(f"orin {key}", encoding="utf-8")
    elif form == "pattern":
        server.known_hosts.write_text(f"# a comment\n\n[127.0.0.*]:{server.port} {key}", encoding="utf-8")
    else:
        server.known_hosts.write_text(f"other,[127.0.0.1]:{server.port},third {key}", encoding="utf-8")
    assert whoami(server.access) == server.user


def test_a_negated_pattern_is_no_acquaintance(server):
    key = server.known_hosts.read_text(encoding="utf-8").split(maxsplit=1)[1]
    server.known_hosts.write_text(f"*,![127.0.0.1]:{server.port} {key}", encoding="utf-8")
    assert "is not known" in refused(server.access, HostKeyError)


def test_of_several_host_keys_the_known_one_is_asked_for(tmp_path):
    rsa = new_key(tmp_path / "rsa", "rsa")
    with SshServer(tmp_path / "server", options=f"HostKey {rsa}") as server:
        public = rsa.with_suffix(".pub").read_text(encoding="utf-8")
        server.known_hosts.write_text(f"[127.0.0.1]:{server.port} {public}", encoding="utf-8")
        assert whoami(server.access) == server.user


# Keys of the user


def test_a_refused_key_is_named_and_the_way_out(server):
    other = new_key(server.folder / "other")
    server.ssh_config.write_text(server.client_config(IdentityFile=str(other)), encoding="utf-8")
    message = refused(server.access)
    assert f"{server.user}@127.0.0.1 port {server.port} refused every key: {fingerprint(other)} ({other})" in message
    assert "ssh-copy-id board" in message
    assert "PRIVATE" not in message


def test_no_key_at_all(server):
    server.ssh_config.write_text(server.client_config(IdentityFile="/no/such/key"), encoding="utf-8")
    assert "wants a key, and there is none to show" in refused(server.access)


def test_a_key_with_a_passphrase_needs_the_agent(server):
    locked = new_key(server.folder / "locked", passphrase="a secret")
    server.ssh_config.write_text(server.client_config(IdentityFile=str(locked)), encoding="utf-8")
    message = refused(server.access)
    assert f"{locked} has a passphrase and the agent does not hold it (ssh-add {locked})" in message


@pytest.fixture
def agent(tmp_path):
    """An ssh-agent of our own; a function that gives it a key."""
    path = tmp_path / "agent.sock"
    with subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL) as process:
        environment = {**os.environ, "SSH_AUTH_SOCK": str(path)}

        def add(key: Path) -> str:
            subprocess.run(["ssh-add", "-q", key], env=environment, check=True, timeout=10)
            return str(path)

        while not path.exists():
            assert process.poll() is None
        yield add
        process.terminate()


def test_the_agent_signs_for_a_key_whose_file_holds_only_the_public_half(server, agent, tmp_path):
    socket_path = agent(server.identity)
    public = shutil.copy(server.identity.with_suffix(".pub"), tmp_path / "only.pub")
    server.ssh_config.write_text(
        server.client_config(IdentityFile=str(public), IdentityAgent=socket_path), encoding="utf-8"
    )
    assert whoami(server.access) == server.user


def test_only_the_identities_that_are_named_are_shown(server, agent):
    other = new_key(server.folder / "other")
    socket_path = agent(server.identity)
    config = server.client_config(IdentityFile=str(other), IdentityAgent=socket_path)
    server.ssh_config.write_text(config, encoding="utf-8")
    assert fingerprint(server.identity) not in refused(server.access)
    server.ssh_config.write_text(config.replace("IdentitiesOnly yes", "IdentitiesOnly no"), encoding="utf-8")
    assert whoami(server.access) == server.user


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_other_kinds_of_keys(server, kind):
    key = new_key(server.folder / f"id_{kind}", kind)
    shutil.copyfile(key.with_suffix(".pub"), server.home / ".ssh/authorized_keys")
    server.ssh_config.write_text(server.client_config(IdentityFile=str(key)), encoding="utf-8")
    assert whoami(server.access) == server.user


@pytest.mark.parametrize("beside", [True, False])
def test_a_certificate_opens_what_the_key_alone_does_not(tmp_path, beside):
    authority = new_key(tmp_path / "authority")
    with SshServer(tmp_path / "server", options=f"TrustedUserCAKeys {authority}.pub") as server:
        (server.home / ".ssh/authorized_keys").unlink()
        assert "refused every key" in refused(server.access)
        command = ["ssh-keygen", "-q", "-s", authority, "-I", "test", "-n", server.user, f"{server.identity}.pub"]
        subprocess.run(command, check=True)
        if not beside:
            elsewhere = shutil.move(f"{server.identity}-cert.pub", tmp_path / "certificate.pub")
            server.ssh_config.write_text(server.client_config(CertificateFile=str(elsewhere)), encoding="utf-8")
        assert whoami(server.access) == server.user


def test_too_many_keys_are_told_apart_from_the_wrong_one(tmp_path):
    with SshServer(tmp_path / "server", options="MaxAuthTries 1") as server:
        keys = [new_key(tmp_path / f"key{number}") for number in range(3)]
        lines = "".join(f"  IdentityFile {key}\n" for key in keys)
        server.ssh_config.write_text(server.client_config(IdentityFile=str(keys[0])) + lines, encoding="utf-8")
        assert "then it hung up (name the one right key" in refused(server.access)


def test_more_than_a_key_is_wanted(tmp_path):
    options = "AuthenticationMethods publickey,password"
    with SshServer(tmp_path / "server", passwords=True, options=options) as server:
        assert "wants more than a key (password)" in refused(server.access)


def test_two_keys_are_wanted(tmp_path):
    with SshServer(tmp_path / "server", options="AuthenticationMethods publickey,publickey") as server:
        second = new_key(tmp_path / "second")
        with (server.home / ".ssh/authorized_keys").open("a", encoding="utf-8") as file:
            file.write(second.with_suffix(".pub").read_text(encoding="utf-8"))
        config = server.client_config() + f"  IdentityFile {second}\n"
        server.ssh_config.write_text(config, encoding="utf-8")
        assert whoami(server.access) == server.user


# Addresses


def at(server: SshServer, **settings: str) -> Access:
    server.ssh_config.write_text(server.client_config(**settings), encoding="utf-8")
    return server.access


def test_a_port_where_nobody_listens(server):
    port = str(free_port())
    message = refused(at(server, Port=port))
    assert f"board: no connection to 127.0.0.1 port {port}: 127.0.0.1: Connection refused" in message
    assert "is sshd running at this port?" in message


def test_a_name_that_nobody_knows(server):
    message = refused(at(server, HostName="no-such-host.invalid"))
    assert "the host name no-such-host.invalid cannot be resolved" in message


@pytest.mark.parametrize("name", [f"{'a' * 64}.invalid", "lab..invalid"])
def test_a_name_that_can_be_nobodys(server, name, capfd):
    message = refused(at(server, HostName=name))
    assert f"the host name {name} cannot be resolved (label empty or too long); correct `host`" in message
    assert "Traceback" not in capfd.readouterr().err


def test_something_that_is_not_ssh(server):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        message = refused(at(server, Port=port), timeout_seconds=0.5)
    assert f"127.0.0.1 port {port} takes connections, and no SSH server greets there within 0.5 s" in message


def test_a_frozen_server(server):
    server.freeze()
    try:
        assert "no SSH server greets there" in refused(server.access, timeout_seconds=0.5)
    finally:
        server.thaw()


def test_no_algorithm_in_common(tmp_path):
    with SshServer(tmp_path / "server", options="Ciphers chacha20-poly1305@openssh.com") as server:
        assert "have no algorithm in common" in refused(server.access)


# On the way


@pytest.fixture
def behind_two(tmp_path):
    """A board behind a gate behind an outer gate, all in one configuration."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(SshServer(tmp_path / name, alias=name)) for name in ("outer", "gate", "board")]
        outer, gate, board = servers
        outer.ssh_config.write_text(
            board.client_config(ProxyJump="gate") + gate.client_config(ProxyJump="outer") + outer.client_config(),
            encoding="utf-8",
        )
        yield Access("board", ssh_config=str(outer.ssh_config)), servers


def test_through_two_jump_hosts(behind_two):
    access, servers = behind_two
    assert whoami(access) == servers[-1].user
    for server in servers:
        assert "Accepted publickey" in server.log.read_text(encoding="utf-8")


def first_socket(connection: SshConnection) -> socket.socket:
    """Of the first hop: what goes through a jump host has no other."""
    link = connection._link
    while link.before is not None:
        link = link.before
    return link.transport.sock


def test_no_packet_waits_to_be_filled(server):
    with contextlib.closing(connect("board", server.access)) as connection:
        sock = first_socket(connection)
        assert sock.getpeername()[1] == server.port
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_nor_does_one_on_the_way_to_the_first_jump_host(behind_two):
    access, (outer, _, _) = behind_two
    with contextlib.closing(connect("board", access)) as connection:
        sock = first_socket(connection)
        assert sock.getpeername()[1] == outer.port
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_host_keys_of_jump_hosts_are_strict_too(behind_two):
    access, (_, gate, board) = behind_two
    gate.known_hosts.unlink()
    message = refused(access, HostKeyError)
    assert f"127.0.0.1 port {gate.port} is not known" in message
    assert "testbed trust board" in message
    assert "Accepted publickey" not in gate.log.read_text(encoding="utf-8")
    assert "Accepted publickey" not in board.log.read_text(encoding="utf-8")


def test_a_board_behind_a_jump_host_that_is_off(behind_two):
    access, (_, _, board) = behind_two
    board.stop()
    message = refused(access)
    assert f"the jump host gate gives no connection to 127.0.0.1 port {board.port}" in message


def test_a_jump_host_that_is_lost_loses_the_board(behind_two):
    access, (outer, _, _) = behind_two
    connection = connect("board", access)
    try:
        outer.stop()
        with pytest.raises(DeviceError, match=r"board: the connection to .* is lost"):
            connection.run(["sleep", "5"], patience_seconds=30)
    finally:
        connection.close()


def test_through_a_proxy_command(server):
    forward = (
        "import socket,sys,threading;s=socket.create_connection((sys.argv[1],int(sys.argv[2])));"
        "f=lambda a,b:[b(d) for d in iter(a,b'')];"
        "threading.Thread(target=f,args=(lambda:s.recv(65536),lambda d:(sys.stdout.buffer.write(d),"
        "sys.stdout.flush())),daemon=True).start();f(lambda:sys.stdin.buffer.raw.read(65536),s.sendall)"
    )
    program = server.folder / "forward.py"
    program.write_text(forward, encoding="utf-8")
    assert whoami(at(server, ProxyCommand=f"python3 {program} %h %p")) == server.user


def test_a_proxy_command_that_fails_is_quoted(server):
    message = refused(at(server, ProxyCommand="sh -c 'echo no way to %h >&2; exit 3'"))
    assert "ProxyCommand `sh -c 'echo no way to 127.0.0.1 >&2; exit 3'` gives no connection" in message
    assert "(exit code 3: no way to 127.0.0.1)" in message


def test_one_message_even_for_a_configuration_that_cannot_be_followed(server):
    message = refused(at(server, PKCS11Provider="/lib/card.so"))
    assert message.startswith("board: ")
    assert "PKCS11Provider" in message


# Many at once, and ends in the middle


def test_more_logins_at_once_than_the_server_admits(server):
    with ThreadPoolExecutor(24) as pool:
        names = list(pool.map(lambda _: whoami(server.access, timeout_seconds=60.0), range(24)))
    assert names == [server.user] * 24


def test_a_server_that_hangs_up_without_a_greeting_is_tried_once_more(server):
    with _proxy(server, drops=1) as access:
        assert whoami(access) == server.user
    with _proxy(server, drops=2) as access:
        assert "no SSH server greets there" in refused(access)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_login_that_is_reset_is_an_error_of_the_device(server, monkeypatch, error):
    def reset(*_):
        raise error

    monkeypatch.setattr("paramiko.auth_handler.AuthHandler.wait_for_response", reset)
    assert refused(server.access).startswith("board: logging in at 127.0.0.1 port")


@contextlib.contextmanager
def _proxy(server: SshServer, drops: int) -> Iterator[Access]:
    """Hangs up on the first callers, then carries one through to the server."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            for _ in range(drops):
                listener.accept()[0].close()
            near = listener.accept()[0]
            with near, socket.create_connection(("127.0.0.1", server.port)) as far:
                back = threading.Thread(target=_carry, args=(far, near))
                back.start()
                _carry(near, far)
                back.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve)
        serving.start()
        port = listener.getsockname()[1]
        try:
            yield at(server, Port=str(port), HostKeyAlias=f"[127.0.0.1]:{server.port}")
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            serving.join(30)


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
