"""Joins stdin and stdout to an agent's socket, and does nothing else.

    python -I -S testbed/node/attach.py SPOOL

What an SSH channel runs.  Bytes go through the kernel where it lets them (splice), so that an update costs the board
next to nothing.  It ends when the agent hangs up, or when nobody listens any more.  Standard library only, and nothing
of this package: it is run by its path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading

SOCKET_FILE = "agent.sock"
_PIECE_BYTES = 1 << 20


def main(spool: str) -> int:
    """Copy until the agent hangs up; 1 when there is no agent."""
    try:
        agent = _connect(spool)
    except OSError as error:
        print(f"no agent listens in {spool}: {error.strerror}", file=sys.stderr)
        return 1
    threading.Thread(target=_send, args=(agent,), daemon=True).start()
    copy(agent.fileno(), 1)
    return 0


def _connect(spool: str) -> socket.socket:
    """Through /proc, because the path of a Unix socket may have 107 bytes only."""
    here = os.open(os.path.expanduser(spool), os.O_RDONLY | os.O_CLOEXEC)  # noqa: PTH111 -- pathlib would double the start
    agent = socket.socket(socket.AF_UNIX)
    agent.connect(f"/proc/self/fd/{here}/{SOCKET_FILE}")
    os.close(here)
    return agent


def _send(agent: socket.socket) -> None:
    copy(0, agent.fileno())
    with contextlib.suppress(OSError):
        agent.shutdown(socket.SHUT_WR)  # the agent hangs up on that, which ends the other direction too


def copy(source: int, target: int) -> None:
    """Everything from one descriptor to the other, until either has ended."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        try:
            _splice(source, target)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):  # not for such files, or not in this kernel
                raise
            while piece := os.read(source, _PIECE_BYTES):
                _write(target, piece)


def _splice(source: int, target: int) -> None:
    """One end of a splice must be a pipe: ours stands between the two."""
    out, into = os.pipe()
    try:
        while count := os.splice(source, into, _PIECE_BYTES):
            _empty(out, target, count)
    finally:
        os.close(out)
        os.close(into)


def _empty(pipe: int, target: int, count: int) -> None:
    """Pass on what is in the pipe; nothing of it may be lost where the target takes no splice."""
    try:
        while count:
            count -= os.splice(pipe, target, count)
    except OSError as error:
        if error.errno == errno.EINVAL:
            while count:
                piece = os.read(pipe, count)
                _write(target, piece)
                count -= len(piece)
        raise


def _write(target: int, piece: bytes) -> None:
    while piece:
        piece = piece[os.write(target, piece) :]


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # not waiting for a thread that waits for input
