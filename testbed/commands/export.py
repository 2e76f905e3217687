"""`testbed export`: runs as files for other programs, or into an experiment tracker."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.commands._options import runs_option
from testbed.errors import UsageError
from testbed.exports.files import FORMATS, PARQUET

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from testbed.exports.mlflow import MlflowTarget
    from testbed.exports.wandb import WandbTarget
    from testbed.store import RunFolder

MLFLOW, WANDB = "mlflow", "wandb"
_PROJECT = "edge-testbed"


@click.command("export")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="The folder for the files.")
@click.option("--format", "kind", type=click.Choice(FORMATS), default=PARQUET, show_default=True, help="Of the tables.")
@click.option("--samples/--no-samples", default=True, help="With the raw samples of memory and power  [default: with].")
@click.option("--model", "models", is_flag=True, help="With the trained models, each with a card that says what it is.")
@click.option("--to", "tracker", type=click.Choice((MLFLOW, WANDB)), help="Into this tracker, by its own client.")
@click.option("--uri", help="With --to mlflow: http://HOST:5000, sqlite:///FILE or a folder  [MLFLOW_TRACKING_URI].")
@click.option(
    "--project", help=f"With --to: the project, or MLflow's experiment  [the experiment's name, or {_PROJECT}]."
)
@runs_option
def command(
    runs: tuple[str, ...],
    output: Path | None,
    tracker: str | None,
    uri: str | None,
    project: str | None,
    runs_dir: Path,
    **what: Any,
) -> None:
    """Write each RUN as tables (runs, devices, rounds, jobs, phases, samples) and, if asked for, its trained model.

    A RUN is an id as `testbed runs` lists them, the beginning of one that no other run shares, a path, or an
    experiment's file or name with all of its runs.  DIR is made; one that an export has written is written anew, any
    other that is not empty is refused.  What was not measured is null, or an empty field.
    """
    from testbed.commands._chosen import chosen_folders

    _check(output, tracker, uri, project)
    folders = chosen_folders(runs, runs_dir)
    if output is not None:
        _write(folders, output, **what)
    if tracker is not None:
        _track(folders, _target(tracker, uri, project), project, **what)


def _check(output: Path | None, tracker: str | None, uri: str | None, project: str | None) -> None:
    if output is None and tracker is None:
        raise UsageError("say where to: -o DIR for files, or --to mlflow or --to wandb")
    if uri is not None and tracker != MLFLOW:
        raise UsageError("--uri goes with --to mlflow")
    if project is not None and tracker is None:
        raise UsageError("--project goes with --to mlflow or --to wandb")


def _write(folders: Sequence[RunFolder], output: Path, **what: Any) -> None:
    from testbed.exports.folder import export

    done = export(folders, output, say=lambda text: click.echo(text, err=True), **what)
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    rows = ", ".join(f"{name} {count}" for name, count in done.rows.items())
    click.echo(f"{len(folders)} run{'' if len(folders) == 1 else 's'} in {output} (rows: {rows})")
    for model in done.models:
        click.echo(f"model: {model}")


def _target(tracker: str, uri: str | None, project: str | None) -> MlflowTarget | WandbTarget:
    if tracker == MLFLOW:
        from testbed.exports.mlflow import MlflowTarget

        return MlflowTarget(uri)
    from testbed.exports.wandb import WandbTarget

    return WandbTarget(project or _PROJECT)


def _track(folders: Sequence[RunFolder], target: MlflowTarget | WandbTarget, project: str | None, **what: Any) -> None:
    from testbed.exports.tracking import tracked

    for folder in folders:
        run = tracked(folder)
        name = project or run.tags.get("experiment") or _PROJECT
        with _files(folder, **what) as files:
            made = target.put(run, name, files)
        click.echo(f"run {run.run} is {made} in {name}")


@contextmanager
def _files(folder: RunFolder, *, models: bool, **what: Any) -> Iterator[Path]:
    """A run's tables, and its model if that is asked for and there is one, as the artifacts of a tracked run."""
    from testbed.exports.folder import export
    from testbed.exports.model import why_none

    with tempfile.TemporaryDirectory(prefix="testbed-export-") as made:
        export([folder], Path(made), models=models and why_none(folder) is None, **what)
        yield Path(made)
