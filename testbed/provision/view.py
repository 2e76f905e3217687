"""Provisioning as it is watched, and what is told at its end: in words, or as JSON."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from testbed.provision.batch import text_of
from testbed.provision.visit import CHANGED, DIFFERS, FAILED, INTERRUPTED, READY, REBOOT, Outcome
from testbed.quantities import seconds_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from testbed.provision.step import Change

_REFRESHES_PER_SECOND = 8
_STYLES = {READY: "green", CHANGED: "green", DIFFERS: "yellow", REBOOT: "yellow", FAILED: "red", INTERRUPTED: "red"}
_WAITING = "waiting"


class LiveTable(AbstractContextManager["LiveTable"]):
    """Devices and what each is at, redrawn a few times a second."""

    def __init__(self, console: Console, devices: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live

        self._clock = clock
        self._rows = {device: (_WAITING, "dim", clock()) for device in devices}
        self._ended: dict[str, Outcome] = {}
        self._lock = threading.Lock()
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=_REFRESHES_PER_SECOND)

    def doing(self, device: str, words: str) -> None:
        with self._lock:
            begun = self._rows[device][2] if self._rows[device][0] != _WAITING else self._clock()
            self._rows[device] = (words, "", begun)

    def ended(self, outcome: Outcome) -> None:
        with self._lock:
            self._ended[outcome.device] = outcome

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _draw(self) -> RenderableType:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for heading in ("Device", "Step", "Time"):
            table.add_column(heading, no_wrap=heading != "Step", overflow="ellipsis")
        with self._lock:
            for device in self._rows:
                table.add_row(*self._row(device))
        return table

    def _row(self, device: str) -> list[Text]:
        from rich.text import Text

        words, style, begun = self._rows[device]
        outcome, seconds = self._ended.get(device), self._clock() - begun
        if outcome is not None:
            words, style, seconds = headline(outcome), _STYLES[outcome.status], outcome.seconds
        passed = "" if words == _WAITING else seconds_text(seconds)
        return [Text(device), Text(words, style=style), Text(passed, style="dim")]


class PlainLines(AbstractContextManager["PlainLines"]):
    """A line when a device comes to another step, and one when it is done; for files and pipes."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._at: dict[str, str] = {}
        self._lock = threading.Lock()

    def doing(self, device: str, words: str) -> None:
        step = words.partition(":")[0]
        with self._lock:
            if self._at.get(device) != step:
                self._say(f"{device}: {step} …")
            self._at[device] = step

    def ended(self, outcome: Outcome) -> None:
        with self._lock:
            self._say(f"{outcome.device}: {headline(outcome)}, {seconds_text(outcome.seconds)}")

    def __exit__(self, *_: object) -> None: ...


def headline(outcome: Outcome) -> str:
    """A device's end in one line: `changed: swap, governor`."""
    if outcome.status == FAILED:
        return f"failed: {', '.join(dict.fromkeys(problem.step for problem in outcome.problems))}"
    if outcome.status == REBOOT:
        return f"needs a reboot for {', '.join(outcome.waiting)}"
    if outcome.status in {CHANGED, DIFFERS}:
        verb = "would change" if outcome.status == DIFFERS else "changed"
        return f"{verb}: {', '.join(dict.fromkeys(change.step for change in outcome.changes))}"
    return outcome.status


def told(outcomes: Sequence[Outcome], *, verbose: bool) -> list[str]:
    """The whole of what is to be told, line by line: of each device what differs, then all in one line."""
    return [line for outcome in outcomes for line in _of_one(outcome, verbose=verbose)] + [_summary(outcomes)]


def _of_one(outcome: Outcome, *, verbose: bool) -> list[str]:
    lines = [f"{outcome.device}: {headline(outcome)}"]
    for change in outcome.changes:
        later = " (from the next boot on)" if change.step in outcome.waiting else ""
        lines.append(f"  {change.step}: {change.found} → {change.wanted}{later}")
        if verbose:
            lines += [f"      {text_of(command)}" for command in change.commands]
    lines += [f"  {problem.step}: {problem.text}" for problem in outcome.problems]
    lines += [f"  drifted: {each.what}: {each.was} → {each.now}" for each in outcome.drift]
    lines += [f"  note: {note.step}: {note.text}" for note in outcome.notes]
    if outcome.status == REBOOT:
        lines.append(f"  reboot it, and look again: testbed provision --only {outcome.device} --reboot")
    return lines


def _summary(outcomes: Sequence[Outcome]) -> str:
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    if set(counts) == {READY}:
        return f"{_devices(len(outcomes))} ready; nothing was changed"
    words = {DIFFERS: "would change", REBOOT: "to be rebooted"}
    parts = [f"{count} {words.get(status, status)}" for status, count in counts.items()]
    return f"{_devices(len(outcomes))}: {', '.join(parts)}"


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count != 1)}"


def outcome_data(outcome: Outcome) -> dict[str, Any]:
    """For --json."""
    return {
        "device": outcome.device,
        "status": outcome.status,
        "seconds": round(outcome.seconds, 3),
        "changes": [_change_data(change) for change in outcome.changes],
        "problems": [{"step": problem.step, "text": problem.text} for problem in outcome.problems],
        "notes": [{"step": note.step, "text": note.text} for note in outcome.notes],
        "drift": [asdict(each) for each in outcome.drift],
        "facts": outcome.facts,
    }


def _change_data(change: Change) -> dict[str, Any]:
    return {
        "step": change.step,
        "found": change.found,
        "wanted": change.wanted,
        "commands": [text_of(command) for command in change.commands],
        "needs_reboot": change.needs_reboot,
    }
