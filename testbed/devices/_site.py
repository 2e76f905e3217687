"""Content by way of another device of the same site: once over the thin uplink, then from device to device."""

from __future__ import annotations

import json
import secrets
import select
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import DeviceError
from testbed.node import share

if TYPE_CHECKING:
    import socket

    from testbed.devices._agent_node import AgentNode

_START_SECONDS = 30.0
#: Of a fetch as a whole; one that does not move ends much earlier, by itself.
_FETCH_SECONDS = 6 * 3600.0


class Site:
    """The device that content of its site comes through."""

    def __init__(self, through: AgentNode) -> None:
        self._through = through

    def keep(self, contents: Mapping[str, Path]) -> None:
        """Have the contents (hash → file) on the device they come through; waits for its turn.  Raises DeviceError."""
        self._through.keep(contents)

    def bring(self, to: AgentNode, contents: Mapping[str, Path]) -> int:
        """Have the contents, which are kept, on `to`; the bytes between the two devices.  Raises DeviceError."""
        with self._served() as source:
            count: int = to.on.ask_text(
                share_text(), "fetch", _FETCH_SECONDS, folder=to.place.content, contents=list(contents), **source
            )
        return count

    @contextmanager
    def _served(self) -> Iterator[dict[str, Any]]:
        """{"address", "port", "token"} of a server that lives as long as the channel it was started over."""
        on, token = self._through.on, secrets.token_hex(16)
        channel = on.run_text(share_text(), "serve", self._through.place.content)
        with channel:
            yield {**self._listening(channel, token), "token": token}

    def _listening(self, channel: socket.socket, token: str) -> dict[str, Any]:
        try:
            channel.sendall(json.dumps({"token": token}).encode() + b"\n")
            found: dict[str, Any] = json.loads(self._line(channel))
        except (OSError, ValueError) as error:
            raise self._serves_nobody(str(error)) from None
        return found

    def _line(self, channel: socket.socket) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            piece = channel.recv(4096) if select.select([channel], [], [], _START_SECONDS)[0] else b""
            if not piece:
                raise self._serves_nobody("no answer")
            line += piece
        return line

    def _serves_nobody(self, why: str) -> DeviceError:
        return DeviceError(f"device {self._through.name}: it does not serve the others of its site ({why})")


def share_text() -> str:
    """The program of both ends."""
    return Path(share.__file__).read_text(encoding="utf-8")
