"""Device kinds: one file per kind, named in the inventory by the file's name.

A kind's module has one function, `node(device, settings) -> Node`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from testbed.errors import UsageError

if TYPE_CHECKING:
    import socket

    from testbed.inventory import Device


@dataclass(frozen=True)
class NodeSettings:
    """What an agent is told, beside what the device's own budget says."""

    run: str
    folder: Path  # everything of the run on this device lies below folder / device name
    trainer: str = "testbed.node.trainer"
    capped: bool = True
    orphan_seconds: float = 5.0
    sample_seconds: float = 0.05
    python: str = sys.executable
    code: tuple[str, ...] = ()  # folders with modules that are not installed
    cgroup_parent: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Node(Protocol):
    """A device while our software runs on it."""

    name: str
    spool: Path
    content: Path

    def prepare(self) -> None:
        """Make the folders and write the agent's settings; cleans up after an agent that was killed."""

    def alive(self) -> bool:
        """Whether an agent is at work on the spool."""

    def begin_start(self) -> None:
        """Start an agent, and do not wait for it."""

    def finish_start(self) -> None:
        """Wait until it listens; raises LimitError or DeviceError when it cannot."""

    def attach(self) -> socket.socket:
        """A channel to the living agent; raises OSError when there is none."""

    def wait_gone(self, patience_seconds: float) -> bool:
        """Whether the agent has ended within that time; what it could not remove itself is removed then."""

    def kill(self) -> None:
        """End an agent that does not answer, and remove what it leaves; raises DeviceError when it cannot be ended."""

    def missing(self, hashes: Iterable[str]) -> tuple[str, ...]:
        """Those of the contents that are not on the node."""

    def put_content(self, content: str, path: Path) -> None:
        """Put a content there, under its hash."""


def make_node(device: Device, settings: NodeSettings) -> Node:
    """The node of a device, by its kind; raises UsageError for a kind that has no file."""
    name = f"{__name__}.{device.kind}"
    if device.kind.startswith("_") or not device.kind.isidentifier() or importlib.util.find_spec(name) is None:
        raise UsageError(f"device {device.name}: there is no device kind {device.kind!r} (a file of testbed/devices)")
    node: Node = importlib.import_module(name).node(device, settings)
    return node
