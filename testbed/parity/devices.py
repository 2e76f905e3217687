"""Devices of two runs that stand for each other, and their peaks, phases and energies side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from testbed.energy import Energy
    from testbed.job import Result
    from testbed.report import DeviceSummary, RunSummary

NAME, PROFILE = "name", "profile"


@dataclass(frozen=True)
class Interval:
    """A peak between its bounds, in bytes: the estimate in the median of the jobs, the bounds of all of them."""

    estimate_bytes: float
    low_bytes: int | None
    high_bytes: int | None

    @property
    def span(self) -> tuple[float, float] | None:
        """From the smallest of the three to the largest: bounds and estimate do not count the same."""
        if self.low_bytes is None or self.high_bytes is None:
            return None
        three = (self.low_bytes, self.estimate_bytes, self.high_bytes)
        return min(three), max(three)


@dataclass(frozen=True)
class PeakParity:
    """Peaks of the finished jobs of both; `overlap`: whether the bounds leave room for one common peak."""

    first: Interval
    second: Interval

    @property
    def ratio(self) -> float | None:
        return ratio(self.first.estimate_bytes, self.second.estimate_bytes)

    @property
    def overlap(self) -> bool | None:
        """None where a bound is not known."""
        a, b = self.first.span, self.second.span
        return None if a is None or b is None else a[0] <= b[1] and b[0] <= a[1]


@dataclass(frozen=True)
class PhaseParity:
    """One phase: seconds and peak estimate, each in the median over the finished jobs that have it."""

    name: str
    first_seconds: float | None
    second_seconds: float | None
    first_bytes: float | None
    second_bytes: float | None

    @property
    def seconds_ratio(self) -> float | None:
        return ratio(self.first_seconds, self.second_seconds)

    @property
    def bytes_ratio(self) -> float | None:
        return ratio(self.first_bytes, self.second_bytes)


@dataclass(frozen=True)
class EnergyParity:
    """Gross energies of all jobs; `why_not`: the reason for which the two must not be compared."""

    first: Energy
    second: Energy
    why_not: str | None = None

    @property
    def ratio(self) -> float | None:
        return ratio(self.first.joules, self.second.joules)

    @property
    def overlap(self) -> bool | None:
        """Whether the intervals have anything in common."""
        a, b = self.first, self.second
        if a.low_joules is None or a.high_joules is None or b.low_joules is None or b.high_joules is None:
            return None
        return a.low_joules <= b.high_joules and b.low_joules <= a.high_joules


@dataclass(frozen=True)
class DeviceParity:
    """A device of the first run, and the one of the second that stands for it."""

    first: str
    second: str
    matched_by: str  # NAME or PROFILE
    profile: str | None
    kinds: tuple[str | None, str | None]
    peak: PeakParity | None
    phases: tuple[PhaseParity, ...]
    energy: EnergyParity | None

    @property
    def name(self) -> str:
        return self.first if self.first == self.second else f"{self.first} / {self.second}"

    @property
    def emulated(self) -> tuple[bool, bool]:
        return self.kinds[0] == "emulated", self.kinds[1] == "emulated"


def ratio(first: float | None, second: float | None) -> float | None:
    """Second over first; None where one is not known, or the first is nothing."""
    return None if first is None or second is None or not first else second / first


def devices_of(
    runs: tuple[RunSummary, RunSummary], results: tuple[Sequence[Result], Sequence[Result]]
) -> tuple[tuple[DeviceParity, ...], tuple[str, ...]]:
    """The pairs, and for every device without a counterpart why it has none.  Devices without a job take no part."""
    first, second = ({each.device: each for each in run.devices if each.jobs} for run in runs)
    pairs = _by_name(first, second)
    by_profile, unmatched = _by_profile(
        {name: each for name, each in first.items() if name not in {a for a, _ in pairs}},
        {name: each for name, each in second.items() if name not in {b for _, b in pairs}},
    )
    made = [
        *(_device(first[a], second[b], NAME, results) for a, b in pairs),
        *(_device(first[a], second[b], PROFILE, results) for a, b in by_profile),
    ]
    return tuple(made), tuple(unmatched)


def _by_name(first: Mapping[str, DeviceSummary], second: Mapping[str, DeviceSummary]) -> list[tuple[str, str]]:
    """A name that stands for another board in the other run is no counterpart."""
    return [
        (name, name)
        for name, each in first.items()
        if name in second and (None in (each.profile, second[name].profile) or each.profile == second[name].profile)
    ]


def _by_profile(
    first: Mapping[str, DeviceSummary], second: Mapping[str, DeviceSummary]
) -> tuple[list[tuple[str, str]], list[str]]:
    pairs, unmatched = [], []
    profiles = dict.fromkeys(each.profile for each in (*first.values(), *second.values()))
    for profile in profiles:
        ours, theirs = ([name for name, each in of.items() if each.profile == profile] for of in (first, second))
        if len(ours) == len(theirs) == 1 and profile is not None:
            pairs.append((ours[0], theirs[0]))
        elif not ours or not theirs:
            which = "second" if ours else "first"
            unmatched += [
                f"{name}: the {which} run has no {profile or 'device of that name'}" for name in ours or theirs
            ]
        else:
            unmatched.append(
                f"{', '.join(ours)} and {', '.join(theirs)}: which {profile or 'device'} stands for which cannot be "
                "told; give them the same names in both inventories"
            )
    return pairs, unmatched


def _device(
    first: DeviceSummary,
    second: DeviceSummary,
    matched_by: str,
    results: tuple[Sequence[Result], Sequence[Result]],
) -> DeviceParity:
    ours, theirs = (
        [result for result in those if result.device == device.device and result.finished]
        for device, those in zip((first, second), results, strict=True)
    )
    return DeviceParity(
        first.device,
        second.device,
        matched_by,
        first.profile,
        (first.kind, second.kind),
        _peak(ours, theirs),
        tuple(_phases(ours, theirs)),
        _energy(first, second),
    )


def _peak(first: Sequence[Result], second: Sequence[Result]) -> PeakParity | None:
    intervals = [_interval(first), _interval(second)]
    return None if intervals[0] is None or intervals[1] is None else PeakParity(intervals[0], intervals[1])


def _interval(results: Sequence[Result]) -> Interval | None:
    """The smallest low and the largest high of any job: all of them are the same work."""
    peaks = [result.measurement.peak for result in results if result.measurement.peak.estimate_bytes is not None]
    if not peaks:
        return None
    lows = [peak.lower_bytes for peak in peaks if peak.lower_bytes is not None]
    highs = [peak.upper_bytes for peak in peaks if peak.upper_bytes is not None]
    return Interval(
        median(peak.estimate_bytes or 0 for peak in peaks),
        min(lows) if len(lows) == len(peaks) else None,
        max(highs) if len(highs) == len(peaks) else None,
    )


def _phases(first: Sequence[Result], second: Sequence[Result]) -> list[PhaseParity]:
    ours, theirs = _by_phase(first), _by_phase(second)
    return [
        PhaseParity(
            name,
            *(_median(seconds for seconds, _ in of.get(name, ())) for of in (ours, theirs)),
            *(_median(peak for _, peak in of.get(name, ())) for of in (ours, theirs)),
        )
        for name in dict.fromkeys([*ours, *theirs])
    ]


def _by_phase(results: Sequence[Result]) -> dict[str, list[tuple[float, int | None]]]:
    """Phase → of every job that has it: the seconds of all its phases of that name, and the highest estimate."""
    found: dict[str, list[tuple[float, int | None]]] = {}
    for result in results:
        measured = result.measurement
        for name in dict.fromkeys(phase.name for phase in measured.phases if phase.name != "idle"):
            own = [phase for phase in measured.phases if phase.name == name]
            peaks = [phase.peak.estimate_bytes for phase in own if phase.peak.estimate_bytes is not None]
            found.setdefault(name, []).append((sum(phase.seconds for phase in own), max(peaks, default=None)))
    return found


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _energy(first: DeviceSummary, second: DeviceSummary) -> EnergyParity | None:
    if first.energy is None or second.energy is None:
        return None
    a, b = first.energy.gross, second.energy.gross
    return EnergyParity(a, b, _why_not(a, b))


def _why_not(a: Energy, b: Energy) -> str | None:
    if a.replayed or b.replayed:
        return "a recording was replayed, nothing was measured"
    if a.point != b.point:
        return f"one was measured at {a.point}, the other at {b.point}"
    for which, energy in (("first", a), ("second", b)):
        if not energy.valid:
            return f"that of the {which} run is not valid: {'; '.join(energy.problems) or 'no samples'}"
    return None
