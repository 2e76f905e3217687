"""Processor packages, and their memory where it is counted, by the energy counters of RAPL (Intel, AMD since Zen).

    meter: rapl

It is read from /sys/class/powercap, as the kernel tells it (https://docs.kernel.org/power/powercap/powercap.html):
zones `intel-rapl:N` (also on AMD) called `package-N`, below them `intel-rapl:N:M` called `core`, `uncore` or `dram`.
`energy_uj` counts microjoules and begins again at `max_energy_range_uj`; "Intel RAPL doesn't provide instantaneous
power", so watts are what the counter grew by.  Rails are the packages and their `dram`; cores are part of a package,
and `psys` is another view of the same.  What lies outside the processor (disks, fans, the power supply) is not seen.

Since CVE-2020-8694 root alone may read `energy_uj` (kernel commit 949dd0104c49, "powercap: restrict energy meter to
root access", in Linux 5.10 and in distributions' older ones): from it unprivileged programs inferred keys.  Let only
those groups read it whom you would trust with that.

No accuracy is stated by Intel or AMD: the 5 % here is an assumption.  A counter that starts at 0 again (after a
suspend) looks as if it had wrapped around; a reading that this would make absurd is refused.

Tried on: nothing yet; trees built after the kernel's documentation.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from testbed.errors import MeterError
from testbed.meters import Accuracy, Meter, Reading

_ROOT = "/sys/class/powercap"
_PACKAGE, _MEMORY = "package", "dram"
_GAIN = 0.05
#: What the counter grows by in less says little: it is said to move about every millisecond (unverified).
_SHORTEST_SECONDS = 0.05
#: No processor takes so much: a counter that seems to have grown faster has begun at 0.
_MOST_WATTS = 20_000.0
_clock = time.monotonic  # tests put their own here


class _Zone(NamedTuple):
    rail: str
    counter: Path
    range_joules: float


class _Mark(NamedTuple):
    """What had been counted at one time."""

    seconds: float
    joules: tuple[float, ...]


class RaplMeter(Meter):
    """All packages of the machine; `root` is another folder than /sys/class/powercap."""

    point = "processor"

    def __init__(self, root: str = _ROOT) -> None:
        self._root = Path(root)
        self._zones: list[_Zone] = []
        self._counters: list[float] = []  # as they were read last
        self._last = _Mark(0.0, ())
        self._marks: list[_Mark] = []  # the last two that lie far enough apart

    def open(self) -> None:
        """Find the zones and read their counters; raises MeterError where there are none, or only root may."""
        self._zones = _zones(self._root)
        if not self._zones:
            raise MeterError(
                f"no processor package is counted in {self._root}: this processor has no such counters (Arm boards "
                f"have none), the machine is a virtual one, or the driver is not loaded (modprobe intel_rapl_msr)"
            )
        self._counters = [_joules(zone.counter) for zone in self._zones]
        self._last = _Mark(_clock(), (0.0,) * len(self._zones))
        self._marks = [self._last]
        self.rails = self.total_rails = tuple(zone.rail for zone in self._zones)
        self.has_counters = True
        # Watts are an average since a reading before, and so half a period old.
        self.accuracy = (Accuracy(_GAIN, timing_seconds=self.period_seconds / 2),) * len(self._zones)

    def read(self) -> Reading:
        """Energy since the meter was opened, and power since a reading before; raises MeterError."""
        now = self._last = self._count()
        then = next((mark for mark in reversed(self._marks) if _far(mark, now)), self._marks[0])
        passed = now.seconds - then.seconds
        if passed <= 0:
            raise MeterError("no time has passed since the energy counters were read first; read them again")
        if _far(self._marks[-1], now):
            self._marks = [self._marks[-1], now]
        return Reading(tuple((b - a) / passed for a, b in zip(then.joules, now.joules, strict=True)), now.joules)

    def _count(self) -> _Mark:
        """Read the counters and take their wrap-arounds out; raises MeterError where one began at 0."""
        counters = [_joules(zone.counter) for zone in self._zones]
        seconds = _clock()
        grown = [
            after - before if after >= before else after - before + zone.range_joules
            for zone, before, after in zip(self._zones, self._counters, counters, strict=True)
        ]
        self._counters = counters
        most = _MOST_WATTS * max(seconds - self._last.seconds, _SHORTEST_SECONDS)
        for zone, joules in zip(self._zones, grown, strict=True):
            if not 0 <= joules <= most:
                self._last = _Mark(seconds, self._last.joules)
                self._marks = [self._last]
                raise MeterError(
                    f"the energy counter of {zone.rail} has begun at 0 (a suspend does that); "
                    f"what it counted since the reading before is lost, the next reading is right again"
                )
        return _Mark(seconds, tuple(map(float.__add__, self._last.joules, grown)))


def _far(then: _Mark, now: _Mark) -> bool:
    return now.seconds - then.seconds >= _SHORTEST_SECONDS


def _zones(root: Path) -> list[_Zone]:
    """Packages and their memory, each package before its memory; raises MeterError for one that cannot be read."""
    found = []
    numbers = sorted(
        [int(number) for number in folder.name.split(":")[1:]] for folder in root.glob("intel-rapl:[0-9]*")
    )
    for zone in numbers:
        folder = _folder(root, zone)
        name = _text(folder / "name")
        if len(zone) == 1 and name.startswith(_PACKAGE):
            rail = name
        elif len(zone) == 2 and name == _MEMORY:
            rail = f"{_text(_folder(root, zone[:1]) / 'name')}/{name}"
        else:
            continue
        found.append(_Zone(rail, folder / "energy_uj", _joules(folder / "max_energy_range_uj")))
    return found


def _folder(root: Path, zone: list[int]) -> Path:
    return root / ":".join(["intel-rapl", *map(str, zone)])


def _joules(file: Path) -> float:
    text = _text(file)
    try:
        return int(text) / 1e6
    except ValueError:
        raise MeterError(f"{file}: expected a number of microjoules, got {text!r}") from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except PermissionError:
        raise MeterError(
            f"{file} is read by root alone, since CVE-2020-8694; as root, let the group of the agent's user read it "
            f"(chgrp GROUP {file}; chmod g+r {file}), after every start of the machine"
        ) from None
    except OSError as error:
        raise MeterError(f"{file} cannot be read: {error.strerror}") from None
