"""Tables and figures as plain data: what is shown, before anybody decides how.  Standard library only.

A value is raw and in base units; a column knows how to say it.  None is a dash, an empty CSV field, a null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from testbed.quantities import DASH, bytes_text, number_text, percent_text, seconds_text
from testbed.statistics import Estimate

Value = str | int | float | bool | Estimate | None


@dataclass(frozen=True)
class Column:
    """A column: its key for programs (with the unit in its name), its heading for people, and how a value is said."""

    key: str
    heading: str
    text: Callable[[Any], str] = str  # of a value that is there
    number: bool = True  # else a name: left-aligned


@dataclass(frozen=True)
class Table:
    """Rows of raw values, one for each column."""

    key: str  # a file's name without its suffix, and an anchor of the page: unique in a report
    title: str
    caption: str  # one or two sentences: what it shows, of what, and what a dash means
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...] = ()

    def texts(self) -> Iterator[tuple[str, ...]]:
        """The rows as people read them."""
        for row in self.rows:
            yield tuple(said(column, value) for column, value in zip(self.columns, row, strict=True))


@dataclass(frozen=True)
class Axis:
    """A heading with the unit that is printed; values are base units and divided by `scale` (MiB: 2**20)."""

    heading: str
    scale: float = 1.0
    start_at_zero: bool = False


@dataclass(frozen=True)
class Point:
    """x, y and the interval of y, where there is one.  In `bars` and `peaks`, x is the name of a group."""

    x: float | str
    y: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points that belong together: a method, a phase, a device."""

    name: str
    points: tuple[Point, ...]
    predicts: str | None = None  # the series whose prediction this is: drawn beside it in its colour, as an open mark


@dataclass(frozen=True)
class Span:
    """A stretch of time on a row of a time line."""

    row: str
    begin: float
    end: float
    name: str  # what went on: a phase, "waiting"


#: How a figure is drawn.
CURVES = "curves"  # y over x, a band where there are intervals
BARS = "bars"  # stacked by series within each group
DOTS = "dots"  # one dot with its interval per series and group, beside each other
SPANS = "spans"  # a time line: rows over x


@dataclass(frozen=True)
class Figure:
    """What is drawn, and in `table` the same as numbers."""

    key: str
    title: str
    caption: str
    kind: str
    x: Axis
    y: Axis
    table: Table
    series: tuple[Series, ...] = ()
    spans: tuple[Span, ...] = ()
    lines: tuple[tuple[str, float], ...] = ()  # horizontal references: majority class, a target
    ticks: Sequence[tuple[str, str, float]] = field(default=())  # (group, name, y): a mark across a group: its budget
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of a report, with its exhibits in their order."""

    key: str
    title: str
    text: tuple[str, ...] = ()  # paragraphs of plain text
    exhibits: tuple[Table | Figure, ...] = ()


@dataclass(frozen=True)
class Report:
    """All that a page or a paper's folder is made of."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...] = ()  # what ran on what: version, machine, date, runs
    order: tuple[str, ...] = ()  # names of series: the same one has the same colour in every figure

    @property
    def exhibits(self) -> tuple[Table | Figure, ...]:
        return tuple(exhibit for section in self.sections for exhibit in section.exhibits)


# ── how values are said ─────────────────────────────────────────────────────────────────────────────────────────────
def said(column: Column, value: Value) -> str:
    """A value in a column's words: a dash for None, "0.680 ± 0.012" for an estimate over runs."""
    if value is None:
        return DASH
    if isinstance(value, Estimate):
        if value.mean is None:
            return DASH
        half = "" if value.half_width is None else f" ± {column.text(value.half_width)}"
        return f"{column.text(value.mean)}{half}"
    return column.text(value)


def name_column(key: str, heading: str) -> Column:
    return Column(key, heading, str, number=False)


def bytes_column(key: str, heading: str) -> Column:
    return Column(key, heading, bytes_text)


def seconds_column(key: str, heading: str) -> Column:
    return Column(key, heading, seconds_text)


def ratio_column(key: str, heading: str) -> Column:
    return Column(key, heading, percent_text)


def figure_column(key: str, heading: str, digits: int = 3) -> Column:
    return Column(key, heading, lambda value: number_text(value, digits))
