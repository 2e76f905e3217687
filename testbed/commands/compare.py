"""`testbed compare`: two runs of one method beside each other, such as an emulation and the board."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from testbed.commands._options import json_option, runs_option
from testbed.commands._table import PIPED_COLUMNS


@click.command("compare")
@click.argument("first", metavar="RUN")
@click.argument("second", metavar="RUN")
@click.option("--csv", "as_csv", is_flag=True, help="One line for each pair of figures, for a spreadsheet.")
@json_option
@runs_option
def command(first: str, second: str, as_csv: bool, as_json: bool, runs_dir: Path) -> None:
    """Say how far two runs of the same method and settings agree: an emulation and the board, or the same run twice.

    What differs in their settings is told first.  Devices stand for each other by name, else by hardware profile.
    Peaks are compared with their bounds, seconds phase by phase, energies with their intervals, quality round by round
    to the last bit, outcomes and bytes job by job.  Several methods, or several seeds, compares `testbed report`.
    """
    from testbed.errors import UsageError
    from testbed.parity.comparison import parity_of
    from testbed.parity.text import print_parity, to_csv, to_json
    from testbed.store import RunFolder

    if as_csv and as_json:
        raise click.UsageError("--csv and --json: choose one of them")
    folders = RunFolder.open(runs_dir, first), RunFolder.open(runs_dir, second)
    if folders[0].path.resolve() == folders[1].path.resolve():
        raise UsageError(f"both are run {folders[0].run_id}: name two runs (`testbed runs` lists them)")
    parity = parity_of(*folders)
    if as_csv:
        click.echo(to_csv(parity), nl=False)
    elif as_json:
        click.echo(to_json(parity))
    else:
        from rich.console import Console

        print_parity(parity, Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS))
