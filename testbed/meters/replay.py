"""A recorded trace, played through the interface of a real meter: for rehearsals on emulated devices.

    meter:
      replay: {trace: jetson_orin_nano, repeat: true}     # packaged: a file of inventory/traces
      replay: {file: recordings/orin-7.csv}               # one's own, relative to the inventory

The joules that come of it were not spent here, and say nothing about any board: a report prints them as replayed.

A trace is a CSV file.  Its rails are found by the names of their columns, in watts; what is known of them stands in
comments:

    # point: module_rail
    # total_rails: VDD_IN
    # interval_seconds: 0.1
    # gain: 0.02
    # step_watts: 0.04
    # source: a board and a meter
    seconds,VDD_IN,VDD_SOC
    0.0,4.52,1.51

`point` and `total_rails` are a meter's (default: module_rail, and no rails), `gain`, `offset_watts`, `step_watts` and
`timing_seconds` those of `Accuracy` (default: gain 0.05, an assumption).  Pauses longer than three `interval_seconds`
stay gaps.  All other comments are for people.

The samples that a run keeps of a job (columns `VDD_IN_watts`, `VDD_IN_joules`, `clock_seconds`) are traces too.
Between two rows it is a straight line; the first row is played when the meter is opened.

Tried on: the packaged traces, which are synthetic.
"""

from __future__ import annotations

import math
import time
from array import array
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import MeterError, UsageError
from testbed.meters import POINTS, Accuracy, Meter, Reading
from testbed.meters._sampler import LONGEST_GAP

if TYPE_CHECKING:
    from collections.abc import Iterable

_SECONDS, _CLOCK = "seconds", "clock_seconds"
_WATTS, _JOULES = "_watts", "_joules"
_GAIN = 0.05
_clock = time.monotonic  # tests put their own here


