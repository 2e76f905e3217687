"""The rows of one run for every exported table, derived from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from testbed.costs import round_costs
from testbed.energy_table import energy_columns
from testbed.exports.schema import DEVICES, JOBS, MEMORY_SAMPLES, PHASES, POWER_SAMPLES, ROUNDS, RUNS, Row
from testbed.job_energy import job_energies
from testbed.report import RunSummary, summarise
from testbed.run_record import finite

if TYPE_CHECKING:
    from testbed.energy_summary import EnergySummary
    from testbed.job import Result
    from testbed.measurement import Measurement
    from testbed.report import DeviceSummary
    from testbed.store import RunFolder

_ENERGY_NAMES = ("energy_low_joules", "energy_high_joules", "energy_valid", "energy_replayed")


def rows_of(folder: RunFolder, *, samples: bool) -> Iterator[Row]:
    """All rows of a run.  Raises StoreError for what cannot be read."""
    summary = summarise(folder)
    yield run_row(folder, summary)
    yield from (_device(summary.run, device) for device in summary.devices)
    yield from _rounds(folder)
    for result in (*folder.rests(), *folder.results()):
        yield _job(folder, result)
        yield from _phases(folder, result)
        if samples:
            yield from _memory(folder, result)
            yield from _power(folder, result)


def run_row(folder: RunFolder, summary: RunSummary) -> Row:
    """The run in one row."""
    config, versions, status = folder.config, folder.record.versions, folder.status
    mark = config.get("experiment") if isinstance(config.get("experiment"), Mapping) else {}
    same = (
        "run", "method", "seed", "state", "error", "task", "data", "model", "rounds", "rounds_planned", "seconds",
        "accuracy", "accuracy_best", "loss", "loss_best", "clients", "bytes_down", "bytes_up", "measurement_bytes",
        "deployed_bytes", "tokens_per_second", "peak_worst_bytes", "energy_joules", "emulated", "uncapped",
    )  # fmt: skip
    return RUNS.row(
        **{name: getattr(summary, name) for name in same},
        **vars(summary.reference),
        **_energy(summary.energy),
        experiment=(mark or {}).get("name"),
        label=(mark or {}).get("label"),
        settings=json.dumps(config.get("settings") or {}, ensure_ascii=False),
        started=status.started,
        ended=status.ended,
        data_sha256=config.get("data_hash"),
        model_sha256=versions.get("model"),
        clients_refused=len(summary.refusals),
        jobs_failed=len(summary.failures),
        testbed_version=(versions.get("packages") or {}).get("edge-testbed"),
        commit=versions.get("commit"),
        machine=(versions.get("machine") or {}).get("cpu"),
        initial_state=status.initial_state,
        final_state=status.final_state,
    )


def _energy(summary: EnergySummary | None) -> dict[str, Any]:
    columns = energy_columns(summary)
    return {name: columns[name] for name in _ENERGY_NAMES if name in columns}


def _device(run: str, device: DeviceSummary) -> Row:
    same = (
        "device", "kind", "profile", "clients", "jobs", "budget_bytes", "predicted_bytes", "peak_median_bytes",
        "peak_source", "prediction_error", "accelerator_peak_bytes", "bytes_down", "bytes_up", "tokens_per_second",
        "highest_celsius", "energy_joules",
    )  # fmt: skip
    energy = energy_columns(device.energy)
    more = {name: energy[name] for name in ("energy_net_joules", "energy_point", "energy_samples") if name in energy}
    return DEVICES.row(
        run=run,
        **{name: getattr(device, name) for name in same},
        **_energy(device.energy),
        **more,
        clients_refused=device.refused,
        jobs_finished=device.finished,
        peak_worst_lower_bytes=device.peak_lower_bytes,
        peak_worst_estimate_bytes=device.peak_worst_bytes,
        peak_worst_upper_bytes=device.peak_upper_bytes,
    )


def _rounds(folder: RunFolder) -> Iterator[Row]:
    costs = {cost.round: cost for cost in round_costs(folder)}
    same = (
        "round", "seconds", "evaluation_seconds", "learning_rate", "participants", "finished", "deployed_bytes",
    )  # fmt: skip
    for record in folder.rounds():
        quality, cost = record.quality or {}, costs[record.round]
        yield ROUNDS.row(
            run=folder.run_id,
            **{name: getattr(record, name) for name in same},
            train_loss=finite(record.train_loss),
            accuracy=finite(quality.get("accuracy")),
            loss=finite(quality.get("loss")),
            examples=quality.get("examples"),
            total_seconds=cost.seconds,
            total_joules=cost.joules,
            total_bytes_down=cost.bytes_down,
            total_bytes_up=cost.bytes_up,
            total_deployed_bytes=cost.deployed_bytes,
        )


# ── jobs ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _place(folder: RunFolder, result: Result) -> dict[str, Any]:
    """What the tables of jobs, phases and samples begin with."""
    return {
        "run": folder.run_id,
        "job": result.job,
        "round": result.round,
        "client": result.client,
        "device": result.device,
        "kind": result.kind,
    }


def _job(folder: RunFolder, result: Result) -> Row:
    measured, conditions = result.measurement, result.measurement.conditions
    loss = result.scalars.get("loss")
    same = (
        "begun_unix_seconds", "seconds", "limit_bytes", "baseline_bytes", "accelerator_peak_bytes", "bytes_down",
        "bytes_up", "measurement_bytes",
    )  # fmt: skip
    return JOBS.row(
        **_place(folder, result),
        **{name: getattr(result, name) for name in ("outcome", "phase", "error", "examples", "tokens")},
        **{name: getattr(measured, name) for name in same},
        **_first_energy(folder, result),
        loss=finite(loss) if isinstance(loss, int | float) else None,
        peak_lower_bytes=measured.peak.lower_bytes,
        peak_estimate_bytes=measured.peak.estimate_bytes,
        peak_upper_bytes=measured.peak.upper_bytes,
        refaults=measured.peak.refaults,
        begin_celsius=conditions.begin_celsius,
        highest_celsius=conditions.highest_celsius,
        throttled=None if conditions.throttled is None else ",".join(conditions.throttled),
        disturbances=json.dumps(measured.disturbances, ensure_ascii=False) if measured.disturbances else None,
    )


def _first_energy(folder: RunFolder, result: Result) -> dict[str, Any]:
    for meter, energy in job_energies(folder, result).items():
        return {
            "meter": meter,
            "energy_joules": energy.joules,
            "energy_half_width_joules": None if energy.joules is None else energy.half_width_joules,
            "energy_valid": energy.valid,
        }
    return {}


def _phases(folder: RunFolder, result: Result) -> Iterator[Row]:
    for number, phase in enumerate(result.measurement.phases):
        peak = phase.peak
        yield PHASES.row(
            **_place(folder, result),
            phase_number=number,
            phase=phase.name,
            begun_seconds=phase.begun_seconds,
            seconds=phase.seconds,
            peak_lower_bytes=peak.lower_bytes,
            peak_estimate_bytes=peak.estimate_bytes,
            peak_upper_bytes=peak.upper_bytes,
            lower_source=peak.sources.get("lower"),
            estimate_source=peak.sources.get("estimate"),
            upper_source=peak.sources.get("upper"),
            file_bytes=peak.file_bytes,
            accelerator_bytes=peak.accelerator_bytes,
            refaults=peak.refaults,
            samples=peak.samples,
        )


# ── samples ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _memory(folder: RunFolder, result: Result) -> Iterator[Row]:
    place = _place(folder, result)
    for sample in folder.memory_samples(result):
        number, name, *_ = sample
        own = {key: value for key, value in sample._asdict().items() if key not in ("phase", "name")}
        yield MEMORY_SAMPLES.row(**place, phase_number=number, phase=name, **own)


def _power(folder: RunFolder, result: Result) -> Iterator[Row]:
    place = _place(folder, result)
    for trace in folder.with_power(result).measurement.power:
        for row in trace.rows:
            for number, rail in enumerate(trace.rails):
                yield POWER_SAMPLES.row(
                    **place,
                    phase=_phase_at(result.measurement, row[0]),
                    meter=trace.meter,
                    point=trace.point,
                    replayed=trace.replayed,
                    rail=rail,
                    is_total=rail in trace.total_rails,
                    seconds=row[0],
                    clock_seconds=row[1],
                    watts=row[2 + number],
                    counter_joules=row[2 + len(trace.rails) + number] if trace.counters else None,
                )


def _phase_at(measured: Measurement, seconds: float) -> str | None:
    """The phase in which so many seconds of the job had passed."""
    for phase in measured.phases:
        begun = phase.begun_seconds
        if begun is not None and phase.name != "idle" and begun <= seconds < begun + phase.seconds:
            return phase.name
    return None
