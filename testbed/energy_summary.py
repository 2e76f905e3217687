"""The energy of a run's devices, phase by phase, from the raw samples of its jobs.

A device's energy is that of its first meter; what others say stands beside it.  Work is what jobs took, from the first
byte to the last; the time between two jobs is nobody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from testbed.energy import Energy, Idle, across, added, idle_power, net, with_conditions
from testbed.measurement import Measurement, PowerTrace
from testbed.power_integral import gross

if TYPE_CHECKING:
    from testbed.job import Result
    from testbed.store import RunFolder

#: A phase in which a node waits for a job to come.
_WAITING = "idle"
#: The window of a rest in which nothing is done (`testbed.node.rest`).
_IDLE_WINDOW = "idle_window"


@dataclass(frozen=True)
class EnergySummary:
    """Of a device, or of all together: then there is no single idle power.

    gross      of all jobs; None where a meter is lacking
    net        less what the device takes at rest in the same time; None where that was not measured
    phases     gross, by phase
    rails      gross of every rail, by the board's own name; never added up but to `gross`
    beside     gross by the device's other meters, by name
    """

    gross: Energy
    net: Energy | None = None
    idle: Idle | None = None
    phases: Mapping[str, Energy] = field(default_factory=dict)
    rails: Mapping[str, Energy] = field(default_factory=dict)
    beside: Mapping[str, Energy] = field(default_factory=dict)


def device_energy(folder: RunFolder, jobs: Sequence[Result], rests: Sequence[Result]) -> EnergySummary | None:
    """Of one device's jobs and rests; None where no meter measured any.  Raises StoreError for unreadable samples."""
    metered = [folder.with_power(result) for result in jobs if result.measurement.power]
    if not metered:
        return None
    meter, *others = _meters(metered)
    whole = gross_energy(metered, len(jobs) - len(metered), rests)
    idle = _idle([folder.with_power(result) for result in rests], meter)
    return EnergySummary(
        gross=whole,
        net=net(whole, idle),
        idle=idle,
        phases={name: _work(metered, meter, phase=name) for name in _phase_names(metered)},
        rails={rail: _work(metered, meter, rail=rail) for rail in _rails(metered, meter)},
        beside={other: _work(metered, other) for other in others},
    )


def gross_energy(metered: Sequence[Result], lacking: int = 0, rests: Sequence[Result] = ()) -> Energy:
    """Of one device's jobs, with their samples read, by its first meter; `lacking` more brought no samples.

    Raises ValueError when no job brought any.
    """
    whole = with_conditions(
        _work(metered, _meters(metered)[0]), [each.measurement.conditions for each in (*metered, *rests)]
    )
    if not lacking:
        return whole
    jobs = len(metered) + lacking
    return replace(whole, problems=(*whole.problems, f"{lacking} of {jobs} jobs brought no samples"))


def _meters(metered: Sequence[Result]) -> list[str]:
    """The meters of a device by name, its first one first."""
    found = dict.fromkeys(trace.meter for result in metered for trace in result.measurement.power)
    if not found:
        raise ValueError("there is no job with power samples")
    return list(found)


def run_energy(devices: Mapping[str, EnergySummary | None]) -> EnergySummary | None:
    """Of all devices that had jobs; None where not each of them has a meter: a part is not the whole."""
    known = [each for each in devices.values() if each is not None]
    if not known or len(known) < len(devices):
        return None
    nets = [each.net for each in known if each.net is not None]
    names = dict.fromkeys(name for each in known for name in each.phases)
    return EnergySummary(
        gross=across(of_device(each.gross, name) for name, each in devices.items() if each is not None),
        net=across(nets) if len(nets) == len(known) else None,
        phases={name: across([each.phases[name] for each in known if name in each.phases]) for name in names},
    )


def of_device(energy: Energy, device: str) -> Energy:
    """The same energy, whose problems name the device."""
    return replace(energy, problems=tuple(f"{device}: {problem}" for problem in energy.problems))


def _work(results: Iterable[Result], meter: str, *, phase: str | None = None, rail: str | None = None) -> Energy:
    """Of jobs, by one meter: of one phase or of all, of one rail or of the whole."""
    parts = [
        gross(trace, windows, rail)
        for stretch in _stretches(results, meter)
        if (rail is None or rail in stretch[0][1].rails)
        and (windows := [window for job, _ in stretch for window in _windows(job, phase)])
        for trace in [_joined(stretch)]
    ]
    return added(parts) if parts else replace(_NOTHING, meter=meter)


