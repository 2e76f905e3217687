"""Takes power samples at jittered times, in a thread of its own, for as long as somebody wants them.

    sampler = Sampler(meter, PowerLog(path, columns(meter)), interval_seconds=0.1)
    sampler.start()
    sampler.sample()                    # one more at once, at the edge of a window
    sampler.trace(begin, end)           # the rows of a window of the monotonic clock, and what is known of the meter
    sampler.stop()

Jitter keeps the samples from falling into step with what they measure: one sample at a random time around every tick of
a grid.  A reading is stamped with the middle of the time that it took.  What is integrated here (`joules`) is for
watching; a figure comes from the rows, by `testbed.power_integral`.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from testbed.errors import MeterError
from testbed.meters._power_log import CLOCK_OFFSET, FIRST_RAIL, SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.meters import Meter
    from testbed.meters._power_log import PowerLog, Row

#: A sample lies at most so far from its tick, in intervals.  With a half no moment is left out, and what repeats itself
#: as fast as the samples do comes out right in the mean; gaps are then up to two intervals.
_JITTER = 0.5
#: A meter's own stamp that comes again has moved by the jitter between its clock and ours.
_SAME_SECONDS = 1e-3
#: Between samples farther apart than this, in intervals, nothing is known: nothing is added to the live counter.
LONGEST_GAP = 3.0


def columns(meter: Meter) -> int:
    """How many numbers a row of an open meter has."""
    return FIRST_RAIL + len(meter.rails) * (2 if meter.has_counters else 1)


class Sampler:
    """Samples one open meter into one log.  `clock`, `wall` and `wait` are given by tests and benchmarks only."""

    def __init__(
        self,
        meter: Meter,
        log: PowerLog,
        interval_seconds: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        wait: Callable[[float], bool] | None = None,
        chance: Callable[[], float] = lambda: os.urandom(1)[0] / 255,
    ) -> None:
        self.meter = meter
        self.interval_seconds = max(meter.period_seconds, interval_seconds or 0.0)
        self.failures = 0
        self.error: str | None = None  # why the last reading failed; None: it did not
        self.watts: tuple[float, ...] | None = None  # the last reading
        self.joules = [0.0] * len(meter.rails)
        self._log = log
        self._clock, self._wall, self._chance = clock, wall, chance
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._lock = threading.Lock()
        self._last: Row | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to sample in a thread."""
        self._thread = threading.Thread(target=self.run, name="power", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and close log and meter."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self._log.close()
        self.meter.close()

    def run(self) -> None:
        """Sample until stopped: `wait` says so by True."""
        begun = self._clock()
        tick = 0
        while True:
            due = begun + (tick + _JITTER * (2 * self._chance() - 1)) * self.interval_seconds
            if self._wait(max(0.0, due - self._clock())):
                return
            self.sample()
            # Ticks that went by while a reading took its time are left out, not made up for.
            tick = max(tick + 1, int((self._clock() - begun) / self.interval_seconds) + 1)

    def sample(self) -> None:
        """Take one sample now; one that fails is counted, and leaves a gap."""
        with self._lock:
            before = self._clock()
            try:
                reading = self.meter.read()
            except (MeterError, OSError, ValueError) as error:  # a meter of somebody else's must not end the sampling
                self.failures += 1
                self.error = str(error)
                return
            after = self._clock()
            at = (before + after) / 2
            offset = self._wall() - after
            same = 0.0
            if reading.unix_seconds is not None:
                at, same = reading.unix_seconds - offset, _SAME_SECONDS
            if self._last is not None and at <= self._last[SECONDS] + same:
                self.error = None
                return  # a meter that has nothing new
            row = (at, offset, *reading.watts, *(reading.joules or ()))
            try:
                self._log.append(row)
            except OSError as error:
                self.failures += 1
                self.error = f"the sample cannot be kept: {error.strerror}"
                return
            self._add(row, reading.watts)
            self.error, self.watts, self._last = None, reading.watts, row

    def trace(self, begin: float, end: float) -> dict[str, Any]:
        """A window in the JSON form of `testbed.measurement.PowerTrace`, its times counted from `begin`."""
        with self._lock:
            rows = self._log.rows(begin, end)
        return {
            **described(self.meter),
            "interval_seconds": self.interval_seconds,
            "rows": [_told(row, begin, rows[0], len(self.meter.rails)) for row in rows],
        }

    def _add(self, row: Row, watts: tuple[float, ...]) -> None:
        """By the trapezoid rule, as the figures are."""
        last = self._last
        if last is None or row[SECONDS] - last[SECONDS] > LONGEST_GAP * self.interval_seconds:
            return
        for rail, power in enumerate(watts):
            self.joules[rail] += (power + last[FIRST_RAIL + rail]) / 2 * (row[SECONDS] - last[SECONDS])


def described(meter: Meter) -> dict[str, Any]:
    """What is known of an open meter, as it stands beside its samples."""
    return {
        "meter": type(meter).__module__.rpartition(".")[2],
        "point": meter.point,
        "rails": list(meter.rails),
        "total_rails": list(meter.total_rails),
        "accuracy": [list(accuracy) for accuracy in meter.accuracy],
        "replayed": meter.replayed,
    }


def _told(row: Row, begin: float, first: Row, rails: int) -> list[float]:
    """A row as it travels, in tenths of a millisecond, a milliwatt and a millijoule.

    The clock is told by how far the wall clock has moved since the first row, counters by how much they have grown.
    """
    watts, joules = row[FIRST_RAIL : FIRST_RAIL + rails], row[FIRST_RAIL + rails :]
    grown = (now - then for now, then in zip(joules, first[FIRST_RAIL + rails :], strict=True))
    moved = row[CLOCK_OFFSET] - first[CLOCK_OFFSET]
    return [round(value, 4) for value in (row[SECONDS] - begin, moved, *watts, *grown)]
