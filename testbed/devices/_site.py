"""Content by way of another device of the same site: once over the thin uplink, then from device to device."""

from __future__ import annotations

import json
import secrets
import select
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import DeviceError
from testbed.node import share

if TYPE_CHECKING:
    import socket

    from testbed.devices._agent_node import AgentNode
    from testbed.devices._machine import Machine

_START_SECONDS = 30.0
#: Of a fetch as a whole; one that does not move ends much earlier, by itself.
_FETCH_SECONDS = 6 * 3600.0


class Site:
    """The device that content of its site comes through, in a run."""

    def __init__(self, through: AgentNode) -> None:
        self._through = through

    def keep(self, contents: Mapping[str, Path]) -> None:
        """Have the contents (hash → file) on the device they come through; waits for its turn.  Raises DeviceError."""
        self._through.keep(contents)

    def bring(self, to: AgentNode, contents: Mapping[str, Path]) -> int:
        """Have the contents, which are kept, on `to`; the bytes between the two devices.  Raises DeviceError."""
        return carry(_side(self._through), _side(to), contents)


def _side(node: AgentNode) -> Side:
    return Side(node.name, node.on, node.place.content)


@dataclass(frozen=True)
class Side:
    """Where contents lie: a device's machine, with an interpreter of any Python ≥ 3.10, and a folder there."""

    name: str
    on: Machine
    content: str


def carry(source: Side, target: Side, contents: Collection[str]) -> int:
    """Have contents of one device on another, which fetches them; the bytes that travelled.  Raises DeviceError."""
    with _served(source, contents) as server:
        count: int = target.on.ask_text(
            share_text(), "fetch", _FETCH_SECONDS, folder=target.content, contents=list(contents), **server
        )
    return count


@contextmanager
def _served(source: Side, contents: Collection[str]) -> Iterator[dict[str, Any]]:
    """{"address", "port", "token"} of a server of these contents; it lives as long as its channel."""
    token = secrets.token_hex(16)
    with source.on.run_text(share_text(), "serve", source.content) as channel:
        try:
            channel.sendall(json.dumps({"token": token, "contents": list(contents)}).encode() + b"\n")
            found: dict[str, Any] = json.loads(_line(channel))
        except (OSError, ValueError) as error:
            raise DeviceError(f"device {source.name}: it does not serve the others of its site ({error})") from None
        yield {**found, "token": token}


def _line(channel: socket.socket) -> bytes:
    """The first line that a channel says; raises OSError where it ends or is silent before that."""
    line = b""
    while not line.endswith(b"\n"):
        piece = channel.recv(4096) if select.select([channel], [], [], _START_SECONDS)[0] else b""
        if not piece:
            raise TimeoutError("no answer")
        line += piece
    return line


def share_text() -> str:
    """The program of both ends."""
    return Path(share.__file__).read_text(encoding="utf-8")
