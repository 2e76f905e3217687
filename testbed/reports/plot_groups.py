"""Figures of groups, one below the other: stacked bars, dots with intervals, and time lines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from testbed.reports.exhibits import Figure, Point, Series
from testbed.reports.palette import LIGHT, Pen, Pens, pen
from testbed.reports.plot_values import reference_dashes, whole_ticks
from testbed.reports.timeline import WAITING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from testbed.reports.plot import Legend, Sheet

#: Inches: a bar with the space about it, a row of dots, and the axis with its label.
_BAR, _DOTS, _AXIS = 0.27, 0.145, 0.5
_PADDING = 0.9  # of a group, in lanes
_LABEL_SHARE = 0.34  # of the width, at most, for the names of the groups
_BAR_HEIGHT = 0.66
_BUDGET_DASHES: tuple[tuple[float, ...], ...] = ((), (2, 1.2), (4, 1.2, 1, 1.2))


def draw_bars(axes: Axes, figure: Figure, pens: Pens, sheet: Sheet) -> tuple[float, Legend]:
    """One bar per group, stacked by series; an interval only where a bar is of one series."""
    groups = _groups(figure)
    ends = dict.fromkeys(groups, 0.0)
    legend: Legend = []
    for index, series in enumerate(figure.series):
        style = pens.get(series.name) or pen(index)
        known = [point for point in series.points if point.y is not None]
        widths = [(point.y or 0.0) / figure.y.scale for point in known]
        places = [groups.index(str(point.x)) for point in known]
        lefts = [ends[str(point.x)] for point in known]
        handle = axes.barh(places, widths, _BAR_HEIGHT, lefts, **_filled(style))
        for point, width in zip(known, widths, strict=True):
            ends[str(point.x)] += width
        if len(figure.series) == 1:
            _whiskers(axes, known, figure, [float(place) for place in places], LIGHT["ink"])
        if known:
            legend.append((series.name, handle))
    extents = {group: (place - 0.44, place + 0.44) for place, group in enumerate(groups)}
    legend += [*_ticks(axes, figure, extents), *_lines(axes, figure)]
    axes.set_xlim(left=0)
    height = _name_bars(axes, groups, sheet)
    _name_axes(axes, figure)
    return height + _AXIS, legend if len(legend) > 1 else []


def draw_dots(axes: Axes, figure: Figure, pens: Pens, sheet: Sheet) -> tuple[float, Legend]:
    """One dot with its interval per series, those of a group below each other; a prediction is an open mark."""
    groups = _groups(figure)
    names, lines = _names(groups, sheet)
    lanes, extents = _lanes(figure, groups, (lines * _line_inches(sheet) + 0.05) / _DOTS)
    legend: Legend = []
    for index, series in enumerate(figure.series):
        known = [point for point in series.points if point.y is not None]
        if known:
            style = pens.get(series.predicts or series.name) or pen(index)
            places = [lanes[str(point.x), series.predicts or series.name] for point in known]
            legend.append((series.name, _dots(axes, figure, series, known, places, style)))
    legend += [*_ticks(axes, figure, extents), *_lines(axes, figure)]
    for _, below in list(extents.values())[:-1]:
        axes.axhline(below, color=LIGHT["rule"], linewidth=0.6, zorder=0.5)
    if figure.y.start_at_zero:
        axes.set_xlim(left=0)
    end = max((below for _, below in extents.values()), default=1.0)
    _name_rows(axes, [sum(extents[group]) / 2 for group in groups], names, end)
    _name_axes(axes, figure)
    return end * _DOTS + _AXIS, legend if len(legend) > 1 else []


def draw_spans(axes: Axes, figure: Figure, pens: Pens, sheet: Sheet) -> tuple[float, Legend]:
    """A row per device; waiting is hatched, everything else filled."""
    rows = list(dict.fromkeys(span.row for span in figure.spans))
    legend: Legend = []
    for index, name in enumerate(dict.fromkeys(span.name for span in figure.spans)):
        spans = [span for span in figure.spans if span.name == name]
        scale = figure.x.scale
        handle = axes.barh(
            [rows.index(span.row) for span in spans],
            [(span.end - span.begin) / scale for span in spans],
            _BAR_HEIGHT,
            [span.begin / scale for span in spans],
            **(_WAITING if name == WAITING else _filled(pens.get(name) or pen(index))),
        )
        legend.append((name, handle))
    height = _name_bars(axes, rows, sheet)
    axes.grid(visible=True, axis="x")
    axes.set_xlabel(figure.x.heading)
    if figure.x.start_at_zero:
        axes.set_xlim(left=0)
    return height + _AXIS, legend


# ── marks ───────────────────────────────────────────────────────────────────────────────────────────────────────────
_WAITING = {"facecolor": "none", "edgecolor": LIGHT["quiet"], "hatch": "////", "linewidth": 0.5}


def _filled(style: Pen) -> dict[str, Any]:
    """A fill with its hatch in the colour of the paper."""
    return {
        "facecolor": LIGHT[style.role],
        "edgecolor": LIGHT["paper"],
        "hatch": style.hatch or None,
        "linewidth": 0.5,
    }


def _dots(
    axes: Axes, figure: Figure, series: Series, known: Sequence[Point], places: Sequence[float], style: Pen
) -> Any:
    colour = LIGHT[style.role]
    _whiskers(axes, known, figure, places, colour)
    (dots,) = axes.plot(
        [(point.y or 0.0) / figure.y.scale for point in known],
        places,
        linestyle="none",
        marker=style.marker,
        markersize=6.6 if series.predicts else 4.4,
        markerfacecolor="none" if series.predicts else colour,
        markeredgecolor=colour if series.predicts else LIGHT["paper"],
        markeredgewidth=0.9 if series.predicts else 0.5,
        zorder=2.8 if series.predicts else 3,
    )
    return dots


def _whiskers(axes: Axes, known: Sequence[Point], figure: Figure, places: Sequence[float], colour: str) -> None:
    scale = figure.y.scale
    for point, place in zip(known, places, strict=True):
        if point.low is not None and point.high is not None:
            axes.hlines(place, point.low / scale, point.high / scale, color=colour, linewidth=1.2, zorder=2.5)


def _ticks(axes: Axes, figure: Figure, extents: Mapping[str, tuple[float, float]]) -> Legend:
    """Marks across a whole group, such as a budget: one entry of the legend for each of their names."""
    legend: dict[str, Any] = {}
    names = list(dict.fromkeys(name for _, name, _ in figure.ticks))
    for group, name, value in figure.ticks:
        dash = _BUDGET_DASHES[names.index(name) % len(_BUDGET_DASHES)]
        (line,) = axes.plot(
            [value / figure.y.scale] * 2,
            extents[group],
            color=LIGHT["ink"],
            linewidth=1.6,
            linestyle=(0, dash) if dash else "-",
            zorder=2,
        )
        legend.setdefault(name, line)
    return list(legend.items())


def _lines(axes: Axes, figure: Figure) -> Legend:
    """References across all groups."""
    return [
        (name, axes.axvline(value / figure.y.scale, color=LIGHT["quiet"], linewidth=0.9, linestyle=dash, zorder=1.5))
        for (name, value), dash in zip(figure.lines, reference_dashes(), strict=False)
    ]


# ── groups and their names ──────────────────────────────────────────────────────────────────────────────────────────
def _groups(figure: Figure) -> list[str]:
    """In the order in which they come; those that only a tick names are shown too."""
    points = [str(point.x) for series in figure.series for point in series.points]
    return list(dict.fromkeys([*points, *(group for group, _, _ in figure.ticks)]))


def _lanes(
    figure: Figure, groups: Sequence[str], least: float
) -> tuple[dict[tuple[str, str], float], dict[str, tuple[float, float]]]:
    """(group, series) → where its dot lies, a lane apart; group → where it begins and ends, at least so many lanes.

    Who has no dot in a group takes no room there; a prediction lies where what it predicts does.
    """
    lanes: dict[tuple[str, str], float] = {}
    extents: dict[str, tuple[float, float]] = {}
    begin = 0.0
    for group in groups:
        own = dict.fromkeys(
            series.predicts or series.name
            for series in figure.series
            if any(str(point.x) == group and point.y is not None for point in series.points)
        )
        height = max(len(own) + _PADDING, least)
        first = begin + (height - len(own) + 1) / 2
        lanes |= {(group, name): first + lane for lane, name in enumerate(own)}
        extents[group] = (begin, begin + height)
        begin += height
    return lanes, extents


def _name_axes(axes: Axes, figure: Figure) -> None:
    """Of groups: what is measured lies across."""
    axes.grid(visible=True, axis="x")
    axes.set_xlabel(figure.y.heading)
    whole_ticks(axes, [point.y for series in figure.series for point in series.points], figure.y)
    if figure.x.heading:
        axes.set_ylabel(figure.x.heading)


def _name_bars(axes: Axes, rows: Sequence[str], sheet: Sheet) -> float:
    """Rows of the same height; gives that of all in inches."""
    names, lines = _names(rows, sheet)
    _name_rows(axes, range(len(rows)), names, len(rows) - 0.5, -0.5)
    return len(rows) * max(_BAR, lines * _line_inches(sheet) + 0.05)


def _name_rows(axes: Axes, places: Sequence[float], names: Sequence[str], end: float, begin: float = 0.0) -> None:
    """The first on top."""
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(end, begin)


def _names(rows: Sequence[str], sheet: Sheet) -> tuple[list[str], int]:
    """Long names over several lines; and how many lines the longest takes."""
    letters = max(10, int(sheet.width * 72 * _LABEL_SHARE / (0.5 * sheet.points)))
    names = ["\n".join(textwrap.wrap(row, letters)) or row for row in rows]
    return names, max((name.count("\n") + 1 for name in names), default=1)


def _line_inches(sheet: Sheet) -> float:
    return sheet.points * 1.25 / 72
