"""`testbed clean`: clear away what runs left on the devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.commands._options import inventory_options, read_inventory, runs_option

if TYPE_CHECKING:
    from testbed.fleet import Told


@click.command("clean")
@inventory_options
@runs_option
@click.option("--run", "run", metavar="RUN", help="Only what this run left, finished or not.")
@click.option("--all", "everything", is_flag=True, help="Of every run, also of those that could still be resumed.")
@click.option("--contents", is_flag=True, help="Also model blocks, shards and code, which the next run sends again.")
def command(
    inventory: Path | None, only: tuple[str, ...], runs_dir: Path, run: str | None, everything: bool, contents: bool
) -> int:
    """Remove from the devices the spools of finished runs; what a run that is not finished needs stays.

    A device that a run holds keeps what that run needs.  Environments stay: `testbed provision` made them.
    """
    from testbed.fleet import Remote, ask_all

    if run and everything:
        raise click.UsageError("--run and --all: choose one of them")
    devices = read_inventory(inventory, only)
    runs = None if everything else _runs(runs_dir, run)
    told = ask_all(devices, lambda remote: Remote.tidy(remote, runs, contents=contents))
    for each in told:
        click.echo(_line(each), err=each.error is not None)
    if not told:
        click.echo("every device is emulated on this machine: what a run left there is in its folder, and goes with it")
    return int(any(each.error is not None for each in told))


def _runs(runs_dir: Path, run: str | None) -> list[str]:
    from testbed.run_record import FINISHED
    from testbed.store import RunFolder, list_runs

    if run:
        return [RunFolder.open(runs_dir, run).run_id]
    return [row.run for row in list_runs(runs_dir) if row.state == FINISHED]


def _line(each: Told) -> str:
    from testbed.quantities import bytes_text

    if each.error is not None:
        return str(each.error)
    gone = each.answer
    parts = [f"{len(gone['runs'])} runs removed, {bytes_text(gone['bytes'])} freed"]
    if gone["busy"]:
        parts.append(f"left alone, because they are at work or hold the device: {', '.join(gone['busy'])}")
    return f"device {each.device.name}: {'; '.join(parts)}"
