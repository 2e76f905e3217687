"""Files to and from a device over SSH: whole or not at all, resumed, verified."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from paramiko import Transport
from paramiko.common import cMSG_CHANNEL_WINDOW_ADJUST

from testbed.errors import DeviceError
from testbed.ssh import SshConnection
from tests.ssh.test_connection import connected, wait_until
from tests.ssh_server import SshServer, need_root

pytestmark = pytest.mark.sshd

SIZE = 3_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with SshServer(tmp_path_factory.mktemp("ssh") / "server") as server:
        yield server


@pytest.fixture
def board(server) -> Iterator[SshConnection]:
    with connected(server) as connection:
        yield connection


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(os.urandom(SIZE))
    return path


def partial_of(target: Path, source: Path) -> Path:
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return target.with_name(f".{target.name}.{digest[:16]}.partial")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_and_alone_and_travels_once(board, server, source):
    there = server.home / "a/b c/file"
    assert board.put(source, Path("~/a/b c/file")) == SIZE
    assert there.read_bytes() == source.read_bytes()
    assert names(there.parent) == ["file"]
    assert board.put(source, Path("~/a/b c/file")) == 0


def test_an_empty_file(board, server, tmp_path):
    (tmp_path / "empty").touch()
    board.put(tmp_path / "empty", Path("~/empty"))
    assert (server.home / "empty").read_bytes() == b""
    board.get(Path("~/empty"), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b""


def test_another_content_takes_the_place_of_the_old_one(board, server, source):
    there = server.home / "replaced"
    there.write_bytes(b"old")
    board.put(source, there)
    assert there.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("arrived", [1, 1_000_000, SIZE])
def test_a_transfer_goes_on_where_it_stopped(board, server, source, tmp_path, arrived):
    there = tmp_path / "there/file"
    there.parent.mkdir()
    partial_of(there, source).write_bytes(source.read_bytes()[:arrived])
    assert board.put(source, there) == SIZE - arrived
    assert there.read_bytes() == source.read_bytes()
    assert names(there.parent) == ["file"]


@pytest.mark.parametrize("wrong", [b"x" * 1000, b"x" * SIZE, b"x" * (SIZE + 1)])
def test_what_lies_there_from_before_is_not_believed(board, source, tmp_path, wrong):
    there = tmp_path / "there/file"
    there.parent.mkdir()
    partial_of(there, source).write_bytes(wrong)
    assert board.put(source, there) >= SIZE
    assert there.read_bytes() == source.read_bytes()


def test_a_broken_transfer_leaves_no_file_and_what_arrived_is_kept(tmp_path):
    """The link breaks in the middle of a file; the next connection sends the rest only."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(64 << 20))
    with SshServer(tmp_path / "server") as server:
        there = server.home / "content/file"
        partial = partial_of(there, source)
        with connected(server) as board:
            breaker = threading.Thread(
                target=lambda: (
                    wait_until(lambda: partial.exists() and partial.stat().st_size > 1 << 20),
                    server.stop(),
                )
            )
            breaker.start()
            with pytest.raises(DeviceError, match="is lost"):
                board.put(source, there)
            breaker.join()
        assert not there.exists()
        assert wait_until(lambda: not writers(partial))
        arrived = partial.stat().st_size
        assert 1 << 20 < arrived < 64 << 20
        server.start()
        with connected(server) as board:
            assert board.put(source, there) == (64 << 20) - arrived
        assert there.read_bytes() == source.read_bytes()


def writers(path: Path) -> list[Path]:
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):
            if descriptor.readlink() == path:
                found.append(descriptor)
    return found


def test_a_writer_that_a_dead_connection_left_behind_is_ended(board, source, tmp_path):
    there = tmp_path / "there/file"
    there.parent.mkdir()
    partial = partial_of(there, source)
    with partial.open("wb") as out, subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out) as stale:
        partial.with_name(partial.name + ".pid").write_text(f"{stale.pid}\n", encoding="ascii")
        assert board.put(source, there) == SIZE
        assert stale.wait(5) == -9
    assert there.read_bytes() == source.read_bytes()


def test_a_process_that_only_has_the_number_of_a_writer_is_left_alone(board, source, tmp_path):
    there = tmp_path / "there/file"
    there.parent.mkdir()
    partial = partial_of(there, source)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as other:
        partial.with_name(partial.name + ".pid").write_text(f"{other.pid}\n", encoding="ascii")
        board.put(source, there)
        assert other.poll() is None


