"""The figures of `testbed.report` as tables for people, as JSON and as CSV: the same numbers in each."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from testbed.energy_table import energy_columns, energy_text, print_energy
from testbed.quantities import DASH, bytes_text, number_text, percent_text, seconds_text
from testbed.report import DeviceSummary, RunSummary, fairness

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console
    from rich.table import Table


Columns = Mapping[str, Callable[[Any], str]]  # heading → the cell of a summary


# ── for programs ────────────────────────────────────────────────────────────────────────────────────────────────────
def to_json(runs: Sequence[RunSummary]) -> str:
    """{"runs": [...], "fairness": [...]}; None is null."""
    content = {"runs": [run_record(run) for run in runs], "fairness": fairness(runs)}
    return json.dumps(content, indent=2, allow_nan=False)


def run_record(run: RunSummary) -> dict[str, Any]:
    """A run with its derived figures, as plain data."""
    devices = [{**asdict(device), "emulated": device.emulated} for device in run.devices]
    return {**asdict(run), **_derived(run), "devices": devices}


def to_csv(runs: Sequence[RunSummary]) -> str:
    """One line per run (level "run") and one per device of it (level "device"); None is empty."""
    lines = [line for run in runs for line in (run_line(run), *(device_line(run, d) for d in run.devices))]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _derived(run: RunSummary) -> dict[str, Any]:
    names = ("peak_worst_bytes", "prediction_error_worst", "headroom_least_bytes", "energy_joules")
    return {name: getattr(run, name) for name in names}


def run_line(run: RunSummary) -> dict[str, Any]:
    return {
        "level": "run",
        "run": run.run,
        "method": run.method,
        **_scalars(asdict(run)),
        **{f"reference_{name}": value for name, value in asdict(run.reference).items()},
        **({f"target_{name}": value for name, value in asdict(run.target).items()} if run.target else {}),
        **_derived(run),
        "refused": len(run.refusals),
        "failed": len(run.failures),
        **_seconds_columns(run.phase_seconds),
        **energy_columns(run.energy),
    }


def device_line(run: RunSummary, device: DeviceSummary) -> dict[str, Any]:
    line = {"level": "device", "run": run.run, "method": run.method, "emulated": device.emulated}
    figures = {**_scalars(asdict(device)), **_seconds_columns(device.phase_seconds)}
    return {**line, **figures, **energy_columns(device.energy)}


def _scalars(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not isinstance(value, (dict, list, tuple))}


def _seconds_columns(phases: Mapping[str, float]) -> dict[str, float]:
    return {f"seconds_{name}": value for name, value in phases.items()}


# ── for people ──────────────────────────────────────────────────────────────────────────────────────────────────────
def print_report(runs: Sequence[RunSummary], console: Console) -> None:
    """Each run by itself; then, for several, the comparison and what makes it unfair."""
    for run in runs:
        _print_run(run, console)
    if len(runs) > 1:
        print_comparison(runs, console)


def print_comparison(runs: Sequence[RunSummary], console: Console) -> None:
    """One row per run, and a note for everything that differs between them and should not."""
    console.rule("comparison", align="left")
    print_fitting(_comparison_columns(runs), runs, console)
    for note in fairness(runs):
        _note(console, f"Not like for like: {note}.")


def _print_run(run: RunSummary, console: Console) -> None:
    console.rule(run.run, align="left")
    for name, value in _facts(run):
        console.print(f"{name:<14}{value}", markup=False, highlight=False, soft_wrap=True)
    console.print()
    memory = _memory_columns(run)
    for columns in (memory, _work_columns(run)):
        print_fitting(columns, run.devices if columns is memory else [*run.devices, run], console)
    print_energy(run, console)
    for refusal in run.refusals:
        _note(console, f"refused: client {refusal.client} on {refusal.device}: {refusal.reason or 'no reason given'}")
    for line in _failure_lines(run):
        _note(console, line)
    for note in run.notes:
        _note(console, f"Note: {note}.")
    console.print()


def _facts(run: RunSummary) -> list[tuple[str, str]]:
    facts = [
        ("method", run.method),
        ("data", f"{run.data or DASH}, model {run.model or DASH}, seed {_plain(run.seed)}"),
        ("state", run.state + (f": {run.error}" if run.error else "")),
        ("rounds", f"{_of(run.rounds, run.rounds_planned)} in {seconds_text(run.seconds)}"),
        ("accuracy", f"{number_text(run.accuracy)} at the end, {number_text(run.accuracy_best)} at best"),
        ("beside", _beside(run)),
        ("loss", f"{number_text(run.loss)} at the end, {number_text(run.loss_best)} at best"),
    ]
    if run.target:
        facts.append((f"to {run.target.accuracy:g}", _target_text(run)))
    return [
        *facts,
        ("sent", f"{bytes_text(run.bytes_down)} down, {bytes_text(run.bytes_up)} up"),
        ("measurements", f"{bytes_text(run.measurement_bytes)} up, beside that"),
        ("deployed", bytes_text(run.deployed_bytes)),
        ("speed", f"{number_text(run.tokens_per_second, 0)} tokens/s"),
        ("devices", _circumstances(run)),
        ("agents", _agents(run)),
    ]


def _beside(run: RunSummary) -> str:
    reference = run.reference
    return (
        f"majority class {number_text(reference.majority)}, bag of words {number_text(reference.bag_of_words)}, "
        f"no fine-tuning {number_text(reference.no_fine_tuning)}"
    )


def _target_text(run: RunSummary) -> str:
    if run.target is None or run.target.rounds is None:
        return "not reached"
    return f"{run.target.rounds} rounds, {seconds_text(run.target.seconds)}"


def _circumstances(run: RunSummary) -> str:
    where = {True: "emulated", False: "boards", None: "boards and emulated, or not known"}[run.emulated]
    held = {True: "UNCAPPED: no limit held them", False: "capped", None: "capped or not: not known"}[run.uncapped]
    return f"{where}, {held}"


def _agents(run: RunSummary) -> str:
    """What measuring itself took of the devices, at most."""
    shares = [device.agent_cpu_share for device in run.devices if device.agent_cpu_share is not None]
    sizes = [device.agent_pss_bytes for device in run.devices if device.agent_pss_bytes is not None]
    share = f"{100 * max(shares):.2f} % of a core" if shares else DASH
    return f"{share}, {bytes_text(max(sizes, default=None))} of memory at most, for measuring and talking"


def _failure_lines(run: RunSummary) -> list[str]:
    """One line per client, outcome and cause, with the rounds it happened in."""
    rounds: dict[tuple[str, int, str, str, str], list[int]] = {}
    for failure in run.failures:
        cause = (failure.outcome, failure.client, failure.device, failure.phase or DASH, failure.error or DASH)
        rounds.setdefault(cause, []).append(failure.round + 1)
    return [
        f"{outcome}: client {client} on {device}, round {', '.join(map(str, when))}, in {phase}: {error}"
        for (outcome, client, device, phase, error), when in rounds.items()
    ]


def print_fitting(columns: Columns, rows: Sequence[Any], console: Console) -> None:
    """A table, or several where the terminal is narrow."""
    for table in _fitting_tables(columns, rows, console.width):
        console.print(table)
        console.print()


def _fitting_tables(columns: Columns, rows: Sequence[Any], width: int) -> Iterator[Table]:
    """One table, or where the terminal is too narrow several, each beginning with the first column."""
    (first, name), *others = columns.items()
    while others:
        count = len(others)
        while count > 1 and _width_of(_table_of({first: name, **dict(others[:count])}, rows)) > width:
            count -= 1
        yield _table_of({first: name, **dict(others[:count])}, rows)
        others = others[count:]


def plain_table(heads: Sequence[str]) -> Table:
    """A table whose first column is a name and whose others are figures."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", overflow="fold", no_wrap=not index)
    return table


