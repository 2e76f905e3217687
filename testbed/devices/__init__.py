"""Device kinds: one file per kind, named in the inventory by the file's name.

A kind's module has one function, `node(device, settings) -> Node`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from testbed.errors import UsageError

if TYPE_CHECKING:
    import socket

    from testbed.code_wheel import CodeWheel
    from testbed.devices._site import Site
    from testbed.inventory import Device


@dataclass(frozen=True)
class NodeSettings:
    """What an agent is told, beside what the device's own budget says; None: the device's kind decides."""

    run: str
    folder: Path  # on this machine, everything of the run lies below folder / device name
    trainer: str = "testbed.node.trainer"
    capped: bool = True
    orphan_seconds: float | None = None  # … without contact, after which an agent ends
    reconnect_seconds: float | None = None  # … for which contact that was lost is looked for again
    sample_seconds: float = 0.05
    power_seconds: float = 0.1  # between power samples, where the meter is as fast
    root: str = "/"  # where the board's own files begin that tell of its sensors and its accelerator
    power_cycle: bool = False  # a device that hangs is switched off and on, where it has a switch
    telemetry_seconds: float | None = None  # between words of how the node stands; None: nobody watches
    python: str = sys.executable  # of this machine
    code: tuple[str, ...] = ()  # folders with modules that are not installed
    wheel: CodeWheel | None = None  # our code, for other machines
    cgroup_parent: Path | None = None
    slowed: frozenset[str] = frozenset()  # devices whose processor may be held back, as the run declares
    environment: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # device → its fact sheet
    private: frozenset[str] = frozenset()  # contents that go to their device directly, whatever `via` says: shards
    others: tuple[Device, ...] = ()  # devices that do not take part; content may come through them


class Node(Protocol):
    """A device while our software runs on it.  Whatever may wait is called by one thread at a time."""

    name: str
    machine: str  # nodes of one machine share its cores and memory; "" is the controller's own
    reconnect_seconds: float
    silence_seconds: float  # after a ping, without an answer, until the link counts as dead
    deployed_bytes: int  # so far: code, blocks and shards
    site: Site | None  # what many devices are sent comes this way
    power_cycle: Callable[[], None] | None  # switches the device off and on; None: it has no switch, or may not

    def hold(self) -> None:
        """Be connected, and hold the device for the run.

        Raises LockedError when another run holds it, BoardError when it is another board than the one that was made
        ready, HostKeyError or RightError, DeviceError when it is out of reach.
        """

    def try_meters(self) -> None:
        """Open the meters that are read on the device once; raises MeterError where one cannot be read."""

    def reach(self, contents: Mapping[str, Path]) -> socket.socket:
        """A channel to an agent on the run's spool, started where none lives, with the contents (hash → file) there.

        Raises what `hold` raises, and LimitError when memory cannot be capped there.
        """

    def holds(self, contents: Iterable[str]) -> bool:
        """Whether the contents are known to be there; asks nobody."""

    def deploy(self, contents: Mapping[str, Path]) -> None:
        """Make the contents present."""

    def forget(self) -> None:
        """What was known to be there may not be so any more."""

    def kill(self) -> None:
        """End an agent that does not answer, and remove what it leaves; raises DeviceError when it cannot be ended."""

    def leave(self, patience_seconds: float) -> None:
        """Tell an agent to stop, end it if it does not; let go of the device, and hang up."""

    def hang_up(self) -> None:
        """Let go of a connection that has broken; the next verb makes a new one."""


def make_node(device: Device, settings: NodeSettings) -> Node:
    """The node of a device, by its kind; raises UsageError for a kind that has no file."""
    name = f"{__name__}.{device.kind}"
    if device.kind.startswith("_") or not device.kind.isidentifier() or importlib.util.find_spec(name) is None:
        raise UsageError(f"device {device.name}: there is no device kind {device.kind!r} (a file of testbed/devices)")
    node: Node = importlib.import_module(name).node(device, settings)
    return node
