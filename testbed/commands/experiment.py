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

    from testbed.experiments.cells import Standing
    from testbed.experiments.experiment import Experiment

_FAILED = 1


@click.command("experiment")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the cells, where each stands, and what the rest will take, each figure with its source; start nothing.",
)
@click.option("--only", multiple=True, metavar="LABEL", help="Only the methods of this label (repeatable).")
@click.option(
    "--retry-failed",
    is_flag=True,
    help="Take on cells whose run failed, too: go on with the run, or begin anew where that cannot be.",
)
@json_option
@runs_option
def command(file: Path, dry_run: bool, only: tuple[str, ...], retry_failed: bool, as_json: bool, runs_dir: Path) -> int:
    """Run every method of FILE with every seed, on all its data, models and inventories, and compare them.

    FILE is an experiment's YAML file, or the name of one that comes along: quickstart, to_target, under_budget,
    robustness, …  A run that is done is not done again, and one that was interrupted is gone on with: the same command
    goes on.  What decides a result tells the runs apart, so a changed setting runs only what it changes.  A run that
    failed is left alone, and told.
    """
    # Before torch is imported: threads that wait for each other do not keep the trainers' cores busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from testbed.experiments.cells import FAILED
    from testbed.experiments.experiment import load_experiment

    experiment = load_experiment(file).only(only)
    if dry_run:
        return _forecast(experiment, runs_dir, retry_failed=retry_failed, as_json=as_json)
    console = Console(stderr=as_json)  # with --json, standard output is for the result
    again = ["testbed", "experiment", str(file), *(word for label in only for word in ("--only", label))]
    again += [*(["--retry-failed"] if retry_failed else []), "--runs", str(runs_dir)]
    ended = _run(experiment, runs_dir, console, again, retry_failed=retry_failed)
    _show_outcome(experiment, ended, console, as_json=as_json)
    return _FAILED if any(standing.state == FAILED for standing in ended) else 0


def _forecast(experiment: Experiment, runs_dir: Path, *, retry_failed: bool, as_json: bool) -> int:
    """Exit code 1 where a cell cannot be run: no device holds it, or its data is not there."""
    from rich.console import Console

    from testbed.experiments.cells import standings
    from testbed.experiments.forecast import Known
    from testbed.experiments.forecast_plan import forecasts
    from testbed.experiments.forecast_table import dry_run_to_json, print_forecasts
    from testbed.experiments.tables import print_standings

    console, notes = Console(), Console(stderr=True)
    found = standings(experiment.drawn, runs_dir)
    if not as_json:
        print_standings(experiment, found, console)
    ahead = forecasts(
        found,
        Known(experiment, runs_dir),
        retry_failed=retry_failed,
        say=lambda text: notes.print(text, style="dim", markup=False),
    )
    if as_json:
        click.echo(dry_run_to_json(experiment, found, ahead))
    else:
        print_forecasts(ahead, console)
    return _FAILED if any(each.outlook.error is not None for each in ahead) else 0


def _run(
    experiment: Experiment, runs_dir: Path, console: Console, again: list[str], *, retry_failed: bool
) -> list[Standing]:
    from testbed.experiments.cells import run_cells

    try:
        return run_cells(experiment, runs_dir, console, retry_failed=retry_failed)
    except KeyboardInterrupt:
        console.print(f"go on with: {shlex.join(again)}", markup=False, highlight=False, soft_wrap=True)
        raise


def _show_outcome(experiment: Experiment, ended: list[Standing], console: Console, *, as_json: bool) -> None:
    from testbed.experiments.tables import outcome_to_json, print_outcome

    if as_json:
        click.echo(outcome_to_json(experiment, ended))
    else:
        print_outcome(experiment, ended, console)
