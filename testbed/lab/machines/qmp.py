"""QEMU's own protocol (QMP): one JSON object a line over a Unix socket.

Source: docs/interop/qmp-spec of QEMU.  One client at a time: whoever is done hangs up.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

SOCKET = "qmp.sock"


class QmpError(OSError):
    """QEMU does not answer, or refuses."""


class Qmp:
    """A connection that commands can be sent over."""

    def __init__(self, channel: socket.socket, stream: TextIO) -> None:
        self._channel = channel
        self._stream = stream

    def greet(self) -> None:
        """Hear its greeting, and be ready for commands."""
        self._next()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """What a command returns; raises QmpError."""
        request = {"execute": command, "arguments": arguments} if arguments else {"execute": command}
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = self._next()
            if "error" in answer:
                raise QmpError(f"{command}: {answer['error'].get('desc', answer['error'])}")
            if "return" in answer:
                return answer["return"]

    def wait_for(self, *events: str) -> str:
        """The first of these events that happens from now on; raises QmpError when it takes too long or QEMU ends."""
        while True:
            event = self._next().get("event")
            if event in events:
                return str(event)

    def _next(self) -> dict[str, Any]:
        try:
            line = self._stream.readline()
        except TimeoutError:
            raise QmpError("QEMU does not answer") from None
        if not line:
            raise QmpError("QEMU has hung up")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def connected(folder: Path, patience_seconds: float = 30.0) -> Iterator[Qmp]:
    """To the machine whose socket is in a folder.

    Through /proc, because the path of a Unix socket may have 107 bytes only.  Raises QmpError, or another OSError where
    there is no machine.
    """
    here = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(patience_seconds)
            channel.connect(f"/proc/self/fd/{here}/{SOCKET}")
            with channel.makefile("r", encoding="utf-8") as stream:
                qmp = Qmp(channel, stream)
                qmp.greet()
                yield qmp
    except ConnectionError as error:  # it ends while it is asked
        raise QmpError(f"QEMU does not answer: {error.strerror}") from None
    finally:
        os.close(here)
