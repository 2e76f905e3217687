"""What came of an experiment, as people and programs read it; and before, where its cells stand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from testbed.experiments.cells import DONE, FAILED, RUNNING
from testbed.quantities import DASH
from testbed.report_tables import Columns, plain_table, print_comparison, print_fitting, run_record
from testbed.reports.grouping import material_of_experiment
from testbed.reports.protocols import protocol_tables
from testbed.reports.quality import quality_tables
from testbed.reports.tables import unlike_table
from testbed.statistics import Estimate

if TYPE_CHECKING:
    from rich.console import Console

    from testbed.experiments.cells import Standing
    from testbed.experiments.experiment import Experiment
    from testbed.reports.exhibits import Table, Value
    from testbed.reports.material import Material

_SHOWN_OF_IDENTITY = 12
#: Run by run, which the finished runs beside each other are already.
_NOT_PRINTED = frozenset({"to-target-runs"})
#: Columns, the first of a table, that say which row it is.
_NAMES = frozenset({"method", "circumstances", "disturbance"})


# ── before anything is run ──────────────────────────────────────────────────────────────────────────────────────────
def print_standings(experiment: Experiment, standings: Sequence[Standing], console: Console) -> None:
    """One row per cell, in the order in which they are run: its state, its run, and the beginning of its hash."""
    table = plain_table(("Cell", "State", "Run", "Hash"))
    for standing in standings:
        run = standing.run.run_id if standing.run else DASH
        add_row(table, (standing.cell.title, standing.state, run, standing.cell.identity[:_SHOWN_OF_IDENTITY]))
    console.print(table)
    say(console, order_text(experiment))


def order_text(experiment: Experiment) -> str:
    """How the order of the runs came about."""
    seeds = list(dict.fromkeys(cell.seed for cell in experiment.cells))
    blocks = "1 block" if len(seeds) == 1 else f"{len(seeds)} blocks"
    return (
        f"order: {blocks}, one for each seed ({', '.join(map(str, seeds))}); within a block drawn by "
        f"order_seed {experiment.order_seed}"
    )


# ── afterwards ──────────────────────────────────────────────────────────────────────────────────────────────────────
def print_outcome(
    experiment: Experiment,
    standings: Sequence[Standing],
    console: Console,
    *,
    target: float | None = None,
    reference: str | None = None,
) -> None:
    """The finished runs beside each other, the methods over their seeds, and what was not done, with the reason.

    Raises UsageError for a `reference` that is no label of the experiment.
    """
    if any(standing.state == DONE for standing in standings):
        material = material_of_experiment(experiment, standings, target=target, reference=reference)
        _print_runs(material, console)
        for note in _unlike(material):
            say(console, f"Not like for like: {note}.")
        for note in material.notes:
            say(console, note)
        _print_tables(_shown(material), console)
    for standing in standings:
        if standing.state == FAILED:
            say(console, f"failed: {standing.cell.title}: {standing.error}{_way_out(standing)}")
        elif standing.state == RUNNING:
            say(console, f"left to another process, which is running it: {standing.cell.title}")


def _print_runs(material: Material, console: Console) -> None:
    titles = {each.run.run_id: each.cell.title for each in reversed(material.standings) if each.run is not None}
    print_comparison([replace(run.summary, run=titles[run.run], conditions={}) for run in material.runs], console)


def _shown(material: Material) -> list[Table]:
    """Those of the report that fit a terminal; runs that all end early are not judged by their last round."""
    ended_early = all(group.until for group in material.groups)
    protocols = [table for table in protocol_tables(material) if table.key not in _NOT_PRINTED]
    return [*([] if ended_early else quality_tables(material)), *protocols]


def _print_tables(tables: Sequence[Table], console: Console) -> None:
    told: set[str] = set()
    for table in tables:
        console.rule(table.title, align="left")
        print_fitting(_columns(table), list(table.texts()), console)
        notes = [note for note in table.notes if note not in told]
        told.update(notes)
        for note in (table.caption, *notes):
            console.print(note, style="dim", markup=False, highlight=False)
        console.print()


def _columns(table: Table) -> Columns:
    """What a row is called is one column: a narrow terminal begins every part of the table with it."""
    names = sum(column.key in _NAMES for column in table.columns)
    (first, *_), others = table.columns[:names], enumerate(table.columns[names:], start=names)
    return {
        first.heading: lambda row: ", ".join(filter(None, row[:names])),
        **{column.heading: itemgetter(index) for index, column in others},
    }


def _way_out(standing: Standing) -> str:
    if standing.run is None:
        return "; the same command tries it again"
    return f"; --retry-failed goes on with its run {standing.run.run_id}"


def outcome_to_json(
    experiment: Experiment,
    standings: Sequence[Standing],
    *,
    target: float | None = None,
    reference: str | None = None,
) -> str:
    """{"experiment", "reference", "cells", "tables": the report's by their keys, "runs", "fairness"}.

    Raises UsageError for a `reference` that is no label of the experiment.
    """
    material = None
    if any(standing.state == DONE for standing in standings):
        material = material_of_experiment(experiment, standings, target=target, reference=reference)
    tables = [*quality_tables(material), *protocol_tables(material)] if material else []
    content = {
        "experiment": experiment.name,
        "reference": material.reference if material else reference or experiment.reference,
        "cells": cell_records(standings),
        "tables": {table.key: _table_records(table) for table in tables},
        "runs": [run_record(run.summary) for run in material.runs] if material else [],
        "fairness": _unlike(material) if material else [],
    }
    return json.dumps(content, indent=2, allow_nan=False)


def _table_records(table: Table) -> list[dict[str, Any]]:
    """Rows by the keys of their columns; an estimate is a mapping of its own."""
    keys = [column.key for column in table.columns]
    return [dict(zip(keys, map(_plain, row), strict=True)) for row in table.rows]


def _plain(value: Value) -> Any:
    return asdict(value) if isinstance(value, Estimate) else value


def cell_records(standings: Sequence[Standing]) -> list[dict[str, Any]]:
    """The cells as plain data, in the order given."""
    return [
        {
            "title": standing.cell.title,
            "label": standing.cell.label,
            "method": standing.cell.config.method,
            "seed": standing.cell.seed,
            "inventory": standing.cell.inventory.source,
            "model": standing.cell.config.model,
            "data": standing.cell.config.data.get("name"),
            "circumstances": list(standing.cell.circumstances),
            "hash": standing.cell.identity,
            "state": standing.state,
            "run": standing.run.run_id if standing.run else None,
            "error": standing.error,
        }
        for standing in standings
    ]


def _unlike(material: Material) -> list[str]:
    """What differs between methods under the same circumstances, each once, whatever the seeds."""
    notes = [", ".join(str(part) for part in (under, note) if part) for under, note, _ in unlike_table(material).rows]
    return list(dict.fromkeys(notes))


def add_row(table: Any, cells: Sequence[str]) -> None:
    """A row of plain text: what stands in square brackets is no markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def say(console: Console, text: str) -> None:
    """A line as it stands, however wide the terminal."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
