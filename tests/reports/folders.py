"""Small run folders of several methods and seeds, built by code: shared by the tests of the report's data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from testbed.job import Result
from testbed.measurement import Measurement, PhaseMeasurement, PowerTrace
from testbed.reports.exhibits import Figure, Report, Table
from testbed.run_record import FINISHED
from testbed.store import RunFolder
from tests.run_records import add_rounds, finished, planned, record

DEVICES = ("orin-1", "pi-1")
CLIENTS = (planned(0, "orin-1", 800, 740, 12), planned(1, "pi-1", 500, 470, 3))
Accuracies = tuple[float | None, ...]


def run(
    runs_dir: Path,
    method: str = "lora",
    seed: int = 0,
    accuracies: Accuracies = (0.4, 0.5),
    *,
    name: str | None = None,
    state: str = FINISHED,
    jobs: list[Result] | None = None,
    **config: object,
) -> RunFolder:
    """A run of one round for each accuracy on two devices, each round with a job of 10 s on both."""
    settled = record(method, list(CLIENTS), seed=seed, **{"rounds": max(1, len(accuracies)), **config})
    folder = RunFolder.create(runs_dir, name or f"{method}-s{seed}", settled)
    for result in jobs if jobs is not None else two_jobs(len(accuracies)):
        folder.record_result(result)
    add_rounds(folder, list(accuracies))
    folder.set_status(state)
    return folder


def two_jobs(rounds: int, peaks_mib: tuple[int, int] = (720, 460)) -> list[Result]:
    return [
        finished(index, client, device, peaks_mib[client] + index)
        for index in range(rounds)
        for client, device in enumerate(DEVICES)
    ]


def at(result: Result, begun: float, watts: float | None = None) -> Result:
    """The same job with the moments of its phases, and with samples of a constant power."""
    phases, moment = [], 0.0
    for phase in result.measurement.phases:
        phases.append(replace(phase, begun_seconds=moment))
        moment += phase.seconds
    waited = PhaseMeasurement("idle", 3.0, begun_seconds=-3.0)
    measured = replace(
        result.measurement,
        phases=(waited, *phases),
        begun_unix_seconds=1e9 + begun,
        begun_monotonic_seconds=begun,
        clock_seconds=0.001,
    )
    return replace(result, measurement=metered(measured, moment, watts))


def metered(measured: Measurement, seconds: float, watts: float | None) -> Measurement:
    if watts is None:
        return measured
    rows = tuple((0.1 * step - 0.05, 0.0, watts) for step in range(round(seconds * 10) + 2))
    trace = PowerTrace("hwmon", "dc_input", ("VIN",), ("VIN",), ((0.01, 0.0, 0.0, 0.0),), 0.1, rows)
    return replace(measured, power=(trace,))


def exhibit(report: Report, key: str) -> Table | Figure | None:
    return next((each for each in report.exhibits if each.key == key), None)


def table(report: Report, key: str) -> Table:
    found = exhibit(report, key)
    assert isinstance(found, Table), f"{key} is not among {[each.key for each in report.exhibits]}"
    return found


def figure(report: Report, key: str) -> Figure:
    found = exhibit(report, key)
    assert isinstance(found, Figure), f"{key} is not among {[each.key for each in report.exhibits]}"
    return found


def rows(found: Table) -> list[dict[str, object]]:
    """Each row by the columns' keys."""
    return [dict(zip((column.key for column in found.columns), row, strict=True)) for row in found.rows]


def row(found: Table, **wanted: object) -> dict[str, object]:
    """The one row with these values."""
    (one,) = [each for each in rows(found) if wanted.items() <= each.items()]
    return one