def test_two_threads_may_put_the_same_file(board, server, source):
    sent: list[int] = []
    threads = [threading.Thread(target=lambda: sent.append(board.put(source, Path("~/same")))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sent) == [0, 0, 0, SIZE]


@pytest.mark.parametrize("of_root", [False, True])
def test_a_place_that_cannot_be_written(tmp_path, source, of_root):
    need_root()
    with SshServer(tmp_path / "server", user="ann") as server, connected(server) as board:
        target = Path("/etc/passwd/file" if of_root else "/etc/testbed-test")
        with pytest.raises(
            DeviceError, match=r"board: /etc/\S+ could not be put there: .*(Permission|Not a dir|exists)"
        ):
            board.put(source, target)


@pytest.mark.lab
def test_a_full_disk_is_said_and_not_kept_full(source, tmp_path):
    need_root()
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
    try:
        # the server has a mount namespace of its own: a new one sees the small disk
        full = pytest.raises(DeviceError, match="No space left on device")
        with SshServer(tmp_path / "server") as server, connected(server) as board, full:
            board.put(source, disk / "file")
        assert names(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_source_that_is_not_there(board, tmp_path):
    with pytest.raises(DeviceError, match="no-file cannot be read: No such file"):
        board.put(tmp_path / "no-file", Path("~/x"))


# Back


def test_a_file_comes_back_whole(board, server, source, tmp_path):
    (server.home / "result").write_bytes(source.read_bytes())
    board.get(Path("~/result"), tmp_path / "new folder/back")
    assert (tmp_path / "new folder/back").read_bytes() == source.read_bytes()
    assert names(tmp_path / "new folder") == ["back"]


def test_a_file_comes_back_from_where_it_stopped(tmp_path):
    content = os.urandom(64 << 20)
    back = tmp_path / "back"
    with SshServer(tmp_path / "server") as server:
        (server.home / "result").write_bytes(content)

        def partials() -> list[Path]:
            return list(tmp_path.glob(".back.*.partial"))

        def break_off() -> None:
            wait_until(lambda: any(path.stat().st_size > 1 << 20 for path in partials()))
            server.stop()

        with connected(server) as board:
            breaker = threading.Thread(target=break_off)
            breaker.start()
            with pytest.raises(DeviceError, match="is lost"):
                board.get(Path("~/result"), back)
            breaker.join()
        assert not back.exists()
        (partial,) = partials()
        begun = partial.stat()
        assert 1 << 20 < begun.st_size < 64 << 20
        server.start()
        with connected(server) as board:
            board.get(Path("~/result"), back)
        assert back.read_bytes() == content
        assert back.stat().st_ino == begun.st_ino  # the same file was continued
        assert partials() == []


@pytest.fixture
def dying(server, monkeypatch):
    """The third time that our side tells how much more it takes, the server is gone, as paramiko finds it."""
    told, tell = [], Transport._send_user_message

    def send(transport, message):
        if message.asbytes()[:1] == cMSG_CHANNEL_WINDOW_ADJUST:
            told.append(message)
            if len(told) == 3:
                server.stop()
                raise EOFError
        return tell(transport, message)

    monkeypatch.setattr(Transport, "_send_user_message", send)
    yield
    server.stop()
    server.start()


def test_output_of_which_a_piece_is_lost_ends_there(server, dying):
    with connected(server) as board, pytest.raises(DeviceError, match="is lost"):
        board.run(["cat", "/dev/zero"], patience_seconds=60)


def test_a_file_of_which_a_piece_is_lost_is_continued_before_it(server, source, dying, tmp_path):
    source.write_bytes(os.urandom(16 << 20))
    with connected(server) as board, pytest.raises(DeviceError, match="is lost"):
        board.get(source, tmp_path / "back")
    (partial,) = tmp_path.glob(".back.*.partial")
    begun = partial.read_bytes()
    assert begun
    assert source.read_bytes().startswith(begun)
    inode = partial.stat().st_ino
    server.start()
    with connected(server) as board:
        board.get(source, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert (tmp_path / "back").stat().st_ino == inode


def test_a_partial_file_that_is_longer_than_the_file_is_fetched_anew(board, source, tmp_path, monkeypatch):
    target = tmp_path / "back"
    monkeypatch.setattr(Path, "with_name", lambda path, _: path.parent / ".back.partial")
    (tmp_path / ".back.partial").write_bytes(source.read_bytes() + b"more")
    board.get(source, target)
    assert target.read_bytes() == source.read_bytes()


def test_a_partial_file_that_is_wrong_is_fetched_again(board, server, source, tmp_path):
    (server.home / "result2").write_bytes(source.read_bytes())
    back = tmp_path / "back"
    state = (server.home / "result2").stat()
    about = f"board ~/result2\0{state.st_size} {int(state.st_mtime)} {state.st_ino}"
    key = hashlib.sha256(about.encode()).hexdigest()[:16]
    (tmp_path / f".back.{key}.partial").write_bytes(b"x" * 1000)
    board.get(Path("~/result2"), back)
    assert back.read_bytes() == source.read_bytes()
    assert [name for name in names(tmp_path) if name.endswith(".partial")] == []


def test_a_file_that_is_not_there(board, tmp_path):
    with pytest.raises(DeviceError, match="board: ~/nothing could not be fetched: there is no such file"):
        board.get(Path("~/nothing"), tmp_path / "back")
    assert names(tmp_path) == []
