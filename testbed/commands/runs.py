"""`testbed runs`: which runs there are."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.commands._options import runs_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.report_tables import Columns
    from testbed.run_index import RunRow


@click.command("runs")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
@click.option("--reindex", "rebuild", is_flag=True, help="First build the index again from the run folders.")
@runs_option
def command(as_json: bool, rebuild: bool, runs_dir: Path) -> None:
    """List all runs, oldest first."""
    from testbed.store import list_runs, reindex

    if rebuild:
        reindex(runs_dir)
    rows = list_runs(runs_dir)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    elif rows:
        _print(rows)
    else:
        click.echo(f"There are no runs in {runs_dir} yet; `testbed run-method METHOD` makes one.")


def _print(rows: Sequence[RunRow]) -> None:
    import sys

    from rich.console import Console

    from testbed.commands._table import PIPED_COLUMNS
    from testbed.quantities import number_text
    from testbed.report_tables import print_fitting

    columns: Columns = {
        "Run": lambda row: row.run,
        "State": lambda row: row.state,
        "Rounds": lambda row: str(row.rounds_done) if row.rounds is None else f"{row.rounds_done}/{row.rounds}",
        "Accuracy": lambda row: number_text(row.accuracy),
        "Loss": lambda row: number_text(row.loss),
        "Data": lambda row: row.data or "",
        "Model": lambda row: row.model or "",
        "Seed": lambda row: "" if row.seed is None else str(row.seed),
        "Started (UTC)": lambda row: (row.started or "").replace("T", " ").removesuffix("+00:00"),
    }
    print_fitting(columns, rows, Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS))
