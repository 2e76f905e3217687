"""Curves and bars from groups of runs, each figure with the table of what it draws and what it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.reports.exhibits import BARS, CURVES, Axis, Column, Figure, Point, Series, Table
from testbed.reports.material import over
from testbed.reports.words import METHOD, RUNS, key_of, where

if TYPE_CHECKING:
    from testbed.costs import RoundCost
    from testbed.reports.material import Evidence, Group, Material
    from testbed.statistics import Estimate

#: Groups of bars that one axis can name.
BARS_SHOWN = 40
#: How far beyond the curves a reference is drawn: of the height that they take, and of their values where that is flat.
_ROOM, _ROOM_AT_LEAST = 0.35, 0.25


@dataclass(frozen=True)
class Abscissa:
    """What a quality is drawn over: a figure of a round's cost, and how axis and column say it."""

    key: str
    title: str  # "rounds": behind "Accuracy over"
    axis: Axis
    column: Column
    value: Callable[[RoundCost], float | None]


@dataclass(frozen=True)
class Ordinate:
    """A quality, and how axis and column say it."""

    key: str
    title: str
    axis: Axis
    column: Column
    value: Callable[[RoundCost], float | None]
    steps: bool = False  # whether it moves in steps of one example


@dataclass(frozen=True)
class Step:
    """One point of a mean curve: x is the mean over the runs, y their estimate."""

    x: float
    y: Estimate
    runs: int


def steps_of(group: Group, abscissa: Abscissa, ordinate: Ordinate) -> list[Step]:
    """At every round that all runs of the group have evaluated; none where a cost of one of them is not known."""
    rounds = [_evaluated(run, ordinate) for run in group.runs]
    common = sorted(set.intersection(*map(set, rounds))) if rounds else []
    found = []
    for index in common:
        costs = [by_round[index] for by_round in rounds]
        x = over([abscissa.value(cost) for cost in costs])
        y = over([ordinate.value(cost) for cost in costs], group.resolution if ordinate.steps else 0.0)
        if x is not None and x.mean is not None and y is not None:
            found.append(Step(x.mean, y, len(costs)))
    return found


def _evaluated(run: Evidence, ordinate: Ordinate) -> dict[int, RoundCost]:
    return {cost.round: cost for cost in run.costs if ordinate.value(cost) is not None}


def curves(
    material: Material,
    circumstances: tuple[str, ...],
    abscissa: Abscissa,
    ordinate: Ordinate,
    *,
    caption: str,
    lines: tuple[tuple[str, float], ...] = (),
    notes: Sequence[str] = (),
) -> Figure | None:
    """One mean curve per method; None where no method has one."""
    groups = material.under(circumstances)
    steps = {group.label: found for group in groups if (found := steps_of(group, abscissa, ordinate))}
    if not steps:
        return None
    key = key_of(ordinate.key, abscissa.key, *circumstances)
    title = f"{ordinate.title} over {abscissa.title}{where(circumstances)}"
    columns = (METHOD, abscissa.column, ordinate.column, RUNS)
    rows = tuple((label, step.x, step.y, step.runs) for label, found in steps.items() for step in found)
    drawn = material.drawn(groups)
    lacking = [group.label for group in groups if group.label not in steps]
    series = tuple(_curve(group.label, steps[group.label]) for group in drawn if group.label in steps)
    near, off = _near(lines, series, ordinate)
    return Figure(
        key=key,
        title=title,
        caption=caption,
        kind=CURVES,
        x=abscissa.axis,
        y=ordinate.axis,
        table=Table(f"{key}-data", title, caption, columns, rows),
        series=series,
        lines=near,
        notes=(*off, *notes, *material.not_drawn(groups), *_lacking(lacking, abscissa)),
    )


def _near(
    lines: tuple[tuple[str, float], ...], series: Sequence[Series], ordinate: Ordinate
) -> tuple[tuple[tuple[str, float], ...], tuple[str, ...]]:
    """References that the figure has room for; and of the others, which would press the curves flat, a note."""
    ends = [end for each in series for point in each.points for end in (point.y, point.low, point.high)]
    known = [end for end in ends if end is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    room = max(_ROOM * (high - low), _ROOM_AT_LEAST * max(abs(low), abs(high)))
    near = tuple((name, value) for name, value in lines if low - room <= value <= high + room)
    places: dict[str, list[str]] = {"above": [], "below": []}
    for name, value in lines:
        if (name, value) not in near:
            places["above" if value > high else "below"].append(f"{name} {ordinate.column.text(value)}")
    return near, tuple(f"{place.capitalize()} the figure: {', '.join(off)}." for place, off in places.items() if off)


def _curve(label: str, steps: Sequence[Step]) -> Series:
    return Series(label, tuple(Point(step.x, step.y.mean, step.y.low, step.y.high) for step in steps))


def _lacking(labels: Sequence[str], abscissa: Abscissa) -> tuple[str, ...]:
    if not labels:
        return ()
    return (f"No curve of {'; '.join(labels)}: {abscissa.title} or quality of a run are not known.",)


def bars(
    key: str,
    title: str,
    caption: str,
    axis: Axis,
    table: Table,
    groups: Sequence[str],
    heights: Sequence[tuple[str, str, float | None]],
    notes: Sequence[str] = (),
) -> Figure:
    """Stacked bars of (group, series, height), the series in the order in which they come; `groups` in theirs."""
    shown = groups[:BARS_SHOWN]
    height = {(group, name): y for group, name, y in heights}
    series = dict.fromkeys(name for _, name, _ in heights)
    left = groups[BARS_SHOWN:]
    more = (f"{len(left)} of {len(groups)} bars are not drawn, the table has them: {'; '.join(left)}.",) if left else ()
    return Figure(
        key=key,
        title=title,
        caption=caption,
        kind=BARS,
        x=Axis(""),
        y=axis,
        table=table,
        series=tuple(
            Series(name, tuple(Point(group, height.get((group, name))) for group in shown)) for name in series
        ),
        notes=(*notes, *more),
    )
