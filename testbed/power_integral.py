"""From power samples to an energy: the trapezoid rule over windows, with interval, verdict and the meter's counter.

Power is integrated on the samples' monotonic stamps, clipped to the windows by interpolation.  The benchmark
`benchmarks/energy_integration.py` holds the result against waveforms whose energy is known.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from testbed.energy import UNRESOLVED, Energy
from testbed.measurement import PowerTrace
from testbed.power_series import USUAL_GAP, Point, Series, Stretch, between, joined, series_of
from testbed.power_terms import class_of, edges, lag, quantisation, sampling, short_levels, why_unresolved

#: Fewer samples say nothing about how far they are off: no verdict but "too few".
LEAST_SAMPLES = 10
#: A gap is longer than so many intervals.
LONGEST_GAP = 3.0
#: A wall clock that moves by more between two samples was set, not slewed (chrony slews by 83,333 ppm at most).
_CLOCK_STEP_SECONDS, _SLEW = 0.05, 0.0834


def gross(trace: PowerTrace, windows: Sequence[tuple[float, float]], rail: str | None = None) -> Energy:
    """Energy in some windows of a trace (seconds, as its rows count them; no two overlap).

    Of one rail, as it was read; or, without one, of the whole: the sum of the trace's `total_rails`, calibrated where
    the trace brings a calibration.  Raises ValueError for a rail that is not there and for a window that ends before it
    begins.
    """
    series = series_of(trace, rail)
    energy = _blank(trace, windows, series)
    if not series.rails:
        return _impossible(
            energy,
            f"no rail, nor a sum of rails, is the whole at {trace.point}; only its rails can be told "
            f"({', '.join(trace.rails) or 'it has none'})",
        )
    if not windows:
        return _impossible(energy, "there is no window")
    sampled = math.fsum(series.stretch(*window).joules for window in windows)
    stretches = [series.stretch(*window) for window in joined(windows)]
    if not (samples := sum(stretch.samples for stretch in stretches)):
        return _impossible(energy, f"no sample in {energy.seconds:.1f} s")
    energy = _measured(series, stretches, replace(energy, joules=sampled, sampled_joules=sampled, samples=samples))
    return _with_counter(series, windows, energy) if trace.counters else energy


def _blank(trace: PowerTrace, windows: Sequence[tuple[float, float]], series: Series) -> Energy:
    return Energy(
        joules=None,
        seconds=math.fsum(end - begin for begin, end in windows),
        point=trace.calibration.point if series.calibrated and trace.calibration else trace.point,
        meter=trace.meter,
        replayed=trace.replayed,
    )


def _impossible(energy: Energy, problem: str) -> Energy:
    return replace(energy, problems=(problem,))


def _measured(series: Series, stretches: list[Stretch], energy: Energy) -> Energy:
    """Fill in how well the samples say it."""
    sampled = energy.sampled_joules or 0.0
    short = short_levels(series, stretches, sampled)
    notes = why_unresolved(series, energy.samples, short)
    gain, offset, left = class_of(series, stretches)
    other = math.hypot(left, quantisation(series, stretches), edges(series, stretches), lag(series, stretches))
    return replace(
        energy,
        gain_joules=gain,
        offset_joules=offset,
        other_joules=other,
        random_joules=sampling(series, stretches, energy.samples, short),
        unresolved_joules=sampled if notes else 0.0,
        notes=notes,
        longest_gap_seconds=max(_longest_gap(stretch) for stretch in stretches),
        highest_watts=max(point.watts for stretch in stretches for point in stretch.points[1:-1] or stretch.points),
        problems=tuple(_problems(series, stretches, energy)),
    )


def _problems(series: Series, stretches: list[Stretch], energy: Energy) -> list[str]:
    trace = series.trace
    found = []
    if energy.samples < LEAST_SAMPLES:
        found.append(
            f"{energy.samples} samples in {energy.seconds:.1f} s, at least {LEAST_SAMPLES} are needed: longer jobs, or "
            f"a shorter interval than {trace.interval_seconds:g} s"
        )
    longest = max(_longest_gap(stretch) for stretch in stretches)
    if longest > LONGEST_GAP * trace.interval_seconds:
        found.append(f"no sample for {longest:.1f} s, where one was to come every {trace.interval_seconds:g} s")
    missing = max(max(stretch.missing) for stretch in stretches)
    if missing > trace.interval_seconds:
        found.append(f"{missing:.1f} s at the edge of a window lie before the first sample or after the last")
    if stepped := _clock_step(trace, stretches):
        found.append(f"the wall clock moved by {stepped:+.2f} s against the monotonic one")
    if series.calibrated and (outside := _outside(trace, energy)):
        found.append(outside)
    return found


def _longest_gap(stretch: Stretch) -> float:
    """Between neighbouring samples, as far as it lies in the window."""
    times = [stretch.begin, *(point.seconds for point in stretch.points[1:-1]), stretch.end]
    return max(b - a for a, b in pairwise(times))


def _clock_step(trace: PowerTrace, stretches: list[Stretch]) -> float | None:
    """By how much the wall clock was set; None: not at all.

    One row that stands apart is a reader that was held up between the two clocks, not a clock that was set.  Where the
    samples' clock is another one than the job's, every movement beyond what is known of it counts.
    """
    begin = min(stretch.begin for stretch in stretches) - trace.interval_seconds
    end = max(stretch.end for stretch in stretches) + trace.interval_seconds
    rows = sorted(row[:2] for row in trace.rows if begin <= row[0] <= end)
    moved = [
        (b[0], sorted((a[1], b[1], c[1]))[1])  # the median of three
        for a, b, c in zip(rows, rows[1:], rows[2:], strict=False)
    ]
    for (at, before), (later, after) in pairwise(moved):
        if abs(after - before) > _CLOCK_STEP_SECONDS + _SLEW * (later - at):
            return after - before
    movements = [by for _, by in moved] or [0.0]
    whole = max(movements) - min(movements)
    return whole if trace.timing_seconds and whole > max(trace.timing_seconds, _CLOCK_STEP_SECONDS) else None


def _outside(trace: PowerTrace, energy: Energy) -> str | None:
    calibration, mean = trace.calibration, energy.mean_watts
    if calibration is None or mean is None or calibration.lowest_watts <= mean <= calibration.highest_watts:
        return None
    return (
        f"{mean:.1f} W in the mean, where the calibration saw {calibration.lowest_watts:.1f} to "
        f"{calibration.highest_watts:.1f} W: calibrate again under this load"
    )


def _with_counter(series: Series, windows: Sequence[tuple[float, float]], energy: Energy) -> Energy:
    """Hold the samples against the meter's energy counter; take its word where both agree and it is better."""
    counter = _Counter.of(series)
    if counter.fell:
        return replace(
            energy, problems=(*energy.problems, "its energy counter went back: it was reset, or has lost power")
        )
    joules = math.fsum(counter.at(end) - counter.at(begin) for begin, end in windows)
    half_width = counter.half_width(joined(windows))
    energy = replace(energy, counter_joules=joules)
    apart = abs(joules - (energy.sampled_joules or 0.0))
    if apart > 2 * math.hypot(half_width, energy.random_joules, energy.other_joules):
        problem = f"its energy counter says {joules:.1f} J and its samples {energy.sampled_joules:.1f} J"
        return replace(energy, problems=(*energy.problems, problem))
    if half_width > UNRESOLVED * abs(joules):
        return energy  # it is too coarse to say that they agree
    energy = replace(energy, unresolved_joules=0.0, notes=())
    return replace(energy, joules=joules, random_joules=half_width) if half_width < energy.random_joules else energy


