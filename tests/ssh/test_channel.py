"""A channel to a command over SSH is a socket: both directions, both ends, much at once, a lost connection."""

from __future__ import annotations

import hashlib
import os
import socket
import threading

import pytest

from testbed.errors import DeviceError
from testbed.ssh import connect
from tests.ssh.test_connection import connected, processes, wait_until
from tests.ssh_server import SshServer

pytestmark = pytest.mark.sshd


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with SshServer(tmp_path_factory.mktemp("ssh") / "server") as server:
        yield server


@pytest.fixture
def board(server):
    with connected(server) as connection:
        yield connection


def read_all(channel: socket.socket) -> bytes:
    channel.settimeout(20)
    return b"".join(iter(lambda: channel.recv(1 << 20), b""))


def ssh_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("ssh-back", "ssh-there"))]


def test_it_is_a_socket_that_says_and_hears(board):
    with board.open_channel(["cat"]) as channel:
        assert isinstance(channel, socket.socket)
        for word in (b"one", b"two"):
            channel.sendall(word)
            assert channel.recv(100) == word


def test_the_end_of_our_side_reaches_the_command_and_its_answer_us(board):
    with board.open_channel(["sh", "-c", "wc -c; exec >&-; sleep 0.1"]) as channel:
        channel.sendall(b"12345")
        channel.shutdown(socket.SHUT_WR)
        assert read_all(channel).strip() == b"5"


def test_the_end_of_its_side_leaves_ours_open(board, server):
    heard = server.home / "heard"
    with board.open_channel(["sh", "-c", f"echo bye; exec >&- 2>&-; cat >{heard}"]) as channel:
        assert read_all(channel) == b"bye\n"
        channel.sendall(b"still listening")
        channel.shutdown(socket.SHUT_WR)
        assert wait_until(lambda: heard.exists() and heard.read_bytes() == b"still listening")


def test_closing_it_is_heard_by_the_command(board):
    channel = board.open_channel(["sh", "-c", "cat; exec sleep 0"])
    channel.close()
    channel = board.open_channel(["tail", "-f", "-n", "1", "/etc/passwd"])
    assert channel.recv(1)
    channel.close()
    assert wait_until(lambda: not ssh_threads())


def test_the_end_of_the_command_ends_the_socket_in_both_directions(board):
    with board.open_channel(["echo", "short"]) as channel:
        assert read_all(channel) == b"short\n"
        with pytest.raises(OSError, match="Broken pipe"):
            channel.sendall(b"x" * 100_000_000)
    assert wait_until(lambda: not ssh_threads())


def test_a_command_that_does_not_exist_is_an_end_at_once(board):
    with board.open_channel(["no-such-command"]) as channel:
        assert read_all(channel) == b""


def test_what_it_says_on_standard_error_does_not_get_in_and_does_not_stop_it(board):
    with board.open_channel(["sh", "-c", "head -c 5000000 /dev/zero >&2; echo done"]) as channel:
        assert read_all(channel) == b"done\n"


def test_much_in_both_directions_at_once_while_keys_change(tmp_path):
    """The server asks for new keys every 8 MB, in the middle of it all."""
    sent = os.urandom(1 << 20)
    server = SshServer(tmp_path / "server", options="RekeyLimit 8M")
    with server, connected(server) as board, board.open_channel(["cat"]) as channel:
        sender = threading.Thread(
            target=lambda: ([channel.sendall(sent) for _ in range(40)], channel.shutdown(socket.SHUT_WR))
        )
        sender.start()
        assert hashlib.sha256(read_all(channel)).digest() == hashlib.sha256(sent * 40).digest()
        sender.join()


def test_a_reader_that_takes_its_time_loses_nothing(board):
    with board.open_channel(["sh", "-c", "head -c 20000000 /dev/zero; echo end"]) as channel:
        assert board.run(["echo", "meanwhile"]) == "meanwhile\n"
        assert len(read_all(channel)) == 20_000_000 + len("end\n")


def test_a_lost_connection_ends_the_socket(tmp_path):
    with SshServer(tmp_path / "server") as server, connected(server) as board:
        with board.open_channel(["cat"]) as channel:
            channel.sendall(b"x")
            assert channel.recv(1) == b"x"
            server.stop()
            assert read_all(channel) == b""
            assert wait_until(lambda: not ssh_threads())
        with pytest.raises(DeviceError, match="is lost"):
            board.open_channel(["cat"])


def test_hanging_up_ends_the_socket_and_the_command(server):
    board = connect("board", server.access)
    channel = board.open_channel(["sh", "-c", "sleep 61021 & cat; kill $!"])
    board.close()
    assert read_all(channel) == b""
    channel.close()
    assert wait_until(lambda: not processes("sleep 61021"))
