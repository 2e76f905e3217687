"""When devices worked and when they waited for others: the jobs of a round on the controller's clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.method import EVALUATE
from testbed.reports.exhibits import Span

if TYPE_CHECKING:
    from testbed.job import Result
    from testbed.reports.material import Evidence

WAITING = "waiting"
#: In which a node waits for a job to come (`testbed.energy_summary`); no part of the job.
_IDLE = "idle"


@dataclass(frozen=True)
class DeviceRound:
    """A device in a round, in seconds since the first byte of the round's first job."""

    device: str
    begin: float
    end: float
    spans: tuple[tuple[float, float, str], ...]  # begin, end and name of each phase


@dataclass(frozen=True)
class RoundTimes:
    """A round from the first byte of its first job to the end of its last: evaluation lies outside."""

    round: int
    devices: tuple[DeviceRound, ...]

    @property
    def seconds(self) -> float:
        return max(device.end for device in self.devices)

    @property
    def last(self) -> DeviceRound:
        """For which the others waited."""
        return max(self.devices, key=lambda device: device.end)

    def waited(self, device: DeviceRound) -> float:
        """Seconds from its last job's end until the round's."""
        return self.seconds - device.end

    @property
    def side_by_side(self) -> int:
        """How many devices were at work at the same time at most."""
        return max(sum(other.begin <= device.begin < other.end for other in self.devices) for device in self.devices)

    def rows(self, prefix: str = "") -> list[Span]:
        """What each device did, and how long it then waited."""
        found = []
        for device in self.devices:
            row = f"{prefix}{device.device}"
            found += [Span(row, begin, end, name) for begin, end, name in device.spans]
            if self.waited(device) > 0:
                found.append(Span(row, device.end, self.seconds, WAITING))
        return found


def round_times(run: Evidence) -> list[RoundTimes]:
    """Of every round whose jobs all tell when they began; records from before power was measured tell none."""
    jobs: dict[int, list[Result]] = {}
    for result in run.results:
        if result.kind != EVALUATE and result.measurement.phases:
            jobs.setdefault(result.round, []).append(result)
    order = [device.device for device in run.summary.devices]
    return [_of_round(index, own, order) for index, own in sorted(jobs.items()) if all(map(_tells, own))]


def _tells(job: Result) -> bool:
    return job.measurement.begun_unix_seconds is not None


def _of_round(index: int, jobs: Sequence[Result], order: Sequence[str]) -> RoundTimes:
    first = min(_begun(job) for job in jobs)
    names = [name for name in order if any(job.device == name for job in jobs)]
    return RoundTimes(index, tuple(_of_device(name, [j for j in jobs if j.device == name], first) for name in names))


def _of_device(name: str, jobs: Sequence[Result], first: float) -> DeviceRound:
    spans: list[tuple[float, float, str]] = []
    ends = []
    for job in sorted(jobs, key=_begun):
        at = _begun(job) - first
        for phase in job.measurement.phases:
            if phase.begun_seconds is not None and phase.name != _IDLE:
                begin = max(
                    at + phase.begun_seconds, spans[-1][1] if spans else 0.0
                )  # clocks are compared, not the same
                spans.append((begin, max(begin, at + phase.begun_seconds + phase.seconds), phase.name))
        ends.append(at + (job.measurement.seconds or 0.0))
    return DeviceRound(
        name, min(_begun(job) for job in jobs) - first, max([*ends, *(end for _, end, _ in spans)]), tuple(spans)
    )


def _begun(job: Result) -> float:
    return job.measurement.begun_unix_seconds or 0.0
