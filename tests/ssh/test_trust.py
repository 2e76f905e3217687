"""`testbed trust NAME`: fingerprints are shown, keys are written where ssh looks for them."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys

import pytest

from testbed.cli import main
from testbed.inventory import Access
from tests.ssh.test_login import fingerprint, whoami
from tests.ssh_server import SshServer, new_key

pytestmark = pytest.mark.sshd


@pytest.fixture
def server(tmp_path):
    with SshServer(tmp_path / "server") as server:
        server.known_hosts.unlink()
        yield server


@pytest.fixture
def trust(tmp_path, capsys):
    """The command, for a board reached as `access` says: exit code, what it printed, what it complained of."""

    def call(access: Access, *options: str) -> tuple[int, str, str]:
        inventory = tmp_path / "lab.yaml"
        inventory.write_text(
            "devices:\n"
            "  board:\n"
            "    kind: generic\n"
            "    profile: raspberry_pi_5_8gb\n"
            '    budget: {memory: "1 GiB"}\n'
            f"    host: {access.host}\n"
            f"    ssh_config: {access.ssh_config}\n",
            encoding="utf-8",
        )
        code = main(["trust", "board", "--inventory", str(inventory), *options])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def restarted_with_another_key(server: SshServer) -> str:
    """Its old fingerprint."""
    old = fingerprint(server.host_key)
    server.stop()
    server.change_host_key()
    server.start()
    return old


def test_an_unknown_host_is_shown_and_accepted(trust, server):
    code, out, _ = trust(server.access, "--yes")
    assert code == 0
    assert f"ED25519 {fingerprint(server.host_key)}" in out
    assert f"written to {server.known_hosts}" in out
    assert server.known_hosts.stat().st_mode & 0o777 == 0o600
    assert whoami(server.access) == server.user
    assert "Accepted publickey" in server.log.read_text(encoding="utf-8")
    ssh = ["ssh", "-F", server.ssh_config, "-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "board", "true"]
    subprocess.run(ssh, check=True)


def test_nobody_logs_in_to_be_introduced(trust, server):
    trust(server.access, "--yes")
    assert "Accepted publickey" not in server.log.read_text(encoding="utf-8")


def test_nothing_is_accepted_when_nobody_is_there_to_ask(trust, server):
    code, out, err = trust(server.access)
    assert code == 2
    assert fingerprint(server.host_key) in out
    assert "--yes" in err
    assert not server.known_hosts.exists()


@pytest.mark.parametrize(("answer", "accepted"), [("y\n", True), ("n\n", False)])
def test_a_person_is_asked(server, answer, accepted):
    """On a terminal of its own."""
    inventory = server.folder / "lab.yaml"
    inventory.write_text(
        "devices:\n  board: {kind: generic, profile: raspberry_pi_5_8gb, budget: {memory: 1 GiB},"
        f" ssh_config: {server.ssh_config}}}\n",
        encoding="utf-8",
    )
    ours, its = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "testbed", "trust", "board", "--inventory", inventory], stdin=its, stdout=its, stderr=its
    ) as process:
        os.close(its)
        os.write(ours, answer.encode())
        shown = b""
        with contextlib.suppress(OSError):  # what a terminal says when the other end has gone
            while piece := os.read(ours, 4096):
                shown += piece
    os.close(ours)
    assert fingerprint(server.host_key).encode() in shown
    assert b"Are these the keys of board?" in shown
    assert server.known_hosts.exists() == accepted
    assert (process.returncode == 0) == accepted


def test_a_known_host_is_said_to_be_known_and_its_file_left_alone(trust, server):
    server.trust()
    before = server.known_hosts.read_text(encoding="utf-8")
    code, out, _ = trust(server.access)
    assert code == 0
    assert "is known" in out
    assert server.known_hosts.read_text(encoding="utf-8") == before


def test_a_changed_key_is_replaced_after_both_were_shown(trust, server):
    server.trust()
    with server.known_hosts.open("a", encoding="utf-8") as file:
        file.write("# mine\nother.example ssh-ed25519 AAAA\n")
    old = restarted_with_another_key(server)
    code, out, _ = trust(server.access, "--yes")
    assert code == 0
    assert out.index(fingerprint(server.host_key)) < out.index(f"{old} ({server.known_hosts}:1)")
    text = server.known_hosts.read_text(encoding="utf-8")
    assert text.startswith("# mine\nother.example ssh-ed25519 AAAA\n[127.0.0.1]:")
    assert text.count("[127.0.0.1]") == 1
    assert whoami(server.access) == server.user


def test_a_line_with_other_names_beside_it_stays_for_those(trust, server):
    server.trust()
    key = server.known_hosts.read_text(encoding="utf-8").split(maxsplit=1)[1]
    server.known_hosts.write_text(f"other,[127.0.0.1]:{server.port} {key}", encoding="utf-8")
    restarted_with_another_key(server)
    assert trust(server.access, "--yes")[0] == 0
    text = server.known_hosts.read_text(encoding="utf-8")
    assert text.startswith(f"other {key}[127.0.0.1]:{server.port} ssh-ed25519 ")
    assert whoami(server.access) == server.user


def test_a_pattern_that_fits_others_too_is_left_to_the_user(trust, server):
    server.trust()
    key = server.known_hosts.read_text(encoding="utf-8").split(maxsplit=1)[1]
    line = f"[127.0.0.*]:{server.port} {key}"
    server.known_hosts.write_text(line, encoding="utf-8")
    restarted_with_another_key(server)
    code, _, err = trust(server.access, "--yes")
    assert code == 1
    assert f"{server.known_hosts}:1 speaks of other machines as well" in err
    assert server.known_hosts.read_text(encoding="utf-8") == line


def test_hashed_names_and_an_alias_are_respected(trust, server):
    server.ssh_config.write_text(server.client_config(HashKnownHosts="yes", HostKeyAlias="orin"), encoding="utf-8")
    assert trust(server.access, "--yes")[0] == 0
    assert server.known_hosts.read_text(encoding="utf-8").startswith("|1|")
    assert whoami(server.access) == server.user
    found = subprocess.run(["ssh-keygen", "-F", "orin", "-f", server.known_hosts], capture_output=True, check=True)
    assert found.stdout


def test_all_kinds_of_keys_are_shown_and_written(trust, tmp_path):
    keys = [new_key(tmp_path / kind, kind) for kind in ("rsa", "ecdsa")]
    options = "\n".join(f"HostKey {key}" for key in keys)
    with SshServer(tmp_path / "several", options=options) as server:
        server.known_hosts.unlink()
        code, out, _ = trust(server.access, "--yes")
        assert code == 0
        for kind, key in (("ED25519", server.host_key), ("RSA", keys[0]), ("ECDSA", keys[1])):
            assert f"{kind} {fingerprint(key)}" in out
        assert len(server.known_hosts.read_text(encoding="utf-8").splitlines()) == 3


def test_jump_hosts_are_introduced_on_the_way(trust, tmp_path):
    with (
        SshServer(tmp_path / "gate", alias="gate") as gate,
        SshServer(tmp_path / "board") as board,
    ):
        gate.known_hosts.unlink()
        board.known_hosts.unlink()
        gate.ssh_config.write_text(board.client_config(ProxyJump="gate") + gate.client_config(), encoding="utf-8")
        access = Access("board", ssh_config=str(gate.ssh_config))
        code, out, _ = trust(access, "--yes")
        assert code == 0
        assert out.index(fingerprint(gate.host_key)) < out.index(fingerprint(board.host_key))
        assert whoami(access) == board.user


def test_a_device_of_this_machine_has_no_host_key(capsys):
    assert main(["trust", "jetson-nano"]) == 2
    assert "controller's own machine" in capsys.readouterr().err


def test_no_file_to_keep_keys_in(trust, server):
    server.ssh_config.write_text(server.client_config(UserKnownHostsFile="none"), encoding="utf-8")
    code, _, err = trust(server.access, "--yes")
    assert code == 1
    assert "UserKnownHostsFile is none" in err
