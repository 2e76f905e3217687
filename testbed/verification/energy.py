"""Energies integrated again from the raw power samples, and held against what the end of the run wrote down."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from testbed.errors import StoreError
from testbed.job_energy import ENERGY, JobEnergy, job_energies, recorded_energies
from testbed.verification.checks import Check, counted, judged, unknown

if TYPE_CHECKING:
    from testbed.job import Result
    from testbed.store import RunFolder

_NAME = "energy"
#: Of two sums of the same samples on two machines.
_TOLERANCE = 1e-9


def check_energy(folder: RunFolder, results: Sequence[Result]) -> Check:
    """Every window of every meter: a job, or a rest.

    A window that is not valid, and was not when the run ended, is no failure: it is told with its reason.
    """
    metered = [result for result in results if result.measurement.power]
    if not metered:
        return judged(_NAME, "no device has a meter: there is nothing to derive", ())
    try:
        recorded = recorded_energies(folder)
    except StoreError as error:
        return judged(_NAME, "the recorded energies cannot be read", [str(error)])
    derived, failures = _derived(folder, metered)
    invalid = Counter(problem for each in derived.values() for energy in each.values() for problem in energy.problems)
    notes = [f"not valid in {counted(count, 'window')}: {problem}" for problem, count in invalid.items()]
    windows = sum(map(len, derived.values()))
    if recorded is None and not failures:
        return unknown(
            _NAME, f"{counted(windows, 'window')} integrated, there is no {ENERGY} to hold them against", notes
        )
    failures += _differences(recorded or {}, derived)
    return judged(
        _NAME, f"{counted(windows, 'window')} of {counted(len(metered), 'job')} integrated again", failures, notes
    )


def _derived(folder: RunFolder, results: Sequence[Result]) -> tuple[dict[str, dict[str, JobEnergy]], list[str]]:
    derived, failures = {}, []
    for result in results:
        try:
            derived[result.job] = job_energies(folder, result)
        except StoreError as error:  # noqa: PERF203 -- one bad file costs one job
            failures.append(str(error))
    return derived, failures


def _differences(
    recorded: Mapping[str, Mapping[str, JobEnergy]], derived: Mapping[str, Mapping[str, JobEnergy]]
) -> Iterator[str]:
    for job, meters in derived.items():
        for meter, energy in meters.items():
            before = recorded.get(job, {}).get(meter)
            if before is None:
                yield f"{job}, {meter}: there is no energy of it in {ENERGY}"
            elif (failure := _difference(before, energy)) is not None:
                yield f"{job}, {meter}: {failure}"
    for job in recorded.keys() - derived.keys():
        yield f"{job}: {ENERGY} has its energy, its result has no meter or is missing"


def _difference(before: JobEnergy, now: JobEnergy) -> str | None:
    if now.rows != before.rows:
        return f"{counted(now.rows, 'sample')} in the file, {before.rows} when the run ended"
    for what, then, value in (
        ("joules", before.joules, now.joules),
        ("seconds", before.seconds, now.seconds),
        ("joules of half-width", before.half_width_joules, now.half_width_joules),
    ):
        if not _same(then, value):
            return f"the samples give {_said(value)} {what}, at the end of the run they gave {_said(then)}"
    if now.valid != before.valid:
        words = {True: "valid", False: f"not valid ({'; '.join((now if before.valid else before).problems)})"}
        return f"the energy is {words[now.valid]}, at the end of the run it was {words[before.valid]}"
    return None


def _same(then: float | None, now: float | None) -> bool:
    if then is None or now is None:
        return then is now
    return math.isclose(then, now, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def _said(value: float | None) -> str:
    return "no" if value is None else f"{value:.9g}"
