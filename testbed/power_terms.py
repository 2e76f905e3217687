"""How well an integral of samples is known: the terms of its interval, and whether the samples show what they measure.

Systematic terms (`class_of`, `quantisation`, `edges`, `lag`) have the same sign in all windows of a meter; `sampling`
is random.  Each is a half-width at 95 %, in joules; docs/energy.md has their formulas and sources.

A claim of 2 % or better is made only where the samples show what they measure: at least 100 of them, levels that stay
for three intervals or more, a meter that is no slower than they are (`why_unresolved`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from testbed.energy import ENOUGH_SAMPLES
from testbed.power_series import USUAL_GAP, Point, Series, Stretch, integral, series_of

#: What is shorter than so many intervals is not resolved.
SHORTEST_FEATURE = 3.0
#: Levels that differ by less than this share of the mean power are one level: what they could hide is less than 2 %.
ONE_LEVEL = 0.04
#: Half-widths of 95 % in standard deviations: 1.96, and a tenth more because the deviation itself is an estimate.
_COVERAGE = 2.2
#: A sensor that lags by more than this share of an interval may hide what the samples would show.
_LARGEST_LAG = 0.25


def class_of(series: Series, stretches: list[Stretch]) -> tuple[float, float, float]:
    """Half-widths by gain and by offset, and by what a calibration left of both.

    A calibration stands in the meter's class' place, in the range that it saw; beyond it, the class counts for what the
    power is beyond.
    """
    seconds = math.fsum(stretch.seconds for stretch in stretches)
    calibration = series.trace.calibration
    if not series.calibrated or calibration is None:
        gain = math.fsum(
            accuracy.gain * abs(_rail_joules(series, stretches, rail))
            for accuracy, rail in zip(series.accuracy, series.rails, strict=True)
        )
        return gain, math.fsum(accuracy.offset_watts for accuracy in series.accuracy) * seconds, 0.0
    joules = math.fsum(stretch.joules for stretch in stretches)
    beyond = math.fsum(
        integral([Point(at, max(calibration.lowest_watts - watts, watts - calibration.highest_watts, 0.0))
                   for at, watts in stretch.points])
        for stretch in stretches
    )  # fmt: skip
    gain = max(accuracy.gain for accuracy in series.accuracy)
    return calibration.reference_gain * abs(joules), 0.0, calibration.residual_watts * seconds + gain * beyond


def _rail_joules(series: Series, stretches: list[Stretch], rail: int) -> float:
    if len(series.rails) == 1:
        return math.fsum(stretch.joules for stretch in stretches)
    alone = series_of(series.trace, series.trace.rails[rail])
    return math.fsum(alone.stretch(stretch.begin, stretch.end).joules for stretch in stretches)


def quantisation(series: Series, stretches: list[Stretch]) -> float:
    """Half a step for as long as the power stays on one level, less the more levels it takes turns with.

    Every level is off by something between −½ and +½ step, always the same: 1.96/√12 step × √Σ(share of the time)².
    """
    parts = []
    rows = sorted(series.trace.rows)
    for accuracy, rail in zip(series.accuracy, series.rails, strict=True):
        step = accuracy.step_watts
        if not step:
            continue
        seconds: Counter[int] = Counter()
        for stretch in stretches:
            for row in rows[bisect_left(series.seconds, stretch.begin) : bisect_right(series.seconds, stretch.end)]:
                seconds[round(row[2 + rail] / step)] += 1
        whole = sum(seconds.values())
        share = math.sqrt(sum((count / whole) ** 2 for count in seconds.values()))
        parts.append(step * min(0.5, 1.96 / math.sqrt(12) * share))
    return abs(series.gain) * math.hypot(*parts) * math.fsum(stretch.seconds for stretch in stretches)


def edges(series: Series, stretches: list[Stretch]) -> float:
    """The power may jump right at an edge, where the line between two samples only slopes; and be unknown beyond."""
    whole = 0.0
    for stretch in stretches:
        first, last = stretch.nodes[:2], stretch.nodes[-2:]
        whole += _jump(first, first[-1].seconds - stretch.begin) + _jump(last, stretch.end - last[0].seconds)
        watts = [point.watts for point in stretch.nodes]
        for seconds in stretch.missing:
            bound = max(watts) - min(watts) if seconds <= series.trace.interval_seconds else max(map(abs, watts))
            whole += seconds * bound
    return whole


def _jump(gap: list[Point], inside: float) -> float:
    """What a jump at the edge is off by, with the part `inside` of a gap in the window: |ΔP| · inside² / (2 · gap)."""
    width = gap[-1].seconds - gap[0].seconds
    return abs(gap[-1].watts - gap[0].watts) * min(inside, width) ** 2 / (2 * width) if width > 0 else 0.0


def lag(series: Series, stretches: list[Stretch]) -> float:
    """Samples that are late bring what was before the window, and lack its end: seconds × |ΔP| at both edges."""
    lag = series.lag_seconds
    if not lag:
        return 0.0
    near = lag + 2 * series.spacing_seconds
    return lag * math.fsum(_range(series, edge, near) for stretch in stretches for edge in (stretch.begin, stretch.end))


def _range(series: Series, seconds: float, near: float) -> float:
    """By how much the power differs around a time; with one sample at least on either side."""
    first = max(0, bisect_left(series.seconds, seconds - near) - 1)
    watts = [point.watts for point in series.points[first : bisect_right(series.seconds, seconds + near) + 1]]
    return max(watts) - min(watts)


def sampling(series: Series, stretches: list[Stretch], samples: int, short: list[Level]) -> float:
    """Half-width of what the times of the samples did, from the differences of neighbours."""
    watts = [point.watts for stretch in stretches for point in stretch.nodes]
    span = max(watts) - min(watts)
    variance = math.fsum(_variance(series, stretch, span) for stretch in stretches)
    # As if two samples more had met the largest of the short levels: an interval around few hits would be too narrow
    # (Agresti and Coull, 1998, on the share of the time that it takes).
    height = max((level.height for level in short), default=0.0)
    variance += 2 * (height * series.spacing_seconds) ** 2
    return _COVERAGE * (1 + 2 / samples) * math.sqrt(variance)


def _variance(series: Series, stretch: Stretch, span: float) -> float:
    """Of the integral of one window.

    A change of ΔP somewhere between two samples a gap apart: ΔP²·gap²/12.  A sample that sticks out from both its
    neighbours was met by chance: −ΔP₁·ΔP₂ × (what it stands for)²; for readings that are independent of each other the
    mean of that is their variance.  Over a gap longer than usual, ΔP is all that was seen.
    """
    nodes = _apart(stretch.nodes, max(accuracy.timing_seconds for accuracy in series.accuracy))
    gaps = [_Gap.of(a, b, stretch, span, USUAL_GAP * series.spacing_seconds) for a, b in pairwise(nodes)]
    chance = (
        max(0.0, -before.difference * after.difference) * ((before.inside + after.inside) / 2) ** 2
        for before, after in pairwise(gaps)
    )
    return math.fsum(gap.variance for gap in gaps) + math.fsum(chance)


class _Gap(NamedTuple):
    """Between two neighbouring samples: the seconds of it in the window, the difference of power, the variance."""

    inside: float
    difference: float
    variance: float

    @classmethod
    def of(cls, a: Point, b: Point, stretch: Stretch, span: float, usual: float) -> _Gap:
        width = b.seconds - a.seconds
        inside = max(0.0, min(b.seconds, stretch.end) - max(a.seconds, stretch.begin))
        difference = b.watts - a.watts
        largest = span if width > usual else abs(difference)
        # Where the change may also lie outside the window, it is not centred: up to 1/3 in place of 1/12.
        share = (4 - 3 * inside / width) / 12 if width > 0 else 0.0
        return cls(inside, difference, share * (largest * inside) ** 2)


def _apart(nodes: list[Point], seconds: float) -> list[Point]:
    """Those that are not the same look of the sensor again."""
    if not seconds or not nodes:
        return nodes
    kept = [nodes[0]]
    for node in nodes[1:]:
        if node.seconds - kept[-1].seconds >= seconds:
            kept.append(node)
    return kept


class Level(NamedTuple):
    """A run of samples that differ by little; `height`: by how much at least it differs from its neighbours."""

    begin: float
    end: float
    lowest: float
    highest: float
    height: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it was at least."""
        return self.end - self.begin


