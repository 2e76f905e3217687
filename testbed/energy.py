"""Energies with their intervals at 95 % and their verdicts: sums, and what is left of them less rest.

    energy = gross(trace, [(begin, end)])           # of `testbed.power_integral`: joules, half-widths, problems
    added([energy, …])                              # jobs, or phases, of one device and meter
    across([energy, …])                             # devices
    net(energy, idle_power(before, after))          # less what the device takes anyway
    with_conditions(energy, [conditions, …])        # throttled, or begun too hot: not valid

Standard library only, pure functions.  How every half-width comes about, and from which source, stands in
docs/energy.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from testbed.measurement import Conditions

#: From so many on, a feature that none of them met takes less than 3 % of the time (rule of three, 95 %).
ENOUGH_SAMPLES = 100
#: The least half-width, as a share of the energy, where features may lie between the samples.
UNRESOLVED = 0.025
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


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _told(problems: Iterable[str]) -> tuple[str, ...]:
    """Each once, and no more than one reads."""
    told = list(dict.fromkeys(problems))
    more = len(told) - _SAID_PROBLEMS
    return (*told[:_SAID_PROBLEMS], f"and {more} more") if more > 0 else tuple(told)


def _of(count: int, whole: int) -> str:
    return "the job" if whole == 1 else f"{count} of {whole} jobs"
