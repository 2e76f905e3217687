"""Energy from power samples, with an interval at 95 % and a verdict.  Standard library only, pure functions.

    energy = gross(trace, [(begin, end)])           # joules, half-widths, problems
    added([energy, …])                              # jobs, or phases, of one device and meter
    across([energy, …])                             # devices
    net(energy, idle_power(before, after))          # less what the device takes anyway
    with_conditions(energy, [conditions, …])        # throttled, or begun too hot: not valid

Power is integrated by the trapezoid rule on the samples' monotonic stamps, clipped to the windows by interpolation.
How every half-width comes about, and from which source, stands in docs/energy.md; the benchmark
`benchmarks/energy_integration.py` holds them against waveforms whose energy is known.

A claim of 2 % or better is made only where the samples show what they measure: at least 100 of them, levels that stay
for three intervals or more, a meter that is no slower than they are.  Otherwise the half-width is never less than
`UNRESOLVED` of the energy, however often such energies are added, unless the meter's own energy counter agrees.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from testbed.measurement import Conditions, PowerTrace
from testbed.meters import Accuracy

#: Fewer samples say nothing about how far they are off: no verdict but "too few".
LEAST_SAMPLES = 10
#: From so many on, a feature that none of them met takes less than 3 % of the time (rule of three, 95 %).
ENOUGH_SAMPLES = 100
#: A gap is longer than so many intervals.
LONGEST_GAP = 3.0
#: What is shorter than so many intervals is not resolved.
SHORTEST_FEATURE = 3.0
#: Levels that differ by less than this share of the mean power are one level: what they could hide is less than 2 %.
ONE_LEVEL = 0.04
#: The least half-width, as a share of the energy, where features may lie between the samples.
UNRESOLVED = 0.025
#: A wall clock that moves by more between two samples was set, not slewed (chrony slews by 83,333 ppm at most).
_CLOCK_STEP_SECONDS, _SLEW = 0.05, 0.0834
#: Samples come at random times: up to two intervals apart, and what the reading itself takes, without one being lost.
_USUAL_GAP = 2.2
#: Half-widths of 95 % in standard deviations: 1.96, and a tenth more because the deviation itself is an estimate.
_COVERAGE = 2.2
#: A sensor that lags by more than this share of an interval may hide what the samples would show.
_LARGEST_LAG = 0.25
#: Windows so near to each other touch: their times have been rounded.
_TOUCHING_SECONDS = 1e-3
_SAID_PROBLEMS = 5


@dataclass(frozen=True)
class Energy:
    """Energy of windows of time, in joules; None where nothing can be said.  All half-widths are at 95 %.

    gain_joules        by the meter's gain: the same error in every reading of it, and so in proportion
    offset_joules      by its offset: the same error in every second
    other_joules       what else has the same sign in all windows alike: quantisation, the meter's lag and the jump of
                       power at the windows' edges, what a calibration left
    random_joules      what differs from window to window: when the samples happened to be taken
    unresolved_joules  the part of the energy whose features may lie between the samples: see `half_width_joules`
    sampled_joules     by the samples alone; `joules` is this, or the counter's where that agrees and says it better
    counter_joules     by the meter's energy counter, interpolated at the edges; None: it has none that can be used
    problems           why the energy is not valid, in words
    notes              why it is unresolved, in words
    """

    joules: float | None
    seconds: float  # of all windows
    samples: int = 0  # inside the windows
    gain_joules: float = 0.0
    offset_joules: float = 0.0
    other_joules: float = 0.0
    random_joules: float = 0.0
    unresolved_joules: float = 0.0
    sampled_joules: float | None = None
    counter_joules: float | None = None
    longest_gap_seconds: float | None = None  # between samples, inside the windows
    highest_watts: float | None = None  # of a sample
    point: str = ""
    meter: str = ""
    replayed: bool = False
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether the figure may be used without a reservation."""
        return self.joules is not None and not self.problems

    @property
    def systematic_joules(self) -> float:
        """Half-width of what has the same sign in all windows of this meter.

        Gain and offset are added, as a meter's class is told ("± 0.5 % of reading ± 20 mW"); with the rest of it they
        are independent, and so the squares are added.
        """
        return math.hypot(self.gain_joules + self.offset_joules, self.other_joules)

    @property
    def half_width_joules(self) -> float:
        """Systematic and random by the sum of their squares (GUM 5.1), and not less than `UNRESOLVED` allows."""
        return max(math.hypot(self.systematic_joules, self.random_joules), UNRESOLVED * abs(self.unresolved_joules))

    @property
    def low_joules(self) -> float | None:
        return None if self.joules is None else self.joules - self.half_width_joules

    @property
    def high_joules(self) -> float | None:
        return None if self.joules is None else self.joules + self.half_width_joules

    @property
    def claim(self) -> float | None:
        """Half-width as a share of the energy: 0.02 says "within 2 %"."""
        if self.joules is None:
            return None
        return self.half_width_joules / abs(self.joules) if self.joules else math.inf

    @property
    def mean_watts(self) -> float | None:
        return None if self.joules is None or not self.seconds else self.joules / self.seconds

    @property
    def brief(self) -> bool:
        """Whether it was shorter, or sampled less, than is usual for a figure that stands alone: 60 s, 100 samples."""
        return self.seconds < 60 or self.samples < ENOUGH_SAMPLES


