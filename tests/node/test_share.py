"""Content from device to device: whole, verified, resumed; nothing without the token, or that was not told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from testbed.assigned import file_hash
from testbed.node import share

MIB = 1 << 20
LACKING = "f" * 64


@pytest.fixture
def there(tmp_path):
    """A folder with one content, and its hash."""
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "draft").write_bytes(os.urandom(2 * MIB))
    name = file_hash(folder / "draft")
    (folder / "draft").rename(folder / name)
    return folder, name


@pytest.fixture
def server(there):
    """A process that serves that content, and one that is not there; it ends well and says nothing more."""
    environment = {**os.environ, "SSH_CONNECTION": "127.0.0.1 5000 127.0.0.1 22"}
    command = [sys.executable, "-I", "-S", share.__file__, "serve", str(there[0])]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        process.stdin.write(json.dumps({"token": "secret", "contents": [there[1], LACKING]}).encode() + b"\n")
        process.stdin.flush()
        yield process
        process.stdin.close()
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"")
        assert process.wait(60) == 0


@pytest.fixture
def source(server):
    """What `fetch` must know of it."""
    return {**json.loads(server.stdout.readline()), "token": "secret"}


def test_a_content_arrives_once(tmp_path, there, source):
    folder, name = there
    here = tmp_path / "here"
    assert share.fetch(str(here), [name], **source) == 2 * MIB
    assert (here / name).read_bytes() == (folder / name).read_bytes()
    assert share.fetch(str(here), [name], **source) == 0
    assert [path.name for path in here.iterdir()] == [name]


def test_what_has_arrived_is_not_sent_again(tmp_path, there, source):
    folder, name = there
    (tmp_path / f".{name}.fetched").write_bytes((folder / name).read_bytes()[:MIB])
    assert share.fetch(str(tmp_path), [name], **source) == MIB


def test_what_has_arrived_wrong_is_thrown_away_and_sent_again(tmp_path, there, source):
    _, name = there
    (tmp_path / f".{name}.fetched").write_bytes(bytes(MIB))
    assert share.fetch(str(tmp_path), [name], **source) == 3 * MIB
    assert file_hash(tmp_path / name) == name


def test_what_is_not_what_its_name_says_is_refused(tmp_path, there, source):
    folder, name = there
    (folder / name).write_bytes(b"bad")
    with pytest.raises(ValueError, match="was to be fetched from"):
        share.fetch(str(tmp_path), [name], **source)
    assert not (tmp_path / name).exists()


def test_many_that_want_the_same_get_it_whole_and_once(tmp_path, there, source):
    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda _: share.fetch(str(tmp_path), [there[1]], **source), range(8)))
    assert sorted(counts) == [0] * 7 + [2 * MIB]
    assert file_hash(tmp_path / there[1]) == there[1]
    assert not (tmp_path / f".{there[1]}.fetched").exists()


def test_nobody_else_is_given_anything(tmp_path, there, source):
    with pytest.raises(ValueError, match="hung up"):
        share.fetch(str(tmp_path / "here"), [there[1]], **{**source, "token": "guess"})
    with pytest.raises(ValueError, match="is not there"):
        share.fetch(str(tmp_path / "here"), [LACKING], **source)


@pytest.mark.parametrize("asked", ["0" * 64, f"../{'0' * 64}", "", ["0" * 64], None])
def test_nothing_is_given_but_what_was_told(there, source, asked):
    """A device's own shards lie in the same folder."""
    folder, _ = there
    for place in (folder, folder.parent):
        (place / ("0" * 64)).write_text("private")
    with socket.create_connection((source["address"], source["port"]), 60) as server:
        server.sendall(json.dumps({"token": source["token"], "content": asked, "offset": 0}).encode() + b"\n")
        assert server.recv(1) == b""


@pytest.mark.parametrize("line", [b"", b"\n", b"[]\n", b"[" * 50_000 + b"\n", b'{"token": "\xff"}\n'])
def test_a_stranger_is_hung_up_on_and_the_others_are_served(tmp_path, there, source, line):
    with socket.create_connection((source["address"], source["port"]), 60) as stranger:
        stranger.sendall(line)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(1) == b""
    assert share.fetch(str(tmp_path / "here"), [there[1]], **source) == 2 * MIB


def test_a_server_ends_with_its_input_also_in_the_middle_of_a_request(server, source):
    with socket.create_connection((source["address"], source["port"]), 60) as client:
        client.sendall(b'{"token": ')
        server.stdin.close()
        assert server.wait(60) == 0
