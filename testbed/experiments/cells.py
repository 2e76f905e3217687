"""The cells of an experiment, one after another: each is found done, gone on with, or begun.

A cell's run is an ordinary run folder.  Its configuration holds the cell's identity, by which it is found again.
Who is at a cell holds a lock of the kernel on a file of that name, which is free again however that process ends.
A run that failed is left alone until somebody asks for it: what made it fail is likely still there.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed import run_record
from testbed.durable import disk_errors_in_words
from testbed.errors import StoreError, TestbedError
from testbed.experiments.forecast import MARK, Known
from testbed.experiments.pace import left_text
from testbed.run_record import FINISHED
from testbed.store import RunFolder, run_folders

if TYPE_CHECKING:
    from rich.console import Console

    from testbed.experiments.experiment import Cell, Experiment

LOCKS = ".cells"

DONE = "done"
RUNNING = "running"
UNFINISHED = "unfinished"
NEW = "new"
FAILED = "failed"


@dataclass(frozen=True)
class Standing:
    """Where a cell stands: its run, if there is one, and why that failed."""

    cell: Cell
    state: str  # DONE, RUNNING (another process is at it), UNFINISHED, NEW or FAILED
    run: RunFolder | None = None
    error: str | None = None


def standings(cells: Sequence[Cell], runs_dir: Path) -> list[Standing]:
    """Where the cells stand according to the run folders; touches nothing."""
    found = _runs_of_cells(runs_dir)
    return [_standing(cell, found.get(cell.identity, ())) for cell in cells]


def run_cells(
    experiment: Experiment, runs_dir: Path, console: Console, *, retry_failed: bool = False
) -> list[Standing]:
    """Do what is not done, in the order that was drawn; where each cell then stands, in the order of the file.

    A cell that fails, or that another process is at, does not keep the others from it.
    """
    cells = experiment.drawn
    known = Known(experiment, runs_dir)
    ended: dict[str, Standing] = {}
    for number, cell in enumerate(cells, start=1):
        ahead = [each for each in standings(cells[number - 1 :], runs_dir) if waits(each, retry_failed=retry_failed)]
        console.rule(f"cell {number} of {len(cells)}: {cell.title}{left_text(known, ahead)}", align="left")
        standing = _run_cell(experiment, cell, runs_dir, console, retry_failed=retry_failed)
        console.print(_line(standing), markup=False, highlight=False, soft_wrap=True)
        ended[cell.title] = standing
        if standing.run is not None:
            known.add(standing.run)
    return [ended[cell.title] for cell in experiment.cells]


def waits(standing: Standing, *, retry_failed: bool) -> bool:
    """Whether this process would take the cell on."""
    return standing.state in {UNFINISHED, NEW} or (retry_failed and standing.state == FAILED)


def _run_cell(experiment: Experiment, cell: Cell, runs_dir: Path, console: Console, *, retry_failed: bool) -> Standing:
    with _held(cell, runs_dir) as ours:
        (before,) = standings([cell], runs_dir)  # under the lock: another process may have done it meanwhile
        if not ours or before.state in {DONE, RUNNING}:
            return before if ours or before.state == DONE else Standing(cell, RUNNING, before.run)
        if before.state == FAILED and not retry_failed:
            return before
        try:
            _run(experiment, before, runs_dir, console)
        except TestbedError as error:
            (after,) = standings([cell], runs_dir)
            return replace(after, state=FAILED, error=str(error))
        return standings([cell], runs_dir)[0]


def _run(experiment: Experiment, standing: Standing, runs_dir: Path, console: Console) -> None:
    from testbed import session
    from testbed.prepare import prepare

    if standing.run is not None:
        try:
            restored = session.restored(standing.run)
        except TestbedError as error:
            if standing.state != FAILED:
                raise
            text = f"run {standing.run.run_id} cannot be gone on with, and the cell is begun anew: {error}"
            console.print(text, style="yellow", markup=False, soft_wrap=True)
        else:
            session.run(restored, standing.run, console)
            return
    cell = standing.cell
    prepared = prepare(cell.config, cell.inventory, lambda text: console.print(text, style="dim", markup=False))
    mark = {"cell": cell.identity, "label": cell.label, "name": experiment.name}
    session.run(prepared, session.new_folder(prepared, runs_dir, **{MARK: mark}), console)


def _line(standing: Standing) -> str:
    run = standing.run.run_id if standing.run else None
    return {
        DONE: f"done: run {run}",
        RUNNING: "left alone: another process is running it",
        FAILED: f"failed: {standing.error}",
        UNFINISHED: f"unfinished: run {run}",
    }[standing.state]


# ── the run of a cell ───────────────────────────────────────────────────────────────────────────────────────────────
def _standing(cell: Cell, runs: Sequence[tuple[RunFolder, str]]) -> Standing:
    """By the run that is farthest; of several, by the newest."""
    for state in (DONE, RUNNING, UNFINISHED, FAILED):
        for run, own in reversed(runs):
            if own == state:
                return Standing(cell, state, run, run.status.error if state == FAILED else None)
    return Standing(cell, NEW)


def _runs_of_cells(runs_dir: Path) -> dict[str, list[tuple[RunFolder, str]]]:
    """Identity → the runs of that cell with their states, oldest first."""
    found: dict[str, list[tuple[RunFolder, str]]] = {}
    for folder in map(RunFolder, run_folders(runs_dir)):
        try:
            mark, state = folder.config.get(MARK), _state(folder)
        except StoreError:
            continue  # a folder that cannot be read is nobody's cell; `testbed runs` tells what is wrong with it
        if isinstance(mark, Mapping):
            found.setdefault(str(mark.get("cell")), []).append((folder, state))
    return found


def _state(folder: RunFolder) -> str:
    status = folder.status
    if status.alive:
        return RUNNING
    return {FINISHED: DONE, run_record.FAILED: FAILED}.get(status.state, UNFINISHED)


@contextmanager
def _held(cell: Cell, runs_dir: Path) -> Iterator[bool]:
    """Hold the cell against other processes; False where another one holds it."""
    path = runs_dir / LOCKS / cell.identity
    with disk_errors_in_words(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("ab")
    with stream:
        yield _locked(stream)


def _locked(stream: Any) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
