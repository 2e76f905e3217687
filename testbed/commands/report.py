"""`testbed report`: what came of one run, of several or of an experiment: printed, on a page, or for a paper."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.commands._options import runs_option
from testbed.errors import StoreError, UsageError

if TYPE_CHECKING:
    from testbed.experiments.cells import Standing
    from testbed.experiments.experiment import Experiment
    from testbed.reports.exhibits import Report
    from testbed.store import RunFolder

_EXPERIMENT_FILES = (".yaml", ".yml")
_PAGES = (".html", ".htm")


@dataclass(frozen=True)
class _Chosen:
    """What is reported: runs, or the cells of an experiment with the runs of those that are done."""

    runs: Sequence[RunFolder]
    experiment: Experiment | None = None
    standings: Sequence[Standing] = ()


@click.command("report")
@click.argument("runs", metavar="[RUN]...|EXPERIMENT", nargs=-1)
@click.option("-o", "--output", "page", metavar="FILE.html", type=click.Path(path_type=Path), help="Write a page.")
@click.option(
    "--paper", metavar="DIR", type=click.Path(path_type=Path), help="Write every figure and table as files for a paper."
)
@click.option("--reference", metavar="LABEL", help="The label that the others are compared with.")
@click.option("--target", type=click.FloatRange(0, 1), help="Tell the rounds and seconds until this accuracy.")
@click.option("--csv", "as_csv", is_flag=True, help="One line per run and per device, for a spreadsheet.")
@click.option("--json", "as_json", is_flag=True, help="The same numbers for a program.")
@runs_option
def command(
    runs: tuple[str, ...],
    page: Path | None,
    paper: Path | None,
    reference: str | None,
    target: float | None,
    as_csv: bool,
    as_json: bool,
    runs_dir: Path,
) -> None:
    """Report quality, time, memory, energy and traffic of each RUN, and compare several.

    Without RUN: the newest finished run of every method.  A RUN is an id as `testbed runs` lists them, the beginning
    of one that no other run shares, or a path.  EXPERIMENT is an experiment's file, or the name of one that comes
    along: its runs that are done.

    With -o the report is one HTML file that stands alone; with --paper figures as PDF, SVG and PNG, and tables as
    LaTeX, CSV and Markdown, into a folder that is new, empty, or written by --paper before.
    """
    _check_options(page, paper, as_csv=as_csv, as_json=as_json)
    chosen = _chosen(runs, runs_dir)
    if page or paper:
        _write(chosen, page, paper, target, reference)
    elif chosen.experiment and not as_csv:
        _print_experiment(chosen.experiment, chosen.standings, target, reference, as_json=as_json)
    else:
        _check_reference(reference)
        _print_runs(chosen.runs, target, as_csv=as_csv, as_json=as_json)


# ── what was asked for ──────────────────────────────────────────────────────────────────────────────────────────────
def _check_options(page: Path | None, paper: Path | None, *, as_csv: bool, as_json: bool) -> None:
    """Before anything is read: a long report is not lost to a wrong place."""
    if as_csv and as_json:
        raise click.UsageError("--csv and --json: choose one of them")
    if (page or paper) and (as_csv or as_json):
        raise click.UsageError("-o and --paper write files, --csv and --json print: choose one kind")
    if page:
        _check_page(page)
    if paper:
        from testbed.reports.paper import check_folder

        check_folder(paper)
        _check_writable("--paper", paper, paper)


def _check_reference(reference: str | None) -> None:
    """Where runs are printed one by one, nothing is compared with a reference."""
    if reference is not None:
        raise click.UsageError(
            "--reference tells what others are compared with: name an experiment, or add -o FILE.html or --paper DIR"
        )


def _check_page(page: Path) -> None:
    if page.is_dir():
        raise UsageError(f"-o {page}: is a folder; name the file: -o {page / 'report.html'}")
    if page.suffix.lower() not in _PAGES:
        raise UsageError(
            f"-o {page}: the page is HTML; name it so: -o {page.with_name((page.stem or 'report') + '.html')}"
        )
    _check_writable("-o", page, page.parent)


def _check_writable(option: str, path: Path, folder: Path) -> None:
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UsageError(f"{option} {path}: {there} is a file, not a folder; name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path}: {there} is not writable; name another place")


def _chosen(runs: Sequence[str], runs_dir: Path) -> _Chosen:
    from testbed.store import RunFolder, newest_of_each_method

    files = [run for run in runs if _is_experiment(run, runs_dir)]
    if not files:
        names = dict.fromkeys(runs or newest_of_each_method(runs_dir))
        return _Chosen([RunFolder.open(runs_dir, name) for name in names])
    if len(runs) > 1:
        raise UsageError(f"{files[0]} is an experiment, which stands for all of its runs: name it alone, or runs alone")
    return _cells_of(files[0], runs_dir)


def _is_experiment(word: str, runs_dir: Path) -> bool:
    return Path(word).suffix in _EXPERIMENT_FILES or (word in _bundled() and not (runs_dir / word).exists())


def _bundled() -> list[str]:
    from testbed.experiments.experiment import bundled

    return sorted(bundled())


def _cells_of(name: str, runs_dir: Path) -> _Chosen:
    from testbed.experiments.cells import DONE, standings
    from testbed.experiments.experiment import load_experiment

    experiment = load_experiment(Path(name))
    found = standings(experiment.cells, runs_dir)
    done = {standing.run.run_id: standing.run for standing in found if standing.state == DONE and standing.run}
    if not done:
        raise StoreError(
            f"{runs_dir}: none of the {len(found)} runs of {experiment.name} is done; `testbed experiment {name}` "
            "makes them, and --runs says where they are kept"
        )
    return _Chosen(list(done.values()), experiment, found)


# ── printed ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _print_runs(runs: Sequence[RunFolder], target: float | None, *, as_csv: bool, as_json: bool) -> None:
    from testbed.report import summarise
    from testbed.report_tables import print_report, to_csv, to_json

    summaries = [summarise(run, target) for run in runs]
    if as_csv:
        click.echo(to_csv(summaries), nl=False)
    elif as_json:
        click.echo(to_json(summaries))
    else:
        from rich.console import Console

        print_report(summaries, Console())


def _print_experiment(
    experiment: Experiment,
    standings: Sequence[Standing],
    target: float | None,
    reference: str | None,
    *,
    as_json: bool,
) -> None:
    from rich.console import Console

    from testbed.experiments.tables import outcome_to_json, print_outcome

    if as_json:
        click.echo(outcome_to_json(experiment, standings, target=target, reference=reference))
    else:
        print_outcome(experiment, standings, Console(), target=target, reference=reference)


# ── written ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _write(chosen: _Chosen, page: Path | None, paper: Path | None, target: float | None, reference: str | None) -> None:
    from testbed.reports.files import write_file
    from testbed.reports.page import page_of
    from testbed.reports.paper import write_paper

    report = _report(chosen, target, reference)
    with _progress(report, bool(page) + bool(paper)) as tell:
        if page:
            _say_page(write_file(page, page_of(report, tell)), report)
        if paper:
            written = write_paper(report, paper, tell)
            click.echo(f"{paper}: {len(written)} files, listed in {written[-1]}")
    undone = sum(standing.run is None or standing.state != "done" for standing in chosen.standings)
    if undone:
        click.echo(
            f"{undone} of {len(chosen.standings)} runs of the experiment are not done: the report says which", err=True
        )


def _report(chosen: _Chosen, target: float | None, reference: str | None) -> Report:
    from rich.console import Console

    from testbed.reports.gather import report_on
    from testbed.reports.grouping import material_of, material_of_experiment

    with Console(stderr=True).status(f"reading {len(chosen.runs)} runs …"):
        if chosen.experiment:
            material = material_of_experiment(chosen.experiment, chosen.standings, target=target, reference=reference)
        else:
            material = material_of(chosen.runs, target=target, reference=reference)
        return report_on(material, _title(chosen))


def _title(chosen: _Chosen) -> str:
    if chosen.experiment:
        return chosen.experiment.name
    methods = list(dict.fromkeys(str(run.config.get("method")) for run in chosen.runs))
    if len(chosen.runs) == 1:
        return f"A run of {methods[0]}"
    named = ", ".join(methods) if len(methods) <= 4 else f"{len(methods)} methods"
    return f"{len(chosen.runs)} runs of {named}"


def _say_page(page: Path, report: Report) -> None:
    from testbed.quantities import bytes_text
    from testbed.reports.exhibits import Figure

    figures = sum(isinstance(exhibit, Figure) for exhibit in report.exhibits)
    tables = len(report.exhibits) - figures
    click.echo(f"{page}: {bytes_text(page.stat().st_size)}, {figures} figures, {tables} tables")


@contextmanager
def _progress(report: Report, forms: int) -> Iterator[Callable[[str], None]]:
    """On a terminal's stderr: what is being drawn, and how much is left."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=forms * len(report.exhibits))

        def tell(title: str) -> None:
            progress.update(task, advance=1, description=escape(title))

        yield tell