def short_levels(series: Series, stretches: list[Stretch], joules: float) -> list[Level]:
    """Levels that may have been shorter than what samples resolve.

    They are looked for in the whole trace, so that the edge of a window cuts none short; the first and the last, which
    the trace cuts, do not count.
    """
    seconds = math.fsum(stretch.seconds for stretch in stretches)
    alike = ONE_LEVEL * abs(joules) / seconds if seconds else 0.0
    shortest = SHORTEST_FEATURE * series.trace.interval_seconds
    return [
        level
        for level in _levels(series.points, alike)[1:-1]
        if level.seconds < shortest and any(s.begin <= level.end and level.begin <= s.end for s in stretches)
    ]


def _levels(points: list[Point], alike: float) -> list[Level]:
    """A trace as levels.  A single sample on the way up or down is one: it may have been a short stop."""
    runs: list[Level] = []
    for seconds, watts in points:
        if runs:
            last = runs[-1]
            lowest, highest = min(last.lowest, watts), max(last.highest, watts)
            if highest - lowest <= alike:
                runs[-1] = Level(last.begin, seconds, lowest, highest)
                continue
        runs.append(Level(seconds, seconds, watts, watts))
    if len(runs) < 3:
        return runs
    inner = (
        level._replace(height=min(_apart_watts(before, level), _apart_watts(level, after)))
        for before, level, after in zip(runs, runs[1:], runs[2:], strict=False)
    )
    return [runs[0], *inner, runs[-1]]


def _apart_watts(one: Level, other: Level) -> float:
    return max(one.highest - other.lowest, other.highest - one.lowest)


def why_unresolved(series: Series, samples: int, short: list[Level]) -> tuple[str, ...]:
    """Why features may lie between the samples; () where the samples show that they do not."""
    interval = series.trace.interval_seconds
    lag = max(accuracy.timing_seconds for accuracy in series.accuracy)
    reasons = []
    if samples < ENOUGH_SAMPLES:
        reasons.append(f"fewer than {ENOUGH_SAMPLES} samples")
    if lag > _LARGEST_LAG * interval:
        reasons.append(f"a reading may be {lag:g} s old, and one is taken every {interval:g} s")
    if short:
        reasons.append(f"the power changes within {SHORTEST_FEATURE:g} intervals of {interval:g} s")
    return tuple(f"unresolved: {reason}" for reason in reasons)