@dataclass(frozen=True)
class Idle:
    """What a device takes when it has nothing to do, in watts; half-widths at 95 %, as those of `Energy`."""

    watts: float
    gain_watts: float
    offset_watts: float
    other_watts: float
    random_watts: float
    unresolved_watts: float
    drift_watts: float | None  # after less before; None: measured once only
    seconds: float
    samples: int
    problems: tuple[str, ...] = ()

    @property
    def half_width_watts(self) -> float:
        """Of all, with half of the drift: it is not known when between the two the power changed."""
        drift = abs(self.drift_watts or 0.0) / 2
        combined = math.hypot(self.gain_watts + self.offset_watts, self.other_watts, self.random_watts, drift)
        return max(combined, UNRESOLVED * abs(self.unresolved_watts))

    @property
    def low_watts(self) -> float:
        return self.watts - self.half_width_watts

    @property
    def high_watts(self) -> float:
        return self.watts + self.half_width_watts


def gross(trace: PowerTrace, windows: Sequence[tuple[float, float]], rail: str | None = None) -> Energy:
    """Energy in some windows of a trace (seconds, as its rows count them; no two overlap).

    Of one rail, as it was read; or, without one, of the whole: the sum of the trace's `total_rails`, calibrated where
    the trace brings a calibration.  Raises ValueError for a rail that is not there and for a window that ends before it
    begins.
    """
    series = _series(trace, rail)
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
    stretches = [series.stretch(*window) for window in _joined(windows)]
    if not (samples := sum(stretch.samples for stretch in stretches)):
        return _impossible(energy, f"no sample in {energy.seconds:.1f} s")
    energy = _measured(series, stretches, replace(energy, joules=sampled, sampled_joules=sampled, samples=samples))
    return _with_counter(series, windows, energy) if trace.counters else energy


def added(energies: Iterable[Energy]) -> Energy:
    """The sum for one device and one meter: what is systematic adds up, what is random by the sum of squares.

    None of it can be told when one of them cannot.  Raises ValueError when there is none.
    """
    parts = _some(energies)
    meters = sorted({part.meter for part in parts})
    mixed = (f"measured by more than one meter: {', '.join(meters)}",) if len(meters) > 1 else ()
    return _sum(parts, math.fsum, mixed)


def across(energies: Iterable[Energy]) -> Energy:
    """The sum over different devices: their meters err each in its own way, so all by the sum of squares.

    None of it can be told when one of them cannot.  Raises ValueError when there is none.
    """
    return _sum(_some(energies), lambda parts: math.hypot(*parts), ())


