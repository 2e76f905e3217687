"""A command's input and output over SSH, as a socket of this machine.

Two threads carry the bytes.  An end of the stream is passed on in its direction only; when the command has ended or
the connection is lost, the socket ends in both.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading

from testbed.ssh.session import CHUNK_BYTES, Session


def as_socket(session: Session, name: str) -> socket.socket:
    """The near end; whoever holds it closes it, and the command is hung up on."""
    near, far = socket.socketpair()
    for end in (near, far):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK_BYTES)
    back = threading.Thread(target=_carry_back, args=(session, far), name=f"ssh-back-{name}", daemon=True)
    there = threading.Thread(target=_carry_there, args=(session, far, back), name=f"ssh-there-{name}", daemon=True)
    back.start()
    there.start()
    return near


def _carry_back(session: Session, far: socket.socket) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more, or the connection is lost
        for piece in session.output():
            far.sendall(piece)
        far.shutdown(socket.SHUT_WR)
        session.channel.status_event.wait()  # it may have closed its output only, and still read
    with contextlib.suppress(OSError):
        far.shutdown(socket.SHUT_RDWR)


def _carry_there(session: Session, far: socket.socket, back: threading.Thread) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with contextlib.suppress(OSError):
        while count := far.recv_into(buffer):
            session.send(buffer[:count])
        session.end_input()
    _wait_for_both_ends(far)
    session.close()
    back.join()
    far.close()


def _wait_for_both_ends(far: socket.socket) -> None:
    """Until the near end is closed (not only in one direction), or the other thread has found the command ended."""
    poll = select.poll()
    poll.register(far, 0)  # a hang-up is always reported
    poll.poll()
