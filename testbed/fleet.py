"""The devices as they are between and beside runs: look at them, read their logs, end what was left, clear away.

Asked in parallel; a device that cannot be reached is an answer, and keeps nobody from the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from testbed.devices._board import folder, other_machine
from testbed.devices._machine import OtherMachine
from testbed.errands import side_by_side
from testbed.errors import TestbedError, UsageError
from testbed.fact_sheets import facts_of

if TYPE_CHECKING:
    from testbed.inventory import Device

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Told:
    """What a device answered, or the error that kept it from answering."""

    device: Device
    answer: Any = None
    error: TestbedError | None = None


class Remote:
    """A device on another machine, asked without our code being there."""

    def __init__(self, device: Device, machine: OtherMachine) -> None:
        self.device = device
        self.folder = folder(device)
        self._machine = machine

    def hang_up(self) -> None:
        """End what is being asked, from another thread."""
        self._machine.close()

    def survey(self) -> Mapping[str, Any]:
        """`testbed.node.landing.survey`."""
        found: Mapping[str, Any] = self._machine.ask_early("survey", folder=self.folder)
        return found

    def read_log(self, run: str, name: str, offset: int) -> Mapping[str, Any]:
        """`testbed.node.landing.read_log`: {"text", "offset"}, or {} where there is no such log."""
        found: Mapping[str, Any] = self._machine.ask_early(
            "read_log", folder=self.folder, run=run, device=self.device.name, name=name, offset=offset
        )
        return found

    def end_agents(self, run: str) -> list[str]:
        """End the agents of a run and let go of the device; the spools they worked on."""
        ended: list[str] = self._machine.ask_early("end_agents", folder=self.folder, run=run)
        return ended

    def bar(self) -> None:
        """Let the controller that holds the device not hold it again."""
        self._machine.ask_early("bar", lock=f"{self.folder}/lock.json")

    def release(self, run: str | None) -> bool:
        """Let go of the device where this run holds it (None: whoever does); whether it did."""
        return bool(self._machine.ask_early("release", lock=f"{self.folder}/lock.json", run=run))

    def tidy(self, runs: Iterable[str] | None, *, contents: bool) -> Mapping[str, Any]:
        """`testbed.node.landing.tidy`."""
        gone: Mapping[str, Any] = self._machine.ask_early(
            "tidy", folder=self.folder, runs=None if runs is None else list(runs), contents=contents
        )
        return gone


@contextmanager
def reached(device: Device) -> Iterator[Remote]:
    """The device, for as long as is needed; raises UsageError for one that is emulated on this machine.

    Another board behind its address than the one that was made ready is asked for nothing: every verb is refused.
    """
    if device.access is None:
        raise UsageError(f"device {device.name} is emulated on this machine: there is no other machine to ask")
    machine = other_machine(device, "", facts_of(device) if device.kind != "emulated" else None)
    try:
        yield Remote(device, machine)
    finally:
        machine.close()


def ask_all(devices: Iterable[Device], question: Callable[[Remote], Answer]) -> list[Told]:
    """Ask every device that is on another machine; the answers stand in the devices' order."""
    remotes: list[Remote] = []

    def ask(device: Device) -> Told:
        try:
            with reached(device) as remote:
                remotes.append(remote)
                return Told(device, question(remote))
        except TestbedError as error:
            return Told(device, error=error)

    def hang_up() -> None:
        for remote in remotes:
            remote.hang_up()

    return side_by_side(ask, [device for device in devices if device.access is not None], hang_up)


def local_spool(run: Path, device: str) -> Path:
    """Where a device that is emulated on this machine has its spool of a run."""
    return run / "nodes" / device / "spool"