def idle_power(before: Energy | None, after: Energy | None) -> Idle | None:
    """Power without work, from windows before and after it; None where neither can be told.

    With both it is the mean of the two.  With one of them nothing is known of its drift, and that is a problem.
    """
    known = [energy for energy in (before, after) if energy is not None and energy.mean_watts is not None]
    if not known:
        return None
    watts = [energy.mean_watts or 0.0 for energy in known]
    problems = [
        f"idle {when}: {problem}"
        for when, energy in (("before", before), ("after", after))
        for problem in (energy.problems if energy is not None else ())
    ]
    if len(known) < 2:
        problems.append("idle was measured only once, before or after: how far it drifts is not known")
    return Idle(
        watts=math.fsum(watts) / len(watts),
        gain_watts=_mean([energy.gain_joules / energy.seconds for energy in known]),
        offset_watts=_mean([energy.offset_joules / energy.seconds for energy in known]),
        other_watts=_mean([energy.other_joules / energy.seconds for energy in known]),
        random_watts=math.hypot(*(energy.random_joules / energy.seconds for energy in known)) / len(known),
        unresolved_watts=_mean([energy.unresolved_joules / energy.seconds for energy in known]),
        drift_watts=watts[1] - watts[0] if len(watts) == 2 else None,
        seconds=math.fsum(energy.seconds for energy in known),
        samples=sum(energy.samples for energy in known),
        problems=tuple(problems),
    )


def net(energy: Energy, idle: Idle | None) -> Energy | None:
    """Energy less what the device would have taken in the same time without work; None where that is not known.

    Both come from one meter, so its offset falls out, and its gain counts for the difference alone.  Drift counts half.
    """
    if idle is None:
        return None
    seconds = energy.seconds
    drift = abs(idle.drift_watts or 0.0) / 2
    difference = None if energy.joules is None else energy.joules - idle.watts * seconds
    return replace(
        energy,
        joules=difference,
        gain_joules=abs(energy.gain_joules - idle.gain_watts * seconds),
        offset_joules=abs(energy.offset_joules - idle.offset_watts * seconds),
        other_joules=math.hypot(energy.other_joules, idle.other_watts * seconds, drift * seconds),
        random_joules=math.hypot(energy.random_joules, idle.random_watts * seconds),
        unresolved_joules=energy.unresolved_joules + idle.unresolved_watts * seconds,
        sampled_joules=None if energy.sampled_joules is None else energy.sampled_joules - idle.watts * seconds,
        counter_joules=None if energy.counter_joules is None else energy.counter_joules - idle.watts * seconds,
        problems=_told((*energy.problems, *idle.problems)),
    )


def with_conditions(energy: Energy, conditions: Sequence[Conditions]) -> Energy:
    """Not valid where the device was held back in one of the jobs, or began it too hot."""
    held_back = Counter(name for condition in conditions for name in condition.throttled or ())
    jobs = len(conditions)
    problems = [f"held back by {name} in {_of(count, jobs)}" for name, count in sorted(held_back.items())]
    hot = [condition for condition in conditions if condition.too_hot]
    if hot:
        known = [condition.begin_celsius for condition in hot if condition.begin_celsius is not None]
        at = f", at up to {max(known):.0f} °C" if known else ""
        problems.append(f"begun too hot in {_of(len(hot), jobs)}{at}: it did not cool down in time")
    return replace(energy, problems=(*energy.problems, *problems))


# ------------------------------------------------------------------------------------------------- a series of samples
class _Point(NamedTuple):
    seconds: float
    watts: float


class _Stretch(NamedTuple):
    """A window and the samples that tell of it.

    points    the power in the window: its samples, and the power at both edges
    nodes     the samples, with the one before and the one after where there are any
    missing   seconds at either edge that no samples enclose
    """

    begin: float
    end: float
    points: list[_Point]
    nodes: list[_Point]
    missing: tuple[float, float]

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def samples(self) -> int:
        return len(self.points) - 2

    @property
    def joules(self) -> float:
        return _integral(self.points)


class _Series(NamedTuple):
    """What is integrated: the samples of the chosen rails, calibrated, with what is known of them."""

    trace: PowerTrace
    rails: list[int]  # where the chosen rails stand
    calibrated: bool
    seconds: list[float]
    points: list[_Point]

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
        return _between(self.points[after - 1], self.points[after], seconds)

    def stretch(self, begin: float, end: float) -> _Stretch:
        """Raises ValueError for a window that ends before it begins."""
        if end < begin:
            raise ValueError(f"a window ends before it begins: {begin} to {end}")
        if not self.points:
            return _Stretch(begin, end, [_Point(begin, 0.0), _Point(end, 0.0)], [], (0.0, 0.0))
        first, last = bisect_left(self.seconds, begin), bisect_right(self.seconds, end)
        inside = self.points[first:last]
        before = bisect_right(self.seconds, begin) - 1
        return _Stretch(
            begin,
            end,
            [_Point(begin, self.watts(begin)), *inside, _Point(end, self.watts(end))],
            self.points[max(0, before) : bisect_left(self.seconds, end) + 1],
            (max(0.0, self.seconds[0] - begin), max(0.0, end - self.seconds[-1])),
        )


