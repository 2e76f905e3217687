"""Runs as files for other programs: tables as Parquet, CSV or JSON, and the trained models.

exported = export([RunFolder.open(Path("runs"), "lora")], Path("results"), kind="parquet", samples=True, models=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import UsageError
from testbed.exports.files import claim, finish, write_tables
from testbed.exports.model import export_model, why_none
from testbed.exports.rows import rows_of
from testbed.exports.schema import Row, tables

if TYPE_CHECKING:
    from testbed.store import RunFolder

MODELS = "models"


@dataclass(frozen=True)
class Exported:
    """What was written: rows of each table, the folders of models, and what there was to say of it."""

    folder: Path
    rows: dict[str, int]
    models: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def export(
    runs: Sequence[RunFolder],
    folder: Path,
    *,
    kind: str,
    samples: bool,
    models: bool,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write these runs to a folder: a new one, an empty one, or one that an export has written before.

    Raises UsageError for any other folder, for a format whose library is lacking, and where models are asked for and
    no run has one; StoreError for a run that cannot be read.
    """
    notes = [f"{run.run_id} is {run.status.state}: its rows say so" for run in runs if run.status.state != "finished"]
    lacking = {run.run_id: why for run in runs if models and (why := why_none(run)) is not None}
    if models and len(lacking) == len(runs):
        raise UsageError(f"--model: {'; '.join(lacking.values())}")
    made = tables(samples=samples)
    files = [f"{table.name}.{kind}" for table in made]
    before = claim(folder, files)
    counts = write_tables(folder, made, _rows(runs, say, samples=samples), kind)
    copied = [_copied(run, folder / MODELS / run.run_id) for run in runs if models and run.run_id not in lacking]
    files += [path.relative_to(folder).as_posix() for _, paths in copied for path in paths]
    finish(folder, made, files, before, [run.run_id for run in runs])
    return Exported(folder, counts, tuple(target for target, _ in copied), (*notes, *lacking.values()))


def _rows(runs: Sequence[RunFolder], say: Callable[[str], None], *, samples: bool) -> Iterator[Row]:
    for number, run in enumerate(runs, start=1):
        if len(runs) > 1:
            say(f"run {number} of {len(runs)}: {run.run_id}")
        yield from rows_of(run, samples=samples)


def _copied(run: RunFolder, target: Path) -> tuple[Path, list[Path]]:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target, export_model(run, target)
