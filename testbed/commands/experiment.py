"""`testbed experiment FILE`: a matrix of methods, seeds, data, models and inventories, run and compared."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.commands._options import json_option, runs_option

if TYPE_CHECKING:
    from rich.console import Console

    from testbed.experiment import Experiment
    from testbed.experiment_cells import Standing

_FAILED = 1


@click.command("experiment")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the cells and where each stands; nothing is started.")
@click.option("--only", multiple=True, metavar="LABEL", help="Only the methods of this label (repeatable).")
@json_option
@runs_option
def command(file: Path, dry_run: bool, only: tuple[str, ...], as_json: bool, runs_dir: Path) -> int:
    """Run every method of FILE with every seed, on all its data, models and inventories, and compare them.

    FILE is an experiment's YAML file, or the name of one that comes along: quickstart.  A run that is done is not
    done again, and one that was interrupted is gone on with: the same command goes on.  What decides a result tells
    the runs apart, so a changed setting runs only what it changes.
    """
    # Before torch is imported: threads that wait for each other do not keep the trainers' cores busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from testbed.experiment import load_experiment
    from testbed.experiment_cells import FAILED

    experiment = load_experiment(file).only(only)
    if dry_run:
        _show_standings(experiment, runs_dir, as_json=as_json)
        return 0
    console = Console(stderr=as_json)  # with --json, standard output is for the result
    again = ["testbed", "experiment", str(file), *(word for label in only for word in ("--only", label))]
    ended = _run(experiment, runs_dir, console, [*again, "--runs", str(runs_dir)])
    _show_outcome(experiment, ended, console, as_json=as_json)
    return _FAILED if any(standing.state == FAILED for standing in ended) else 0


def _show_standings(experiment: Experiment, runs_dir: Path, *, as_json: bool) -> None:
    from rich.console import Console

    from testbed.experiment_cells import standings
    from testbed.experiment_tables import print_standings, standings_to_json

    found = standings(experiment.cells, runs_dir)
    if as_json:
        click.echo(standings_to_json(experiment, found))
    else:
        print_standings(found, Console())


def _run(experiment: Experiment, runs_dir: Path, console: Console, again: list[str]) -> list[Standing]:
    from testbed.experiment_cells import run_cells

    try:
        return run_cells(experiment, runs_dir, console)
    except KeyboardInterrupt:
        console.print(f"go on with: {shlex.join(again)}", markup=False, highlight=False, soft_wrap=True)
        raise


def _show_outcome(experiment: Experiment, ended: list[Standing], console: Console, *, as_json: bool) -> None:
    from testbed.experiment_tables import outcome_to_json, print_outcome

    if as_json:
        click.echo(outcome_to_json(experiment, ended))
    else:
        print_outcome(ended, console)
