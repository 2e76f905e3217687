"""Robustness: every method under declared disturbances, against itself without any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

from testbed.experiments.experiment import CLEAN
from testbed.quantities import number_text
from testbed.reports.comparison import against
from testbed.reports.exhibits import (
    DOTS,
    Axis,
    Column,
    Figure,
    Point,
    Series,
    Table,
    figure_column,
    name_column,
)
from testbed.reports.material import over
from testbed.reports.under_budget import accuracy_within, budgets_of
from testbed.reports.words import METHOD

if TYPE_CHECKING:
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Evidence, Group, Material
    from testbed.statistics import Estimate, Paired


def _found(material: Material) -> list[tuple[Group, Group, Paired]]:
    """Every disturbed group with its clean one, and the difference."""
    clean = {(g.label, g.circumstances[:-1]): g for g in material.groups if g.disturbance == CLEAN}
    pairs = [
        (group, clean[key])
        for group in material.groups
        if group.disturbance not in {None, CLEAN} and (key := (group.label, group.circumstances[:-1])) in clean
    ]
    return [(group, base, against(group, base, _accuracy_of(group), len(pairs))) for group, base in pairs]


def _accuracy_of(group: Group) -> Callable[[Evidence], float | None]:
    """What counts of its runs: under a budget that of the last round within, else that at the end."""
    budgets = budgets_of(group)
    return accuracy_within(budgets) if budgets else attrgetter("summary.accuracy")


def _name(group: Group) -> str:
    return ", ".join((group.label, *group.circumstances[:-1]))


# ── as a table ──────────────────────────────────────────────────────────────────────────────────────────────────────
def robustness_table(material: Material) -> Table:
    found = _found(material)
    columns = (
        METHOD, name_column("disturbance", "Disturbance"), figure_column("clean_accuracy", "Clean"),
        figure_column("accuracy", "Disturbed"), Column("pairs", "Pairs"),
        figure_column("accuracy_difference", "Difference"), name_column("verdict", "Verdict"),
        figure_column("hidden_difference", "May be hidden, up to"), Column("jobs_finished", "Jobs finished"),
        Column("jobs", "Jobs"), Column("time_ratio", "Time, × clean", lambda value: number_text(value, 2)),
    )  # fmt: skip
    caption = (
        "Accuracy (at the end; under a budget, of the last round within) with the disturbance less that without it, "
        f"paired on the seed; the intervals share their error of 5 % among {len(found)} comparisons (Bonferroni). "
        "Better and worse are said of the disturbed runs. Jobs are those of all disturbed runs; time is without "
        "evaluation."
    )
    rows = tuple(_row(*each) for each in found)
    return Table("robustness", "Robustness", caption, columns, rows, material.lacking if rows else ())


def _row(group: Group, base: Group, told: Paired) -> tuple[Value, ...]:
    figure = _accuracy_of(group)
    clean, disturbed = (over([figure(run) for run in each.runs], each.resolution) for each in (base, group))
    jobs = [job for run in group.runs for job in run.results]
    return (
        _name(group), group.disturbance, clean, disturbed, told.difference.count,
        told.difference if told.difference.count else None, told.verdict, told.hidden,
        sum(job.finished for job in jobs), len(jobs), _time_ratio(group, base),
    )  # fmt: skip


def _time_ratio(group: Group, base: Group) -> Estimate | None:
    """Seconds of the disturbed run over those of the clean one, on the seeds that both have."""
    ours, theirs = group.by_seed(_seconds), base.by_seed(_seconds)
    return over([ours[seed] / theirs[seed] for seed in sorted(ours.keys() & theirs.keys()) if theirs[seed]])


def _seconds(run: Evidence) -> float | None:
    return run.costs[-1].seconds if run.costs else None


# ── as a figure ─────────────────────────────────────────────────────────────────────────────────────────────────────
def robustness_figure(material: Material) -> Figure:
    found = _found(material)
    names = dict.fromkeys(group.disturbance or "" for group, _, _ in found)
    series = tuple(Series(name, tuple(_points(name, found))) for name in names)
    table = robustness_table(material)
    data = Table("robustness-data", table.title, table.caption, table.columns, table.rows)
    axis = Axis("Accuracy, disturbed less clean")
    return Figure(
        "robustness-difference", "What disturbances cost", table.caption, DOTS, Axis(""), axis, data, series=series,
        lines=(("no difference", 0.0),),
    )  # fmt: skip


def _points(name: str, found: Sequence[tuple[Group, Group, Paired]]) -> list[Point]:
    return [
        Point(_name(group), told.difference.mean, told.difference.low, told.difference.high)
        for group, _, told in found
        if group.disturbance == name
    ]