def _series(trace: PowerTrace, rail: str | None) -> _Series:
    if rail is not None and rail not in trace.rails:
        raise ValueError(f'meter {trace.meter} has no rail "{rail}"; it has {", ".join(trace.rails)}')
    rails = [trace.rails.index(name) for name in (trace.total_rails if rail is None else (rail,))]
    calibration = trace.calibration if rail is None else None
    gain, offset = (calibration.gain, calibration.offset_watts) if calibration else (1.0, 0.0)
    points = sorted(
        _Point(row[0], gain * math.fsum(row[2 + place] for place in rails) + offset) for row in trace.rows if rails
    )
    return _Series(trace, rails, calibration is not None, [point.seconds for point in points], points)


def _blank(trace: PowerTrace, windows: Sequence[tuple[float, float]], series: _Series) -> Energy:
    return Energy(
        joules=None,
        seconds=math.fsum(end - begin for begin, end in windows),
        point=trace.calibration.point if series.calibrated and trace.calibration else trace.point,
        meter=trace.meter,
        replayed=trace.replayed,
    )


def _joined(windows: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Windows that touch as one: what is not known of the power at an edge is nothing where the next one begins."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(windows):
        if joined and begin - joined[-1][1] <= _TOUCHING_SECONDS:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _impossible(energy: Energy, problem: str) -> Energy:
    return replace(energy, problems=(problem,))


def _measured(series: _Series, stretches: list[_Stretch], energy: Energy) -> Energy:
    """Fill in how well the samples say it."""
    sampled = energy.sampled_joules or 0.0
    short = _short_levels(series, stretches, sampled)
    notes = _why_unresolved(series, energy.samples, short)
    gain, offset, left = _class(series, stretches)
    other = math.hypot(left, _quantisation(series, stretches), _edges(series, stretches), _lag(series, stretches))
    return replace(
        energy,
        gain_joules=gain,
        offset_joules=offset,
        other_joules=other,
        random_joules=_sampling(series, stretches, energy.samples, short),
        unresolved_joules=sampled if notes else 0.0,
        notes=notes,
        longest_gap_seconds=max(_longest_gap(stretch) for stretch in stretches),
        highest_watts=max(point.watts for stretch in stretches for point in stretch.points[1:-1] or stretch.points),
        problems=tuple(_problems(series, stretches, energy)),
    )


# ------------------------------------------------------------------------------------------------------- systematic
def _class(series: _Series, stretches: list[_Stretch]) -> tuple[float, float, float]:
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
        _integral([_Point(at, max(calibration.lowest_watts - watts, watts - calibration.highest_watts, 0.0))
                   for at, watts in stretch.points])
        for stretch in stretches
    )  # fmt: skip
    gain = max(accuracy.gain for accuracy in series.accuracy)
    return calibration.reference_gain * abs(joules), 0.0, calibration.residual_watts * seconds + gain * beyond


def _rail_joules(series: _Series, stretches: list[_Stretch], rail: int) -> float:
    if len(series.rails) == 1:
        return math.fsum(stretch.joules for stretch in stretches)
    alone = _series(series.trace, series.trace.rails[rail])
    return math.fsum(alone.stretch(stretch.begin, stretch.end).joules for stretch in stretches)


def _quantisation(series: _Series, stretches: list[_Stretch]) -> float:
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


def _edges(series: _Series, stretches: list[_Stretch]) -> float:
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


def _jump(gap: list[_Point], inside: float) -> float:
    """What a jump at the edge is off by, with the part `inside` of a gap in the window: |ΔP| · inside² / (2 · gap)."""
    width = gap[-1].seconds - gap[0].seconds
    return abs(gap[-1].watts - gap[0].watts) * min(inside, width) ** 2 / (2 * width) if width > 0 else 0.0


def _lag(series: _Series, stretches: list[_Stretch]) -> float:
    """Samples that are late bring what was before the window, and lack its end: seconds × |ΔP| at both edges."""
    lag = series.lag_seconds
    if not lag:
        return 0.0
    near = lag + 2 * series.spacing_seconds
    return lag * math.fsum(_range(series, edge, near) for stretch in stretches for edge in (stretch.begin, stretch.end))