class _Counter(NamedTuple):
    """What the chosen rails' energy counters had grown to, calibrated."""

    points: list[Point]  # joules in place of watts
    fell: bool
    usual_gap: float

    @classmethod
    def of(cls, series: Series) -> _Counter:
        calibration = series.trace.calibration if series.calibrated else None
        first = 2 + len(series.trace.rails)
        rows = sorted(series.trace.rows)
        sums = [math.fsum(row[first + rail] for rail in series.rails) for row in rows]
        fell = any(b[first + rail] < a[first + rail] for a, b in pairwise(rows) for rail in series.rails)
        offset = calibration.offset_watts if calibration else 0.0
        points = [Point(row[0], series.gain * joules + offset * row[0]) for row, joules in zip(rows, sums, strict=True)]
        return cls(points, fell, USUAL_GAP * series.spacing_seconds)

    def at(self, seconds: float) -> float:
        return between(*self.around(seconds), seconds)

    def around(self, seconds: float) -> tuple[Point, Point]:
        """The samples before and after a time; outside of all the two nearest."""
        after = min(max(1, bisect_right(self.points, seconds, key=lambda point: point.seconds)), len(self.points) - 1)
        return self.points[after - 1], self.points[after]

    def half_width(self, windows: list[tuple[float, float]]) -> float:
        """At either edge the counter is behind by something between nothing and what it grows by at once.

        The difference of two such is a triangle of ± that; 95 % of it lies within 0.78 of its half-width.
        """
        gaps = [(a, b) for a, b in pairwise(self.points) if b.seconds - a.seconds <= self.usual_gap]
        gaps += [self.around(edge) for window in windows for edge in window]
        return 0.78 * max(b.watts - a.watts for a, b in gaps) * math.sqrt(len(windows))
