"""Curves: y over x, a band where there are intervals, references as horizontal lines."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from testbed.reports.exhibits import Axis, Figure, Point, Series
from testbed.reports.palette import LIGHT, Pen, Pens, pen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Transform

    from testbed.reports.plot import Legend, Sheet

_HEIGHT_OF_WIDTH = 0.45
#: Markers on a curve, about: more of them hide it.
_MARKERS = 8
#: Points between lone values of the same x; and the share of the width that stays free beyond the last value.
_ASIDE, _MARGIN = 6.0, 0.06
_REFERENCES: tuple[tuple[float, ...], ...] = ((6, 2), (2, 2), (6, 2, 2, 2), (1, 3), (10, 3))


def draw_curves(axes: Axes, figure: Figure, pens: Pens, sheet: Sheet) -> tuple[float, Legend]:
    """Draw; gives the height of the plot in inches and what the legend says."""
    legend: Legend = []
    places = _dodged(figure.series)
    for index, series in enumerate(figure.series):
        style = pens.get(series.name) or pen(index)
        handle = _curve(axes, series, figure, style, index, _Place(places[index], _alike_after(figure.series, index)))
        if handle is not None:
            legend.append((series.name, handle))
    for (name, value), dash in zip(figure.lines, reference_dashes(), strict=False):
        line = axes.axhline(value / figure.y.scale, color=LIGHT["quiet"], linewidth=0.9, linestyle=dash, zorder=1.5)
        legend.append((name, line))
    axes.grid(visible=True, axis="y")
    axes.set_xlabel(figure.x.heading)
    axes.set_ylabel(figure.y.heading)
    whole_ticks(axes, [point.x for series in figure.series for point in series.points], figure.x)
    _limits(axes, figure, max(map(abs, places), default=0.0) / (sheet.width * 72))
    return max(sheet.width * _HEIGHT_OF_WIDTH, 2.1), legend


def reference_dashes() -> Iterator[tuple[int, tuple[float, ...]]]:
    """A dash for each reference line, again and again."""
    return itertools.cycle((0, dash) for dash in _REFERENCES)


def whole_ticks(axes: Axes, values: Sequence[Any], axis: Axis) -> None:
    """Rounds and jobs are counted: there is no half of one."""
    from matplotlib.ticker import MaxNLocator

    known = [value for value in values if value is not None]
    if axis.scale == 1 and known and all(isinstance(value, int) or float(value).is_integer() for value in known):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))


@dataclass(frozen=True)
class _Place:
    """How a curve stays visible beside those with the same values."""

    aside: float  # points to the right of its own x
    above: int  # curves with the very same values that are drawn over it


def _dodged(series: Sequence[Series]) -> list[float]:
    """For each series how many points it is moved to the right: those of one value only lie beside each other."""
    lone: dict[Any, list[int]] = {}
    for index, each in enumerate(series):
        known = _known(each)
        if len(known) == 1:
            lone.setdefault(known[0].x, []).append(index)
    aside = [0.0] * len(series)
    for members in lone.values():
        for order, index in enumerate(members):
            aside[index] = (order - (len(members) - 1) / 2) * _ASIDE
    return aside


def _alike_after(series: Sequence[Series], index: int) -> int:
    own = _known(series[index])
    return sum(_known(each) == own for each in series[index + 1 :]) if len(own) > 1 else 0


def _known(series: Series) -> list[Point]:
    return [point for point in series.points if point.y is not None]


def _curve(axes: Axes, series: Series, figure: Figure, style: Pen, index: int, place: _Place) -> Any:
    """None where the series has no value at all."""
    from matplotlib.transforms import ScaledTranslation

    known = _known(series)
    if not known:
        return None
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    moved = axes.transData + ScaledTranslation(place.aside / 72, 0, drawing.dpi_scale_trans)
    colour = LIGHT[style.role]
    every = max(1, round(len(known) / _MARKERS))
    xs, ys = _scaled([point.x for point in known], figure.x), _scaled([point.y for point in known], figure.y)
    axes.update_datalim(list(zip(xs, ys, strict=True)))  # what is moved does not count by itself
    (line,) = axes.plot(
        xs,
        ys,
        color=colour,
        linewidth=1.3 + 2.2 * place.above,
        linestyle=(0, style.dash) if style.dash else "-",
        marker=style.marker,
        markersize=4.0 + 3.0 * place.above,
        transform=moved,
        markerfacecolor=LIGHT["paper"] if series.predicts else colour,
        markeredgecolor=colour if series.predicts else LIGHT["paper"],
        markeredgewidth=0.5,
        markevery=(index % every, every) if len(known) > index % every else every,
    )
    _band(axes, known, figure, colour, moved)
    return line


def _band(axes: Axes, known: Sequence[Point], figure: Figure, colour: str, moved: Transform) -> None:
    """Between the ends of the intervals; where a point has none, the band has a gap.  Of many, each is fainter."""
    opacity = max(0.06, 0.2 - 0.02 * len(figure.series))
    stretch: list[Point] = []
    for point in [*known, None]:
        if point is not None and point.low is not None and point.high is not None:
            stretch.append(point)
            continue
        if len(stretch) == 1:
            (only,) = stretch
            x, ends = _scaled([only.x], figure.x), _scaled([only.low, only.high], figure.y)
            axes.vlines(x, ends[0], ends[1], color=colour, linewidth=1.0, transform=moved)
        elif stretch:
            low, high = ([getattr(each, end) for each in stretch] for end in ("low", "high"))
            xs = _scaled([each.x for each in stretch], figure.x)
            axes.fill_between(
                xs, _scaled(low, figure.y), _scaled(high, figure.y), color=colour, alpha=opacity, linewidth=0, zorder=1
            )
        stretch = []


def _scaled(values: Sequence[Any], axis: Axis) -> list[float]:
    return [value / axis.scale for value in values]


def _limits(axes: Axes, figure: Figure, aside: float) -> None:
    """Room at the right for the last marker; `aside` is how far curves are moved, as a share of the width."""
    known = [float(point.x) / figure.x.scale for series in figure.series for point in _known(series)]
    if figure.x.start_at_zero:
        axes.set_xlim(0, (max(known, default=0.0) or 1.0) * (1 + _MARGIN + 2 * aside))
    if figure.y.start_at_zero:
        axes.set_ylim(bottom=0)