def _range(series: _Series, seconds: float, near: float) -> float:
    """By how much the power differs around a time; with one sample at least on either side."""
    first = max(0, bisect_left(series.seconds, seconds - near) - 1)
    watts = [point.watts for point in series.points[first : bisect_right(series.seconds, seconds + near) + 1]]
    return max(watts) - min(watts)


# ------------------------------------------------------------------------------------------------------------ random
def _sampling(series: _Series, stretches: list[_Stretch], samples: int, short: list[_Level]) -> float:
    """Half-width of what the times of the samples did, from the differences of neighbours."""
    watts = [point.watts for stretch in stretches for point in stretch.nodes]
    span = max(watts) - min(watts)
    variance = math.fsum(_variance(series, stretch, span) for stretch in stretches)
    # As if two samples more had met the largest of the short levels: an interval around few hits would be too narrow
    # (Agresti and Coull, 1998, on the share of the time that it takes).
    height = max((level.height for level in short), default=0.0)
    variance += 2 * (height * series.spacing_seconds) ** 2
    return _COVERAGE * (1 + 2 / samples) * math.sqrt(variance)


def _variance(series: _Series, stretch: _Stretch, span: float) -> float:
    """Of the integral of one window.

    A change of ΔP somewhere between two samples a gap apart: ΔP²·gap²/12.  A sample that sticks out from both its
    neighbours was met by chance: −ΔP₁·ΔP₂ × (what it stands for)²; for readings that are independent of each other the
    mean of that is their variance.  Over a gap longer than usual, ΔP is all that was seen.
    """
    nodes = _apart(stretch.nodes, max(accuracy.timing_seconds for accuracy in series.accuracy))
    gaps = [_Gap.of(a, b, stretch, span, _USUAL_GAP * series.spacing_seconds) for a, b in pairwise(nodes)]
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
    def of(cls, a: _Point, b: _Point, stretch: _Stretch, span: float, usual: float) -> _Gap:
        width = b.seconds - a.seconds
        inside = max(0.0, min(b.seconds, stretch.end) - max(a.seconds, stretch.begin))
        difference = b.watts - a.watts
        largest = span if width > usual else abs(difference)
        # Where the change may also lie outside the window, it is not centred: up to 1/3 in place of 1/12.
        share = (4 - 3 * inside / width) / 12 if width > 0 else 0.0
        return cls(inside, difference, share * (largest * inside) ** 2)


def _apart(nodes: list[_Point], seconds: float) -> list[_Point]:
    """Those that are not the same look of the sensor again."""
    if not seconds or not nodes:
        return nodes
    kept = [nodes[0]]
    for node in nodes[1:]:
        if node.seconds - kept[-1].seconds >= seconds:
            kept.append(node)
    return kept


# --------------------------------------------------------------------------------------------------------- resolution
class _Level(NamedTuple):
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


def _short_levels(series: _Series, stretches: list[_Stretch], joules: float) -> list[_Level]:
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


def _levels(points: list[_Point], alike: float) -> list[_Level]:
    """A trace as levels.  A single sample on the way up or down is one: it may have been a short stop."""
    runs: list[_Level] = []
    for seconds, watts in points:
        if runs:
            last = runs[-1]
            lowest, highest = min(last.lowest, watts), max(last.highest, watts)
            if highest - lowest <= alike:
                runs[-1] = _Level(last.begin, seconds, lowest, highest)
                continue
        runs.append(_Level(seconds, seconds, watts, watts))
    if len(runs) < 3:
        return runs
    inner = (
        level._replace(height=min(_apart_watts(before, level), _apart_watts(level, after)))
        for before, level, after in zip(runs, runs[1:], runs[2:], strict=False)
    )
    return [runs[0], *inner, runs[-1]]


def _apart_watts(one: _Level, other: _Level) -> float:
    return max(one.highest - other.lowest, other.highest - one.lowest)


def _why_unresolved(series: _Series, samples: int, short: list[_Level]) -> tuple[str, ...]:
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


# ----------------------------------------------------------------------------------------------------------- verdict
def _problems(series: _Series, stretches: list[_Stretch], energy: Energy) -> list[str]:
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