def _table_of(columns: Columns, rows: Sequence[Any]) -> Table:
    table = plain_table(list(columns))
    for row in rows:
        _add(table, [cell(row) for cell in columns.values()])
    return table


def _add(table: Table, cells: Sequence[str]) -> None:
    """A row of plain text: what stands in square brackets is no markup."""
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells))


def _width_of(table: Table) -> int:
    from rich.console import Console

    console = Console(width=10_000)
    return console.measure(table).maximum


_MEMORY_COLUMNS: Columns = {
    "Device": lambda device: device.device,
    "Budget": lambda device: bytes_text(device.budget_bytes) + (" (uncapped)" if device.uncapped else ""),
    "Predicted": lambda device: bytes_text(device.predicted_bytes),
    "Median peak": lambda device: bytes_text(device.peak_median_bytes),
    "Worst peak": lambda device: bytes_text(device.peak_worst_bytes),
    "Lower": lambda device: bytes_text(device.peak_lower_bytes),
    "Upper": lambda device: bytes_text(device.peak_upper_bytes),
    "Source": lambda device: device.peak_source or DASH,
    "Error": lambda device: percent_text(device.prediction_error),
    "Headroom": lambda device: bytes_text(device.headroom_bytes),
}


def _memory_columns(run: RunSummary) -> Columns:
    """With the accelerator's part where any device has one."""
    if all(device.accelerator_peak_bytes is None for device in run.devices):
        return _MEMORY_COLUMNS
    return {**_MEMORY_COLUMNS, "Of it on accelerator": lambda device: bytes_text(device.accelerator_peak_bytes)}