class ReplayMeter(Meter):
    """Plays `file`, or the packaged `trace` of that name; at its end from the start again if it may `repeat`."""

    replayed = True

    def __init__(self, file: str | None = None, trace: str | None = None, *, repeat: bool = False) -> None:
        if (file is None) == (trace is None):
            raise ValueError('it plays either a file or a packaged trace: "file: recording.csv" or "trace: NAME"')
        self._file, self._trace, self._repeat = file, trace, repeat
        self._seconds: array[float] = array("d")
        self._columns: list[array[float]] = []
        self._longest_gap = math.inf
        self._opened = 0.0

    def open(self) -> None:
        """Read the trace and begin to play it; raises MeterError when it is not on this machine, or is none."""
        path = Path(self._file) if self._file is not None else _packaged(str(self._trace))
        try:
            # As lines: a recording of hours is larger than what an agent may hold.
            with path.open(encoding="utf-8") as lines:
                self._load(path, lines)
        except FileNotFoundError:
            raise MeterError(
                f"the trace {path} is not on this machine, and a replayed meter is read where the agent runs; "
                f"put the file there, at the same path"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise MeterError(f"the trace {path} cannot be read: {error}") from None
        self._opened = _clock()

    def read(self) -> Reading:
        """The power at this moment of the recording; raises MeterError in its gaps, and beyond its end."""
        first, last = self._seconds[0], self._seconds[-1]
        played = _clock() - self._opened
        if self._repeat:
            played %= last - first
        elif played > last - first:
            raise MeterError(f"the trace ended after {last - first:g} s; set `repeat: true` to play it again and again")
        at = first + played
        after = min(bisect_right(self._seconds, at), len(self._seconds) - 1)
        gap = self._seconds[after] - self._seconds[after - 1]
        if gap > self._longest_gap:
            raise MeterError(f"the trace has a gap of {gap:g} s here, where nothing was recorded")
        share = (at - self._seconds[after - 1]) / gap
        return Reading(tuple(column[after - 1] * (1 - share) + column[after] * share for column in self._columns))

    def _load(self, path: Path, lines: Iterable[str]) -> None:
        """Settings from the comments, rails from the header, and the rows."""
        known: dict[str, str] = {}
        names: list[str] = []
        chosen: dict[str, int] = {}
        self._seconds, self._columns = array("d"), []
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if text.startswith("#"):
                key, _, value = text[1:].partition(":")
                known[key.strip()] = value.strip()
            elif text and not names:
                names = [name.strip() for name in text.split(",")]
                chosen = _rails(path, names)
                self._columns = [array("d") for _ in chosen]
            elif text:
                self._add(f"{path}, line {number}", names, chosen, text)
        if len(self._seconds) < 2:
            raise MeterError(f"{path} is no trace: there are fewer than two rows below a header (seconds,RAIL,…)")
        self._describe(path, known, tuple(chosen))

    def _add(self, where: str, names: list[str], chosen: dict[str, int], text: str) -> None:
        cells = text.split(",")
        try:
            at = float(cells[names.index(_SECONDS)])
            values = [float(cells[column]) for column in chosen.values()]
        except (ValueError, IndexError):
            raise MeterError(f"{where}: expected {len(names)} numbers ({','.join(names)}), got {text!r}") from None
        if not all(map(math.isfinite, (at, *values))) or (self._seconds and at <= self._seconds[-1]):
            raise MeterError(f"{where}: expected finite numbers at growing times, got {text!r}")
        self._seconds.append(at)
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)

    def _describe(self, path: Path, known: dict[str, str], rails: tuple[str, ...]) -> None:
        self.rails = rails
        self.total_rails = tuple(known.get("total_rails", "").split())
        self.point = known.get("point", type(self).point)
        if self.point not in POINTS:
            raise MeterError(f"{path}: point: expected one of {', '.join(POINTS)}, got {self.point!r}")
        if unknown := [rail for rail in self.total_rails if rail not in rails]:
            raise MeterError(f"{path}: total_rails: there is no rail {unknown[0]!r}; there are {', '.join(rails)}")
        figures = {name: _number(path, known, name) for name in Accuracy._fields}
        stated = {name: value for name, value in figures.items() if value is not None}
        self.accuracy = (Accuracy(**{"gain": _GAIN, **stated}),) * len(rails)
        interval = _number(path, known, "interval_seconds")
        self._longest_gap = math.inf if interval is None else LONGEST_GAP * interval


def _packaged(name: str) -> Path:
    """A file of inventory/traces, in the installed package or beside it; raises MeterError."""
    from testbed.package_data import data_folder

    try:
        folder = data_folder("inventory") / "traces"
    except UsageError:
        raise MeterError(
            f'the packaged trace "{name}" is not on this machine: a device gets our code without the inventory; '
            f"put the trace there, and name it with `file:`"
        ) from None
    path = folder / f"{name}.csv"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.csv")))
        raise MeterError(f'there is no packaged trace "{name}"; there are: {there or "none"}')
    return path


def _rails(path: Path, names: list[str]) -> dict[str, int]:
    """Rail → its column: those that say they are in watts, else all that are neither a time nor joules."""
    stated = {name.removesuffix(_WATTS): column for column, name in enumerate(names) if name.endswith(_WATTS)}
    others = {
        name: column
        for column, name in enumerate(names)
        if name not in {_SECONDS, _CLOCK} and not name.endswith(_JOULES)
    }
    if _SECONDS not in names or not others or len(set(names)) < len(names):
        raise MeterError(f"{path}: expected a header such as seconds,VDD_IN,VDD_SOC, got {','.join(names)!r}")
    return stated or others


def _number(path: Path, known: dict[str, str], key: str) -> float | None:
    """What a comment states, or None; raises MeterError for what is no number from 0 up."""
    if key not in known:
        return None
    try:
        value = float(known[key])
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise MeterError(f"{path}: {key}: expected a number from 0 up, got {known[key]!r}")
    return value
