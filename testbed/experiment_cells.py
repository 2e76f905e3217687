"""The cells of an experiment, one after another: each is found done, gone on with, or begun.

A cell's run is an ordinary run folder.  Its configuration holds the cell's identity, by which it is found again.
Who is at a cell holds a lock of the kernel on a file of that name, which is free again however that process ends.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.durable import disk_errors_in_words
from testbed.errors import StoreError, TestbedError
from testbed.run_record import FINISHED
from testbed.store import RunFolder, run_folders

if TYPE_CHECKING:
    from rich.console import Console

    from testbed.experiment import Cell, Experiment

#: In a run's configuration: {"cell": identity, "label": …, "name": the experiment's}.
MARK = "experiment"
LOCKS = ".cells"

DONE = "done"
RUNNING = "running"
UNFINISHED = "unfinished"
NEW = "new"
FAILED = "failed"


@dataclass(frozen=True)
class Standing:
    """Where a cell stands: its run, if there is one, and why it failed in this pass."""

    cell: Cell
    state: str  # DONE, RUNNING (another process is at it), UNFINISHED, NEW or FAILED
    run: RunFolder | None = None
    error: str | None = None


def standings(cells: Sequence[Cell], runs_dir: Path) -> list[Standing]:
    """Where the cells stand according to the run folders; touches nothing."""
    found = _runs_of_cells(runs_dir)
    return [_standing(cell, found.get(cell.identity, ())) for cell in cells]


def run_cells(experiment: Experiment, runs_dir: Path, console: Console) -> list[Standing]:
    """Do what is not done.  A cell that fails, or that another process is at, does not keep the others from it."""
    ended = []
    for number, cell in enumerate(experiment.cells, start=1):
        console.rule(f"cell {number} of {len(experiment.cells)}: {cell.title}", align="left")
        ended.append(_run_cell(experiment, cell, runs_dir, console))
        console.print(_line(ended[-1]), markup=False, highlight=False, soft_wrap=True)
    return ended


def _run_cell(experiment: Experiment, cell: Cell, runs_dir: Path, console: Console) -> Standing:
    with _held(cell, runs_dir) as ours:
        (before,) = standings([cell], runs_dir)  # under the lock: another process may have done it meanwhile
        if not ours or before.state in {DONE, RUNNING}:
            return before if ours or before.state == DONE else Standing(cell, RUNNING, before.run)
        try:
            _run(experiment, before, runs_dir, console)
        except TestbedError as error:
            (after,) = standings([cell], runs_dir)
            return Standing(cell, FAILED, after.run, str(error))
        return standings([cell], runs_dir)[0]


def _run(experiment: Experiment, standing: Standing, runs_dir: Path, console: Console) -> None:
    from testbed import session
    from testbed.prepare import prepare

    if standing.run is not None:
        session.run(session.restored(standing.run), standing.run, console)
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
    }[standing.state]


# ── the run of a cell ───────────────────────────────────────────────────────────────────────────────────────────────
def _standing(cell: Cell, runs: Sequence[tuple[RunFolder, str]]) -> Standing:
    """By the run that is farthest; of several, by the newest."""
    for state in (DONE, RUNNING, UNFINISHED):
        for run, own in reversed(runs):
            if own == state:
                return Standing(cell, state, run)
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
    if status.state == FINISHED:
        return DONE
    return RUNNING if status.alive else UNFINISHED


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
