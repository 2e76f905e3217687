"""What a run has cost by the end of each of its rounds: time, energy and bytes, beside the quality that it had then.

Evaluation is no cost: neither the controller's, nor the jobs that ask devices how good their own models are.  It is
how the testbed comes to know the quality, and a run that is evaluated in every round would pay for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.energy import Energy, across
from testbed.energy_summary import gross_energy, of_device
from testbed.method import EVALUATE
from testbed.run_record import finite

if TYPE_CHECKING:
    from testbed.job import Result
    from testbed.run_record import RoundRecord
    from testbed.store import RunFolder


@dataclass(frozen=True)
class RoundCost:
    """All figures but `quality` are sums over the rounds up to the end of this one.

    round           counted from 0
    seconds         wall clock of the rounds, less evaluation where that is known (older records do not tell it)
    energy          gross, of every device that had jobs; None where one of them has no meter, or before any job
    bytes_down      what the jobs were sent
    bytes_up        … and sent back, without what the measurement took
    deployed_bytes  what devices were sent beside the jobs because they lacked it
    quality         of the evaluation after this round: "loss", "accuracy" and "examples"; None: there was none
    """

    round: int
    seconds: float
    energy: Energy | None
    bytes_down: int
    bytes_up: int
    deployed_bytes: int = 0
    quality: Mapping[str, float | None] | None = None

    @property
    def joules(self) -> float | None:
        return self.energy.joules if self.energy else None

    @property
    def bytes(self) -> int:
        """All that went over the links: down, up and deployed."""
        return self.bytes_down + self.bytes_up + self.deployed_bytes

    @property
    def accuracy(self) -> float | None:
        """None where there was no evaluation, or it gave no finite number."""
        return finite((self.quality or {}).get("accuracy"))

    @property
    def loss(self) -> float | None:
        """None where there was no evaluation, or it gave no finite number."""
        return finite((self.quality or {}).get("loss"))


class Costs:
    """The sums over one run, round by round."""

    def __init__(self, folder: RunFolder) -> None:
        self._meters = _Meters(folder)
        self._seconds, self._down, self._up, self._deployed = 0.0, 0, 0, 0

    def add(self, record: RoundRecord, results: Iterable[Result]) -> RoundCost:
        """The sums with this round, whose results these are.  Raises StoreError for unreadable power samples."""
        jobs = [result for result in results if result.kind != EVALUATE]
        self._seconds += training_seconds(record)
        self._deployed += record.deployed_bytes
        self._down += sum(job.measurement.bytes_down for job in jobs)
        self._up += sum(job.measurement.bytes_up for job in jobs)
        energy = self._meters.after(jobs)
        return RoundCost(record.round, self._seconds, energy, self._down, self._up, self._deployed, record.quality)


def round_costs(folder: RunFolder) -> list[RoundCost]:
    """Of every round that is recorded, in order.  Raises StoreError when power samples cannot be read."""
    of_rounds: dict[int, list[Result]] = {}
    for result in folder.results():
        of_rounds.setdefault(result.round, []).append(result)
    costs = Costs(folder)
    return [costs.add(record, of_rounds.get(record.round, ())) for record in folder.rounds()]


def training_seconds(record: RoundRecord) -> float:
    """Seconds of a round without its evaluation, where that is known."""
    return record.seconds - (record.evaluation_seconds or 0.0)


class _Meters:
    """The energy of all jobs so far.  Samples are read once; the sums are made anew, as few in each are many in all."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._metered: dict[str, list[Result]] = {}  # device → its jobs with their samples
        self._lacking: dict[str, int] = {}  # device → how many of its jobs brought none
        self._energies: dict[str, Energy | None] = {}

    def after(self, jobs: Iterable[Result]) -> Energy | None:
        devices = set()
        for job in jobs:
            devices.add(job.device)
            metered = self._metered.setdefault(job.device, [])
            if job.measurement.power:
                metered.append(self._folder.with_power(job))
            else:
                self._lacking[job.device] = self._lacking.get(job.device, 0) + 1
        for name in devices:
            metered = self._metered[name]
            self._energies[name] = gross_energy(metered, self._lacking.get(name, 0)) if metered else None
        known = [of_device(energy, name) for name, energy in sorted(self._energies.items()) if energy is not None]
        return across(known) if known and len(known) == len(self._energies) else None
