"""A report from runs, or from the cells of an experiment: its sections in the order in which one reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING

from testbed.reports.energy import energy
from testbed.reports.exhibits import Figure, Report, Section, Table
from testbed.reports.frontiers import frontiers
from testbed.reports.grouping import material_of
from testbed.reports.memory import memory
from testbed.reports.outcomes import outcomes, traffic
from testbed.reports.protocols import protocols
from testbed.reports.quality import quality
from testbed.reports.tables import FEW, every_figure, what_was_run
from testbed.reports.times import times
from testbed.reports.words import unique

if TYPE_CHECKING:
    from testbed.experiments.cells import Standing
    from testbed.reports.material import Evidence, Material
    from testbed.store import RunFolder

_SECTIONS: tuple[Callable[[Material], Section | None], ...] = (
    what_was_run, quality, protocols, memory, frontiers, energy, times, traffic, outcomes, every_figure,
)  # fmt: skip
_SHOWN_OF_COMMIT = 12


def report_of(
    folders: Sequence[RunFolder],
    *,
    title: str,
    target: float | None = None,
    experiment: Sequence[Standing] | None = None,
    reference: str | None = None,
    rows: Sequence[str] = (),
) -> Report:
    """What these runs show; of an experiment also which cells are not done.

    `experiment`: its standings, which name the runs' labels and circumstances (without `folders`: of its done cells);
    `rows`: the experiment's rows, in the order in which they are shown; `reference`: the label that all others are
    compared with (default: the first); `target`: an accuracy whose cost is told.

    Raises UsageError where there is no run, or none of the reference; StoreError where a run cannot be read.
    """
    material = material_of(folders, target=target, experiment=experiment, reference=reference, rows=rows)
    return report_on(material, title)


def report_on(material: Material, title: str) -> Report:
    """What runs show that are put together already.  Raises StoreError where one cannot be read."""
    sections = [section for make in _SECTIONS if (section := make(material)) is not None]
    return Report(title, _subtitle(material), tuple(_keyed(sections)), tuple(_facts(material)), material.order)


def _keyed(sections: Sequence[Section]) -> Iterator[Section]:
    """With keys that no two exhibits share, nor an exhibit with the numbers of a figure."""
    exhibits = [exhibit for section in sections for exhibit in section.exhibits]
    keys = iter(unique(exhibit.key for exhibit in exhibits))
    for section in sections:
        yield replace(section, exhibits=tuple(_with_key(exhibit, next(keys)) for exhibit in section.exhibits))


def _with_key(exhibit: Table | Figure, key: str) -> Table | Figure:
    if isinstance(exhibit, Figure):
        return replace(exhibit, key=key, table=replace(exhibit.table, key=f"{key}-data"))
    return replace(exhibit, key=key)


def _subtitle(material: Material) -> str:
    seeds = sorted({run.seed for run in material.runs})
    return (
        f"{_count(material.runs, 'run')} of {_count(material.labels, 'method')}, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    )


def _count(things: Sequence[object], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


# ── facts ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _facts(material: Material) -> Iterator[tuple[str, str]]:
    """What ran on what; where runs differ, each value once."""
    runs = material.runs
    yield "Testbed", _each(runs, _testbed)
    yield "torch", _each(runs, lambda run: _package(run, "torch"))
    yield "Controller", _each(runs, _machine)
    yield "Inventory", _each(runs, lambda run: PurePath(str(run.inventory.get("source") or "")).name)
    yield "Begun", _between(runs)
    if material.replayed:
        yield "Power", "replayed from recordings, not measured"
    yield "Runs", ", ".join(run.run for run in runs) if len(runs) <= FEW else f"{len(runs)}, listed under Every run"


def _each(runs: Sequence[Evidence], told: Callable[[Evidence], str | None]) -> str:
    return "; ".join(dict.fromkeys(told(run) or "not known" for run in runs))


def _package(run: Evidence, name: str) -> str | None:
    version: str | None = (run.versions.get("packages") or {}).get(name)
    return version


def _testbed(run: Evidence) -> str | None:
    version, commit = _package(run, "edge-testbed"), run.versions.get("commit")
    changed = ", with changes" if run.versions.get("dirty") else ""
    parts = [version, f"commit {str(commit)[:_SHOWN_OF_COMMIT]}{changed}" if commit else None]
    return " ".join(part for part in parts if part) or None


def _machine(run: Evidence) -> str | None:
    machine = run.versions.get("machine") or {}
    cores, cpu = machine.get("cores"), machine.get("cpu") or machine.get("architecture")
    return f"{cpu}, {cores} cores" if cpu and cores else cpu


def _between(runs: Sequence[Evidence]) -> str:
    """From the first run's beginning to the last one's, in UTC."""
    known = sorted(started for run in runs if (started := run.folder.status.started))
    days = [moment[:16].replace("T", " ") for moment in known]
    if not days:
        return "not known"
    return f"{days[0]} UTC" if days[0] == days[-1] else f"{days[0]} to {days[-1]} UTC"
