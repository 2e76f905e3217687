"""Every method against the reference, on the same seeds."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from testbed.reports.exhibits import Column, Table, figure_column, name_column
from testbed.reports.words import METHOD, named, under_columns
from testbed.statistics import paired

if TYPE_CHECKING:
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Group, Material
    from testbed.statistics import Paired

#: With so few pairs, and more comparisons than this, hardly any difference can be shown.
_FEW_PAIRS, _MANY = 5, 5
_HARDLY = "So few seeds for so many comparisons show large differences only: add seeds, or compare fewer methods."


def comparison_table(material: Material) -> Table:
    """By accuracy, or where no run has one by loss."""
    figure = "loss" if all(run.summary.accuracy is None for run in material.runs) else "accuracy"
    rows = [
        row
        for circumstances in material.circumstances
        for row in _rows(material, material.under(circumstances), figure)
    ]
    columns = (
        METHOD, *under_columns(material), Column("pairs", "Pairs"),
        figure_column(f"{figure}_difference_alone", "Difference, this one alone"),
        figure_column(f"{figure}_difference", "Difference, all together"), name_column("verdict", "Verdict"),
        figure_column("hidden_difference", "May be hidden, up to"),
    )  # fmt: skip
    most = max(len(material.under(circumstances)) for circumstances in material.circumstances) - 1
    caption = (
        f"{figure.capitalize()} at the end less that of {material.reference}, paired on the seed, with Student's t "
        "interval at 95 %: for whoever asks for this one comparison alone, and so that all of them hold together "
        f"(Bonferroni, {most} of them), by which the verdict goes. Where no difference is shown, one of up to the last "
        "column's size may be hidden. It speaks of the seeds, not of other data."
    )
    few = most > _MANY and max(len(group.runs) for group in material.groups) <= _FEW_PAIRS
    notes = (_HARDLY,) if few else ()
    return Table("comparison", f"Against {material.reference}", caption, columns, tuple(rows), notes)


def _rows(material: Material, groups: tuple[Group, ...], figure: str) -> list[tuple[Value, ...]]:
    """None where the reference has no run under these circumstances."""
    theirs = next((group for group in groups if group.label == material.reference), None)
    if theirs is None:
        return []
    return [_row(material, group, theirs, figure, len(groups) - 1) for group in groups if group is not theirs]


def _row(material: Material, group: Group, theirs: Group, figure: str, comparisons: int) -> tuple[Value, ...]:
    alone, found = (against(group, theirs, figure, count) for count in (1, comparisons))
    pairs = found.difference.count
    shown = (alone.difference, found.difference, found.verdict, found.hidden)
    return (*named(material, group), pairs, *shown)


def against(group: Group, theirs: Group, figure: str, comparisons: int) -> Paired:
    """A figure of the summaries, on the seeds that both have."""
    by_accuracy = figure == "accuracy"
    return paired(
        group.by_seed(attrgetter(figure)),
        theirs.by_seed(attrgetter(figure)),
        higher_is_better=by_accuracy,
        comparisons=comparisons,
        resolution=max(group.resolution, theirs.resolution) if by_accuracy else 0.0,
    )
