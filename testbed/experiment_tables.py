"""What came of an experiment: its runs beside each other, and each method over its seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from testbed.experiment_cells import DONE, FAILED, RUNNING
from testbed.quantities import DASH, number_text
from testbed.report import fairness, summarise
from testbed.report_tables import plain_table, print_comparison, run_record

if TYPE_CHECKING:
    from rich.console import Console

    from testbed.experiment import Cell, Experiment
    from testbed.experiment_cells import Standing
    from testbed.report import RunSummary

Done = Mapping[str, "RunSummary"]  # identity of a cell → its finished run
_SHOWN_OF_IDENTITY = 12


@dataclass(frozen=True)
class Row:
    """A method over its seeds.  None: no run has the figure; of one run there is no deviation."""

    row: str
    seeds: int
    seeds_done: int
    accuracy_mean: float | None
    accuracy_deviation: float | None  # of the sample: n - 1
    loss_mean: float | None
    loss_deviation: float | None


# ── before anything is run ──────────────────────────────────────────────────────────────────────────────────────────
def print_standings(standings: Sequence[Standing], console: Console) -> None:
    """One row per cell: its state, its run, and the beginning of its hash."""
    table = plain_table(("Cell", "State", "Run", "Hash"))
    for standing in standings:
        run = standing.run.run_id if standing.run else DASH
        _add(table, (standing.cell.title, standing.state, run, standing.cell.identity[:_SHOWN_OF_IDENTITY]))
    console.print(table)


def standings_to_json(experiment: Experiment, standings: Sequence[Standing]) -> str:
    """{"experiment": name, "cells": […]}."""
    return json.dumps({"experiment": experiment.name, "cells": _cell_records(standings)}, indent=2)


# ── afterwards ──────────────────────────────────────────────────────────────────────────────────────────────────────
def print_outcome(standings: Sequence[Standing], console: Console) -> None:
    """The finished runs beside each other, the methods over their seeds, and what was not done, with the reason."""
    done = _summaries(standings)
    if done:
        titles = {standing.cell.identity: standing.cell.title for standing in standings}
        print_comparison([replace(run, run=titles[cell], conditions={}) for cell, run in done.items()], console)
        for note in _unlike(standings, done):
            _say(console, f"Not like for like: {note}.")
        _print_rows(_rows(standings, done), console)
    for standing in standings:
        if standing.state == FAILED:
            _say(console, f"failed: {standing.cell.title}: {standing.error}{_way_out(standing)}")
        elif standing.state == RUNNING:
            _say(console, f"left to another process, which is running it: {standing.cell.title}")


def _way_out(standing: Standing) -> str:
    if standing.run is None:
        return ""
    return f"; the same command goes on with its run, or begins anew when {standing.run.path} is removed"


def outcome_to_json(experiment: Experiment, standings: Sequence[Standing]) -> str:
    """{"experiment", "cells", "rows": methods over seeds, "runs": as `testbed report` has them, "fairness"}."""
    done = _summaries(standings)
    content = {
        "experiment": experiment.name,
        "cells": _cell_records(standings),
        "rows": [asdict(row) for row in _rows(standings, done)],
        "runs": [run_record(run) for run in done.values()],
        "fairness": _unlike(standings, done),
    }
    return json.dumps(content, indent=2, allow_nan=False)


def _cell_records(standings: Sequence[Standing]) -> list[dict[str, Any]]:
    return [
        {
            "title": standing.cell.title,
            "label": standing.cell.label,
            "method": standing.cell.config.method,
            "seed": standing.cell.seed,
            "inventory": standing.cell.inventory.source,
            "model": standing.cell.config.model,
            "data": standing.cell.config.data.get("name"),
            "hash": standing.cell.identity,
            "state": standing.state,
            "run": standing.run.run_id if standing.run else None,
            "error": standing.error,
        }
        for standing in standings
    ]


def _summaries(standings: Sequence[Standing]) -> dict[str, RunSummary]:
    """The finished runs, in the order of their cells; two labels for the same cell share its run."""
    return {
        standing.cell.identity: summarise(standing.run)
        for standing in standings
        if standing.state == DONE and standing.run is not None
    }


def _unlike(standings: Sequence[Standing], done: Done) -> list[str]:
    """What differs between methods with the same seed on the same data, model and inventory, and should not."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for standing in standings:
        if standing.cell.identity in done:
            cell = standing.cell
            groups.setdefault((cell.circumstances, cell.seed), []).append(cell)
    notes = [
        ", ".join((*cells[0].circumstances, note))
        for cells in groups.values()
        for note in fairness([replace(done[cell.identity], run=cell.label) for cell in cells])
    ]
    return list(dict.fromkeys(notes))


def _rows(standings: Sequence[Standing], done: Done) -> list[Row]:
    groups: dict[str, list[str]] = {}
    for standing in standings:
        groups.setdefault(standing.cell.row, []).append(standing.cell.identity)
    return [_row(name, cells, [done[cell] for cell in cells if cell in done]) for name, cells in groups.items()]


def _row(name: str, cells: Sequence[str], runs: Sequence[RunSummary]) -> Row:
    accuracies = [run.accuracy for run in runs if run.accuracy is not None]
    losses = [run.loss for run in runs if run.loss is not None]
    return Row(name, len(cells), len(runs), *_spread(accuracies), *_spread(losses))


def _spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    return (mean(values) if values else None), (stdev(values) if len(values) > 1 else None)


def _print_rows(rows: Sequence[Row], console: Console) -> None:
    console.rule("over seeds", align="left")
    table = plain_table(("Method", "Seeds", "Accuracy", "±", "Loss", "±"))
    for row in rows:
        spreads = (row.accuracy_mean, row.accuracy_deviation, row.loss_mean, row.loss_deviation)
        _add(table, (row.row, f"{row.seeds_done} of {row.seeds}", *map(number_text, spreads)))
    console.print(table)
    console.print()


def _add(table: Any, cells: Sequence[str]) -> None:
    """A row of plain text: what stands in square brackets is no markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
