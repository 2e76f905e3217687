"""What the cells of an experiment will take, as people and programs read it: every figure with its source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from testbed.experiments.forecast import Guess, total
from testbed.experiments.tables import cell_records, order_text, say
from testbed.quantities import DASH, bytes_text, seconds_text
from testbed.report_tables import print_fitting

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from testbed.experiments.cells import Standing
    from testbed.experiments.experiment import Experiment
    from testbed.experiments.forecast_plan import Forecast, Outlook
    from testbed.run import RunConfig


def print_forecasts(forecasts: Sequence[Forecast], console: Console) -> None:
    """One row per cell that would be run, the total, the sources, and whatever the plan refuses."""
    if not forecasts:
        say(console, "nothing is left to be run")
        return
    heads = ("To be run", "Time", "Time from", "Bytes", "Bytes from", "Disk", "Budget used")
    columns = {head: itemgetter(index) for index, head in enumerate(heads)}
    print_fitting(columns, [*map(_cells, forecasts), _total(forecasts)], console)
    for line in (*_sources(forecasts), *_memory(forecasts), *_warnings(forecasts)):
        say(console, line)


def _cells(each: Forecast) -> tuple[str, ...]:
    if each.outlook.error is not None:
        return (each.standing.cell.title, *(DASH,) * 5, "cannot be run")
    fullest = each.outlook.fullest
    return (
        each.standing.cell.title,
        seconds_text(each.seconds.value),
        each.seconds.source or DASH,
        bytes_text(each.bytes.value),
        each.bytes.source or DASH,
        bytes_text(each.disk_bytes.value),
        f"{100 * fullest.share:.0f} %" if fullest else DASH,
    )


def _total(forecasts: Sequence[Forecast]) -> tuple[str, ...]:
    running = [each for each in forecasts if each.outlook.error is None]

    def told(guesses: Sequence[Guess], text: Callable[[float], str]) -> str:
        if not guesses:
            return DASH
        value, whole = total(guesses)
        return text(value) if whole else f"at least {text(value)}" if value else DASH

    seconds = told([each.seconds for each in running], seconds_text)
    traffic = told([each.bytes for each in running], bytes_text)
    disk = told([each.disk_bytes for each in running], bytes_text)
    return ("in total", seconds, "", traffic, "", disk, "")


def _sources(forecasts: Sequence[Forecast]) -> list[str]:
    """Each once: from what the figures come."""
    running = [each for each in forecasts if each.outlook.error is None]
    lines: list[str] = []
    for name, guesses in (
        ("time", [each.seconds for each in running]),
        ("bytes", [each.bytes for each in running]),
        ("disk", [each.disk_bytes for each in running]),
    ):
        told = dict.fromkeys(f"{name} {guess.text}" if guess.source else f"{name}: {guess.text}" for guess in guesses)
        lines += told
    return lines


def _memory(forecasts: Sequence[Forecast]) -> list[str]:
    """What the plan predicts, by row, as all seeds have the same plan."""
    outlooks: dict[str, Outlook] = {each.standing.cell.row: each.outlook for each in forecasts}
    lines = []
    for row, outlook in outlooks.items():
        if outlook.error is not None:
            lines.append(f"cannot be run: {row}: {outlook.error}")
        if (fullest := outlook.fullest) is not None:
            needed, budget = bytes_text(fullest.needed_bytes), bytes_text(fullest.budget_bytes)
            lines.append(f"memory by the plan: {row}: at most {needed} of {budget}, on {fullest.device}")
        lines += [f"refused: {row} on {peak.device}: {peak.refused}" for peak in outlook.refused]
    return lines


def _warnings(forecasts: Sequence[Forecast]) -> list[str]:
    """What ends a run early leaves a cosine over all of its rounds unfinished."""
    falling = [each for each in forecasts if each.standing.cell.config.until and _falls(each.standing.cell.config)]
    rows = list(dict.fromkeys(each.standing.cell.label for each in falling))
    if not rows:
        return []
    falls = "the learning rate falls over all of the rounds (schedule: cosine)"
    early = "a run that a budget or a target ends does not see all of them; say schedule: constant"
    return [f"warning: {', '.join(rows)}: {falls}, and {early}"]


def _falls(config: RunConfig) -> bool:
    return config.schedule == "cosine" and config.rounds > 1 and config.final_learning_rate != config.learning_rate


def dry_run_to_json(experiment: Experiment, standings: Sequence[Standing], forecasts: Sequence[Forecast]) -> str:
    """{"experiment", "order", "cells": in the order in which they are run, with "forecast", "total"}."""
    known = {each.standing.cell.title: each for each in forecasts}
    cells = cell_records(standings)
    for record in cells:
        found = known.get(record["title"])
        record["forecast"] = None if found is None else _record(found)
    totals = {name: total([getattr(each, name) for each in forecasts]) for name in ("seconds", "bytes", "disk_bytes")}
    content = {
        "experiment": experiment.name,
        "order": order_text(experiment),
        "cells": cells,
        "total": {name: {"value": value, "at_least": not whole} for name, (value, whole) in totals.items()},
    }
    return json.dumps(content, indent=2)


def _record(each: Forecast) -> dict[str, Any]:
    outlook = each.outlook
    return {
        "seconds": asdict(each.seconds),
        "bytes": asdict(each.bytes),
        "disk_bytes": asdict(each.disk_bytes),
        "peaks": [asdict(peak) for peak in outlook.peaks],
        "error": outlook.error,
    }
