"""`testbed report`: the figures of one run, or of several beside each other."""

from __future__ import annotations

from pathlib import Path

import click

from testbed.commands._options import runs_option


@click.command("report")
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option("--target", type=click.FloatRange(0, 1), help="Tell the rounds and seconds until this accuracy.")
@click.option("--csv", "as_csv", is_flag=True, help="One line per run and per device, for a spreadsheet.")
@click.option("--json", "as_json", is_flag=True, help="The same numbers for a program.")
@runs_option
def command(runs: tuple[str, ...], target: float | None, as_csv: bool, as_json: bool, runs_dir: Path) -> None:
    """Print quality, time, memory and traffic of each RUN, and compare several.

    Without RUN: the newest finished run of every method.  A RUN is an id as `testbed runs` lists them, the beginning
    of one that no other run shares, or a path.
    """
    from testbed.report import summarise
    from testbed.report_tables import print_report, to_csv, to_json
    from testbed.store import RunFolder, newest_of_each_method

    if as_csv and as_json:
        raise click.UsageError("--csv and --json: choose one of them")
    chosen = dict.fromkeys(runs or newest_of_each_method(runs_dir))
    summaries = [summarise(RunFolder.open(runs_dir, run), target) for run in chosen]
    if as_csv:
        click.echo(to_csv(summaries), nl=False)
    elif as_json:
        click.echo(to_json(summaries))
    else:
        from rich.console import Console

        print_report(summaries, Console())