def _work_columns(run: RunSummary) -> Columns:
    """Jobs, bytes, speed, and seconds by phase summed over jobs: of a device, or of the whole run."""
    return {
        "Device": lambda row: row.device if isinstance(row, DeviceSummary) else "all",
        "Jobs done": lambda row: _jobs_text(row) if isinstance(row, DeviceSummary) else "",
        **_TRAFFIC_COLUMNS,
        "Tokens/s": lambda row: number_text(row.tokens_per_second, 0),
        "Energy": lambda row: energy_text(row.energy.gross if row.energy else None),
        **{f"{phase} time": _phase_column(phase) for phase in run.phase_seconds},
    }


def _phase_column(phase: str) -> Callable[[Any], str]:
    return lambda row: seconds_text(row.phase_seconds.get(phase))


_TRAFFIC_COLUMNS: Columns = {
    "Down": lambda row: bytes_text(row.bytes_down),
    "Up": lambda row: bytes_text(row.bytes_up),
}


def _comparison_columns(runs: Sequence[RunSummary]) -> Columns:
    """One row per run: quality first, then what it cost."""
    target = next((run.target.accuracy for run in runs if run.target), None)
    return {
        "Run": lambda run: run.run + (" (uncapped)" if run.uncapped else ""),
        "Accuracy": lambda run: number_text(run.accuracy),
        "Best": lambda run: number_text(run.accuracy_best),
        "Loss": lambda run: number_text(run.loss),
        "Majority": lambda run: number_text(run.reference.majority),
        "Bag of words": lambda run: number_text(run.reference.bag_of_words),
        "No tuning": lambda run: number_text(run.reference.no_fine_tuning),
        "Rounds": lambda run: _of(run.rounds, run.rounds_planned),
        "Time with evaluation": lambda run: seconds_text(run.seconds),
        **(_target_columns(target) if target is not None else {}),
        "Worst peak": lambda run: bytes_text(run.peak_worst_bytes),
        "Headroom": lambda run: bytes_text(run.headroom_least_bytes),
        "Error": lambda run: percent_text(run.prediction_error_worst),
        **_TRAFFIC_COLUMNS,
        "Energy": lambda run: energy_text(run.energy.gross if run.energy else None),
        "Refused": lambda run: f"{len(run.refusals)} of {run.clients}",
        "Failed": lambda run: str(len(run.failures)),
    }


def _target_columns(target: float) -> Columns:
    return {
        f"Rounds to {target:g}": lambda run: DASH if run.target.rounds is None else str(run.target.rounds),
        f"Time to {target:g}": lambda run: seconds_text(run.target.seconds),
    }


def _jobs_text(device: DeviceSummary) -> str:
    if device.clients and device.refused == device.clients:
        return "refused"
    return f"{device.finished}/{device.jobs}"


def _note(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _of(done: int, planned: int | None) -> str:
    return f"{done}/{planned}" if planned is not None else str(done)


def _plain(value: Any) -> str:
    return DASH if value is None else str(value)
