"""The verbs of a connection on the controller's own machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.connection import LocalConnection
from testbed.errors import DeviceError


@pytest.fixture
def connection():
    made = LocalConnection("board")
    yield made
    made.close()


def test_a_command_has_input_output_and_an_end(connection):
    assert connection.run(["cat"], data=b"in") == "in"
    ran = connection.attempt(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (ran.exit_code, ran.output, ran.errors) == (3, "out\n", "err\n")
    assert connection.attempt(["no-such-program"]).exit_code == 127
    with pytest.raises(DeviceError, match=r"board: sh -c 'exit 3': exit code 3"):
        connection.run(["sh", "-c", "exit 3"])
    with pytest.raises(DeviceError, match="board: sleep 60: no end after 0 s"):
        connection.run(["sleep", "60"], 0.05)


def test_the_home_is_meant_at_the_beginning_of_a_word_only(connection, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert connection.run(["echo", "~/x", "a~/x"]) == f"{tmp_path}/x a~/x\n"
    connection.put(Path(__file__), Path("~/there/copy"))
    assert (tmp_path / "there" / "copy").read_text() == Path(__file__).read_text()
    assert connection.missing([Path("~/there/copy"), Path("~/none")]) == [Path("~/none")]


def test_files_appear_whole_or_not_at_all(connection, tmp_path):
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_bytes(bytes(1000))
    assert connection.put(source, target) == 1000
    connection.get(target, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == bytes(1000)
    with pytest.raises(DeviceError, match="none cannot be copied"):
        connection.put(tmp_path / "none", target)
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_channel_is_a_commands_input_and_output(connection):
    with connection.open_channel(["cat"]) as channel:
        channel.sendall(b"to and fro")
        assert channel.recv(100) == b"to and fro"
