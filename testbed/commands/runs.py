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
    from rich.console import Console
    from rich.text import Text

    from testbed.quantities import number_text
    from testbed.report_tables import plain_table

    table = plain_table(("Run", "State", "Rounds", "Accuracy", "Loss", "Data", "Model", "Seed", "Started (UTC)"))
    for row in rows:
        cells = (
            row.run,
            row.state,
            f"{row.rounds_done}/{row.rounds}" if row.rounds is not None else str(row.rounds_done),
            number_text(row.accuracy),
            number_text(row.loss),
            row.data or "",
            row.model or "",
            "" if row.seed is None else str(row.seed),
            (row.started or "").replace("T", " ").removesuffix("+00:00"),
        )
        table.add_row(*map(Text, cells))
    Console().print(table)
