"""What came of an experiment, as people and programs read it; and before, where its cells stand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from testbed.experiments.cells import DONE, FAILED, RUNNING
from testbed.experiments.outcome import Outcome, end_table
from testbed.experiments.protocols import protocol_tables
from testbed.quantities import DASH
from testbed.report import fairness
from testbed.report_tables import plain_table, print_comparison, print_fitting, run_record

if TYPE_CHECKING:
    from rich.console import Console

    from testbed.experiments.cells import Standing
    from testbed.experiments.experiment import Cell, Experiment
    from testbed.reports.exhibits import Table

_SHOWN_OF_IDENTITY = 12


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
def print_outcome(experiment: Experiment, standings: Sequence[Standing], console: Console) -> None:
    """The finished runs beside each other, the methods over their seeds, and what was not done, with the reason."""
    outcome = Outcome.of(experiment, standings)
    if outcome.done:
        titles = {standing.cell.identity: standing.cell.title for standing in reversed(standings)}
        runs = [replace(run.summary, run=titles[cell], conditions={}) for cell, run in outcome.done.items()]
        print_comparison(runs, console)
        for note in _unlike(outcome):
            say(console, f"Not like for like: {note}.")
        for table in _tables(outcome):
            _print_table(table, console)
    for standing in standings:
        if standing.state == FAILED:
            say(console, f"failed: {standing.cell.title}: {standing.error}{_way_out(standing)}")
        elif standing.state == RUNNING:
            say(console, f"left to another process, which is running it: {standing.cell.title}")


def _tables(outcome: Outcome) -> list[Table]:
    """Runs that a budget or a target ended are judged by that, and not by where their last round left them."""
    ended_early = bool(outcome.experiment.protocol.until)
    return [*([] if ended_early else [end_table(outcome)]), *protocol_tables(outcome)]


def _print_table(table: Table, console: Console) -> None:
    console.rule(table.title, align="left")
    columns = {column.heading: itemgetter(index) for index, column in enumerate(table.columns)}
    print_fitting(columns, list(table.texts()), console)
    for note in (table.caption, *table.notes):
        console.print(note, style="dim", markup=False, highlight=False)
    console.print()


def _way_out(standing: Standing) -> str:
    if standing.run is None:
        return "; the same command tries it again"
    return f"; --retry-failed goes on with its run {standing.run.run_id}"


def outcome_to_json(experiment: Experiment, standings: Sequence[Standing]) -> str:
    """{"experiment", "reference", "cells", "rows": methods over seeds, "protocol", "runs", "fairness"}."""
    outcome = Outcome.of(experiment, standings)
    content = {
        "experiment": experiment.name,
        "reference": experiment.reference,
        "cells": cell_records(standings),
        "rows": _table_records(end_table(outcome)),
        "protocol": {table.key: _table_records(table) for table in protocol_tables(outcome)},
        "runs": [run_record(run.summary) for run in outcome.done.values()],
        "fairness": _unlike(outcome),
    }
    return json.dumps(content, indent=2, allow_nan=False)


def _table_records(table: Table) -> list[dict[str, Any]]:
    """Rows by the keys of their columns; an estimate is a mapping of its own."""
    keys = [column.key for column in table.columns]
    return [dict(zip(keys, map(_plain, row), strict=True)) for row in table.rows]


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


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


def _unlike(outcome: Outcome) -> list[str]:
    """What differs between methods with the same seed under the same circumstances, and should not."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for standing in outcome.standings:
        if standing.state == DONE and standing.cell.identity in outcome.done:
            cell = standing.cell
            groups.setdefault((cell.circumstances, cell.seed), []).append(cell)
    notes = [
        ", ".join((*cells[0].circumstances, note))
        for cells in groups.values()
        for note in fairness([replace(outcome.done[cell.identity].summary, run=cell.label) for cell in cells])
    ]
    return list(dict.fromkeys(notes))


def add_row(table: Any, cells: Sequence[str]) -> None:
    """A row of plain text: what stands in square brackets is no markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def say(console: Console, text: str) -> None:
    """A line as it stands, however wide the terminal."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