def _longest_gap(stretch: _Stretch) -> float:
    """Between neighbouring samples, as far as it lies in the window."""
    times = [stretch.begin, *(point.seconds for point in stretch.points[1:-1]), stretch.end]
    return max(b - a for a, b in pairwise(times))


def _clock_step(trace: PowerTrace, stretches: list[_Stretch]) -> float | None:
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


# ----------------------------------------------------------------------------------------------------------- counter
def _with_counter(series: _Series, windows: Sequence[tuple[float, float]], energy: Energy) -> Energy:
    """Hold the samples against the meter's energy counter; take its word where both agree and it is better."""
    counter = _Counter.of(series)
    if counter.fell:
        return replace(
            energy, problems=(*energy.problems, "its energy counter went back: it was reset, or has lost power")
        )
    joules = math.fsum(counter.at(end) - counter.at(begin) for begin, end in windows)
    half_width = counter.half_width(_joined(windows))
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

    points: list[_Point]  # joules in place of watts
    fell: bool
    usual_gap: float

    @classmethod
    def of(cls, series: _Series) -> _Counter:
        calibration = series.trace.calibration if series.calibrated else None
        first = 2 + len(series.trace.rails)
        rows = sorted(series.trace.rows)
        sums = [math.fsum(row[first + rail] for rail in series.rails) for row in rows]
        fell = any(b[first + rail] < a[first + rail] for a, b in pairwise(rows) for rail in series.rails)
        offset = calibration.offset_watts if calibration else 0.0
        points = [
            _Point(row[0], series.gain * joules + offset * row[0]) for row, joules in zip(rows, sums, strict=True)
        ]
        return cls(points, fell, _USUAL_GAP * series.spacing_seconds)

    def at(self, seconds: float) -> float:
        return _between(*self.around(seconds), seconds)

    def around(self, seconds: float) -> tuple[_Point, _Point]:
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


# -------------------------------------------------------------------------------------------------------- arithmetic
def _between(a: _Point, b: _Point, seconds: float) -> float:
    width = b.seconds - a.seconds
    return a.watts + (b.watts - a.watts) * (seconds - a.seconds) / width if width > 0 else b.watts


def _integral(points: list[_Point]) -> float:
    return math.fsum((a.watts + b.watts) / 2 * (b.seconds - a.seconds) for a, b in pairwise(points))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _some(energies: Iterable[Energy]) -> list[Energy]:
    parts = list(energies)
    if not parts:
        raise ValueError("there is no energy to sum up")
    return parts


def _sum(parts: list[Energy], systematic: Callable[[list[float]], float], problems: tuple[str, ...]) -> Energy:
    points = sorted({part.point for part in parts})
    if len(points) > 1:
        problems = (*problems, f"measured at more than one point: {', '.join(points)}")
    return Energy(
        joules=_sum_of_known([part.joules for part in parts]),
        seconds=math.fsum(part.seconds for part in parts),
        samples=sum(part.samples for part in parts),
        gain_joules=systematic([part.gain_joules for part in parts]),
        offset_joules=systematic([part.offset_joules for part in parts]),
        other_joules=systematic([part.other_joules for part in parts]),
        random_joules=math.hypot(*(part.random_joules for part in parts)),
        unresolved_joules=math.fsum(part.unresolved_joules for part in parts),
        sampled_joules=_sum_of_known([part.sampled_joules for part in parts]),
        counter_joules=_sum_of_known([part.counter_joules for part in parts]),
        longest_gap_seconds=_largest([part.longest_gap_seconds for part in parts]),
        highest_watts=_largest([part.highest_watts for part in parts]),
        point=" + ".join(points),
        meter=" + ".join(sorted({part.meter for part in parts})),
        replayed=any(part.replayed for part in parts),
        problems=_told((*problems, *(problem for part in parts for problem in part.problems))),
        notes=_told(note for part in parts for note in part.notes),
    )


def _sum_of_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def _largest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _told(problems: Iterable[str]) -> tuple[str, ...]:
    """Each once, and no more than one reads."""
    told = list(dict.fromkeys(problems))
    more = len(told) - _SAID_PROBLEMS
    return (*told[:_SAID_PROBLEMS], f"and {more} more") if more > 0 else tuple(told)


def _of(count: int, whole: int) -> str:
    return "the job" if whole == 1 else f"{count} of {whole} jobs"
