"""The energy of every single job by every meter, as the run's folder keeps it: energy.json.

It is derived from the samples when a run ends, so that whoever derives it again later has something to hold it
against (`testbed verify`): a file of samples that was cut still has an energy, but no longer this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from testbed.durable import read_json, write_json
from testbed.energy_summary import gross_energy
from testbed.errors import StoreError

if TYPE_CHECKING:
    from testbed.job import Result
    from testbed.store import RunFolder

ENERGY = "energy.json"


@dataclass(frozen=True)
class JobEnergy:
    """What one meter's samples say of one job, or of one rest.  `rows` counts all samples, also those beyond it."""

    rows: int
    samples: int
    seconds: float
    joules: float | None
    half_width_joules: float
    problems: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        return self.joules is not None and not self.problems

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> JobEnergy:
        return cls(**{**data, "problems": tuple(data.get("problems", ()))})


def job_energies(folder: RunFolder, result: Result) -> dict[str, JobEnergy]:
    """Meter → energy of a stored job, from its samples; raises StoreError when they cannot be read."""
    found = {}
    for trace in folder.with_power(result).measurement.power:
        energy = gross_energy([replace(result, measurement=replace(result.measurement, power=(trace,)))])
        found[trace.meter] = JobEnergy(
            len(trace.rows), energy.samples, energy.seconds, energy.joules, energy.half_width_joules, energy.problems
        )
    return found


def record_energies(folder: RunFolder) -> None:
    """Write energy.json, where a meter measured anything; raises StoreError for samples that cannot be read."""
    derived = {result.job: job_energies(folder, result) for result in (*folder.results(), *folder.rests())}
    if any(derived.values()):
        write_json(folder.path / ENERGY, {job: energies for job, energies in derived.items() if energies})


def recorded_energies(folder: RunFolder) -> dict[str, dict[str, JobEnergy]] | None:
    """Job → meter → energy as the run's end had it; None where that was not written down.

    Raises StoreError when it cannot be read.
    """
    path = folder.path / ENERGY
    if not path.exists():
        return None
    try:
        return {
            job: {meter: JobEnergy.from_json(energy) for meter, energy in meters.items()}
            for job, meters in read_json(path).items()
        }
    except (AttributeError, TypeError) as error:
        raise StoreError(f"{path}: expected the energies of jobs by meter ({error})") from None