_NOTHING = Energy(joules=None, seconds=0.0, problems=("no job had such a phase",))
#: A node whose clock stands so much farther from the controller's than before was restarted.
_RESTARTED_SECONDS = 5.0

_Job = tuple[Measurement, PowerTrace]


def _stretches(results: Iterable[Result], meter: str) -> list[list[_Job]]:
    """The jobs with their samples, in their order, apart where what is known of the meter or the clock is another."""
    jobs = [
        (result.measurement, trace) for result in results if (trace := _trace(result, meter)) is not None and trace.rows
    ]
    stretches: list[list[_Job]] = []
    for job in sorted(jobs, key=lambda job: (job[0].begun_unix_seconds or 0.0, job[0].begun_monotonic_seconds or 0.0)):
        if stretches and _continues(stretches[-1][-1], job):
            stretches[-1].append(job)
        else:
            stretches.append([job])
    return stretches


def _continues(before: _Job, after: _Job) -> bool:
    known = [replace(trace, rows=(), timing_seconds=0.0) for _, trace in (before, after)]
    same_width = len(before[1].rows[0]) == len(after[1].rows[0])
    moved = _clock_offset(after[0]) - _clock_offset(before[0])
    later = (after[0].begun_monotonic_seconds or 0.0) >= (before[0].begun_monotonic_seconds or 0.0)
    return known[0] == known[1] and same_width and later and abs(moved) < _RESTARTED_SECONDS


def _clock_offset(job: Measurement) -> float:
    return (job.begun_unix_seconds or 0.0) - (job.begun_monotonic_seconds or 0.0)


def _joined(jobs: Sequence[_Job]) -> PowerTrace:
    """One trace on the node's own clock: few samples in each of many jobs are many of them all.

    What rows tell by how far it has moved or grown goes on from job to job; between two jobs nothing is claimed.
    """
    first = 2 + len(jobs[0][1].rails)
    rows: list[tuple[float, ...]] = []
    for job, trace in jobs:
        begun = job.begun_monotonic_seconds or 0.0
        base = rows[-1] if rows else (0.0,) * len(trace.rows[0])
        for row in trace.rows:
            seconds = row[0] + begun
            if rows and seconds <= rows[-1][0]:
                continue  # the sample before a job may be the one after the last
            grown = (value + then for value, then in zip(row[first:], base[first:], strict=True))
            rows.append((seconds, row[1] + base[1], *row[2:first], *grown))
    timing = max(trace.timing_seconds for _, trace in jobs)
    return replace(jobs[0][1], rows=tuple(rows), timing_seconds=timing)


def _trace(result: Result, meter: str) -> PowerTrace | None:
    return next((trace for trace in result.measurement.power if trace.meter == meter), None)


def _windows(job: Measurement, name: str | None = None) -> list[tuple[float, float]]:
    """When a job's phases were, on the node's clock; None: all but waiting."""
    begun = job.begun_monotonic_seconds or 0.0
    windows: list[tuple[float, float]] = []
    for phase in job.phases:
        if phase.begun_seconds is None or phase.name == _WAITING or name not in (None, phase.name):
            continue
        begin = begun + phase.begun_seconds
        begin = max(begin, windows[-1][1] if windows else begin)  # rounded apart
        windows.append((begin, max(begin, begun + phase.begun_seconds + phase.seconds)))
    return windows


def _phase_names(results: Iterable[Result]) -> list[str]:
    names = dict.fromkeys(phase.name for result in results for phase in result.measurement.phases)
    return [name for name in names if name != _WAITING]


def _rails(results: Iterable[Result], meter: str) -> list[str]:
    traces = (_trace(result, meter) for result in results)
    return list(dict.fromkeys(rail for trace in traces if trace is not None for rail in trace.rails))


def _idle(rests: Sequence[Result], meter: str) -> Idle | None:
    """From the rests before and after, whichever of them there were."""
    last = max((rest.round for rest in rests), default=0)
    before = [rest for rest in rests if rest.round < 0]
    after = [rest for rest in rests if rest.round == last and rest.round >= 0]
    return idle_power(*(_rested(each, meter) for each in (before, after)))


def _rested(rests: Sequence[Result], meter: str) -> Energy | None:
    if not any(_trace(rest, meter) and _windows(rest.measurement, _IDLE_WINDOW) for rest in rests):
        return None
    return _work(rests, meter, phase=_IDLE_WINDOW)
