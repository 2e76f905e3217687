"""What joins an SSH channel to an agent's socket: every byte, both ways, and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from testbed.node import attach

MIB = 1 << 20


@pytest.fixture
def listener(tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / attach.SOCKET_FILE))
        listening.listen()
        yield listening


def start(spool, **pipes):
    command = [sys.executable, "-I", "-S", attach.__file__, str(spool)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **pipes)


def echo(listener):
    agent, _ = listener.accept()
    with agent:
        while piece := agent.recv(MIB):
            agent.sendall(piece)


@pytest.mark.parametrize("kind", ["pipes", "a socket"])
def test_bytes_go_there_and_back_and_it_ends_with_its_input(tmp_path, listener, kind):
    sent = os.urandom(5 * MIB + 3)
    thread = threading.Thread(target=echo, args=(listener,))
    thread.start()
    if kind == "pipes":
        with start(tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            out, errors = process.communicate(sent, timeout=60)
    else:  # sshd gives one socket for both
        ours, theirs = socket.socketpair()
        with ours, start(tmp_path, stdin=theirs.fileno(), stdout=theirs.fileno()) as process:
            theirs.close()
            writer = threading.Thread(target=lambda: (ours.sendall(sent), ours.shutdown(socket.SHUT_WR)))
            writer.start()
            with ours.makefile("rb") as back:
                out = back.read()
            writer.join()
            errors = process.stderr.read()
    thread.join()
    assert (out == sent, errors, process.returncode) == (True, b"", 0)


def test_it_ends_when_the_agent_hangs_up_also_while_nothing_comes_in(tmp_path, listener):
    with start(tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        agent, _ = listener.accept()
        agent.sendall(b"superseded")
        agent.close()
        assert process.stdout.read() == b"superseded"
        assert process.wait(60) == 0


def test_without_an_agent_it_says_so(tmp_path):
    with start(tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout.read() == b""
        assert b"no agent listens" in process.stderr.read()
    assert process.returncode == 1


@pytest.mark.parametrize("fails", ["nowhere", "from the start", "in the middle"])
def test_no_byte_is_lost_where_the_kernel_takes_no_splice(tmp_path, monkeypatch, fails):
    sent = os.urandom(3 * MIB)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(sent)
    splice, calls = os.splice, []

    def failing(src, dst, count):
        calls.append(count)
        if fails == "from the start" or (fails == "in the middle" and len(calls) % 2 == 0):
            raise OSError(22, "Invalid argument")
        return splice(src, dst, count)

    monkeypatch.setattr(os, "splice", failing)
    with source.open("rb") as out, target.open("wb") as into:
        attach.copy(out.fileno(), into.fileno())
    assert target.read_bytes() == sent


def test_a_spool_below_the_home_is_found(tmp_path, listener, monkeypatch):
    thread = threading.Thread(target=echo, args=(listener,))
    thread.start()
    environment = {**os.environ, "HOME": str(tmp_path.parent)}
    with start(Path("~") / tmp_path.name, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.communicate(b"here", timeout=60)[0] == b"here"
    thread.join()
