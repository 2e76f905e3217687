"""Every method against the reference, on the same seeds."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING

from testbed.reports.exhibits import Column, Table, figure_column, name_column
from testbed.reports.words import METHOD, named, under_columns
from testbed.statistics import paired

if TYPE_CHECKING:
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Evidence, Group, Material
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
    notes = (*material.lacking, *((_HARDLY,) if few else ()))
    return Table("comparison", f"Against {material.reference}", caption, columns, tuple(rows), notes)


def _rows(material: Material, groups: tuple[Group, ...], figure: str) -> list[tuple[Value, ...]]:
    """None where the reference has no run under these circumstances."""
    pairs = [(group, theirs) for group in groups if (theirs := material.reference_of(group)) is not None]
    return [_row(material, group, theirs, figure) for group, theirs in pairs]


def _row(material: Material, group: Group, theirs: Group, figure: str) -> tuple[Value, ...]:
    alone, found = (
        against(group, theirs, attrgetter(f"summary.{figure}"), count, accuracy=figure == "accuracy")
        for count in (1, beside(material, group))
    )
    shown = (alone.difference, found.difference, found.verdict, found.hidden)
    return (*named(material, group), found.difference.count, *shown)


def beside(material: Material, group: Group) -> int:
    """How many are compared with the reference under the same circumstances: they share the error."""
    return len(material.under(group.circumstances)) - 1


def against(
    group: Group, theirs: Group, figure: Callable[[Evidence], float | None], comparisons: int, *, accuracy: bool = True
) -> Paired:
    """A figure of the runs, on the seeds that both have: an accuracy, or something of which less is better."""
    return paired(
        group.by_seed(figure),
        theirs.by_seed(figure),
        higher_is_better=accuracy,
        comparisons=comparisons,
        resolution=max(group.resolution, theirs.resolution) if accuracy else 0.0,
    )
