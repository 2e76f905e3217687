"""Power samples as a series: of the chosen rails, calibrated, with the stretches that windows cut out of it."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from testbed.measurement import PowerTrace
from testbed.meters import Accuracy

#: Samples come at random times: up to two intervals apart, and what the reading itself takes, without one being lost.
USUAL_GAP = 2.2
#: Windows so near to each other touch: their times have been rounded.
_TOUCHING_SECONDS = 1e-3


class Point(NamedTuple):
    seconds: float
    watts: float


class Stretch(NamedTuple):
    """A window and the samples that tell of it.

    points    the power in the window: its samples, and the power at both edges
    nodes     the samples, with the one before and the one after where there are any
    missing   seconds at either edge that no samples enclose
    """

    begin: float
    end: float
    points: list[Point]
    nodes: list[Point]
    missing: tuple[float, float]

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def samples(self) -> int:
        return len(self.points) - 2

    @property
    def joules(self) -> float:
        return integral(self.points)


class Series(NamedTuple):
    """What is integrated: the samples of the chosen rails, calibrated, with what is known of them."""

    trace: PowerTrace
    rails: list[int]  # where the chosen rails stand
    calibrated: bool
    seconds: list[float]
    points: list[Point]

    @property
    def accuracy(self) -> list[Accuracy]:
        return [Accuracy(*self.trace.accuracy[rail]) for rail in self.rails]

    @property
    def gain(self) -> float:
        """Of the calibration, with which everything was multiplied."""
        return self.trace.calibration.gain if self.calibrated and self.trace.calibration else 1.0

    @property
    def lag_seconds(self) -> float:
        """By how much the samples may be off the job's time."""
        return self.trace.timing_seconds + max((accuracy.timing_seconds for accuracy in self.accuracy), default=0.0)

    @property
    def spacing_seconds(self) -> float:
        """How far apart samples are that tell something new."""
        return max(self.trace.interval_seconds, *(accuracy.timing_seconds for accuracy in self.accuracy))

    def watts(self, seconds: float) -> float:
        """Between two samples on the line between them; outside of all like the nearest."""
        after = bisect_right(self.seconds, seconds)
        if after == 0 or after == len(self.points):
            return self.points[min(after, len(self.points) - 1)].watts
        return between(self.points[after - 1], self.points[after], seconds)

    def stretch(self, begin: float, end: float) -> Stretch:
        """Raises ValueError for a window that ends before it begins."""
        if end < begin:
            raise ValueError(f"a window ends before it begins: {begin} to {end}")
        if not self.points:
            return Stretch(begin, end, [Point(begin, 0.0), Point(end, 0.0)], [], (0.0, 0.0))
        first, last = bisect_left(self.seconds, begin), bisect_right(self.seconds, end)
        inside = self.points[first:last]
        before = bisect_right(self.seconds, begin) - 1
        return Stretch(
            begin,
            end,
            [Point(begin, self.watts(begin)), *inside, Point(end, self.watts(end))],
            self.points[max(0, before) : bisect_left(self.seconds, end) + 1],
            (max(0.0, self.seconds[0] - begin), max(0.0, end - self.seconds[-1])),
        )


def series_of(trace: PowerTrace, rail: str | None) -> Series:
    if rail is not None and rail not in trace.rails:
        raise ValueError(f'meter {trace.meter} has no rail "{rail}"; it has {", ".join(trace.rails)}')
    rails = [trace.rails.index(name) for name in (trace.total_rails if rail is None else (rail,))]
    calibration = trace.calibration if rail is None else None
    gain, offset = (calibration.gain, calibration.offset_watts) if calibration else (1.0, 0.0)
    points = sorted(
        Point(row[0], gain * math.fsum(row[2 + place] for place in rails) + offset) for row in trace.rows if rails
    )
    return Series(trace, rails, calibration is not None, [point.seconds for point in points], points)


def joined(windows: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Windows that touch as one: what is not known of the power at an edge is nothing where the next one begins."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(windows):
        if joined and begin - joined[-1][1] <= _TOUCHING_SECONDS:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def between(a: Point, b: Point, seconds: float) -> float:
    width = b.seconds - a.seconds
    return a.watts + (b.watts - a.watts) * (seconds - a.seconds) / width if width > 0 else b.watts


def integral(points: list[Point]) -> float:
    return math.fsum((a.watts + b.watts) / 2 * (b.seconds - a.seconds) for a, b in pairwise(points))
