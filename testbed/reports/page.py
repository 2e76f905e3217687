"""The report as one HTML page that stands alone: no network, no fonts or images of others, readable without scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from testbed.reports.exhibits import CURVES, SPANS, Column, Figure, Report, Section, Table, Value, said
from testbed.reports.palette import DARK, LIGHT, Pens, names_of, pens_of
from testbed.reports.plot import NARROW, WIDE, Sheet, image_of
from testbed.reports.svg import embedded
from testbed.statistics import Estimate

#: The text of a drawing is set by the reader's own font: measured with a wide one, it has room enough.
_SHEETS = {"wide": Sheet(WIDE, ("DejaVu Sans",), 8.0), "narrow": Sheet(NARROW, ("DejaVu Sans",), 8.0)}

#: Letters that a cell holds on one line: a run's id.
_SHORT = 34


@dataclass(frozen=True)
class _Cell:
    """A value as it reads, with the raw one beside it."""

    text: str
    attributes: tuple[tuple[str, str], ...]
    shape: str  # number, short (on one line where there is room) or long (wide enough to be read)


@dataclass(frozen=True)
class _TableView:
    """What the template says of a table."""

    anchor: str
    name: str  # "Table 2", "Numbers of Figure 1"
    table: Table

    @property
    def rows(self) -> Iterator[list[_Cell]]:
        for row in self.table.rows:
            yield [_cell(column, value) for column, value in zip(self.table.columns, row, strict=True)]


@dataclass(frozen=True)
class _FigureView:
    """What the template says of a figure: its drawings by width, and its numbers."""

    anchor: str
    name: str
    figure: Figure
    drawings: tuple[tuple[str, str], ...]
    numbers: _TableView


def page_of(report: Report, tell: Callable[[str], None] = lambda _: None) -> str:
    """The whole page; `tell` is called with the title of each exhibit before it is drawn."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    script = _resource("page.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_resource("page.html.jinja"))
    return template.render(
        report=report,
        sections=list(_sections(report, tell)),
        light=LIGHT,
        dark=DARK,
        style=Markup(_resource("page.css")),  # noqa: S704 -- our own file
        script=Markup(script),  # noqa: S704 -- our own file
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        drawing=Markup,
    )


def _resource(name: str) -> str:
    return files("testbed.reports").joinpath(name).read_text(encoding="utf-8")


def _sections(report: Report, tell: Callable[[str], None]) -> Iterator[tuple[Section, list[Any]]]:
    pens = pens_of(report)
    counts = {"Figure": 0, "Table": 0}
    for section in report.sections:
        views: list[Any] = []
        for exhibit in section.exhibits:
            tell(exhibit.title)
            kind = "Figure" if isinstance(exhibit, Figure) else "Table"
            counts[kind] += 1
            views.append(_view(exhibit, f"{kind} {counts[kind]}", pens))
        yield section, views


def _view(exhibit: Table | Figure, name: str, pens: Pens) -> _TableView | _FigureView:
    if isinstance(exhibit, Table):
        return _TableView(exhibit.key, name, exhibit)
    drawings = tuple((width, _drawing(exhibit, pens, width, name)) for width in _SHEETS)
    numbers = _TableView(f"{exhibit.key}-numbers", f"Numbers of {name}", exhibit.table)
    return _FigureView(exhibit.key, name, exhibit, drawings, numbers)


def _drawing(figure: Figure, pens: Pens, width: str, name: str) -> str:
    image = image_of(figure, pens, "svg", _SHEETS[width])
    return embedded(image, f"{figure.key}-{width}", f"{name}: {figure.title}", _description(figure))


def _description(figure: Figure) -> str:
    """For who does not see the drawing: what is on its axes, and where the numbers are."""
    across, up = (figure.x, figure.y) if figure.kind in {CURVES, SPANS} else (figure.y, figure.x)
    axes = " over ".join(axis.heading for axis in (up, across) if axis.heading)
    return f"{axes}: {', '.join(names_of(figure))}. {figure.caption} The numbers are in the table below the figure."


def _cell(column: Column, value: Value) -> _Cell:
    text = said(column, value)
    name = "short" if len(text) <= _SHORT else "long"
    return _Cell(text, _raw(value), "number" if column.number else name)


def _raw(value: Value) -> tuple[tuple[str, str], ...]:
    """What a program reads of a cell; of None there is nothing."""
    if value is None:
        return ()
    if isinstance(value, Estimate):
        parts = {"value": value.mean, "low": value.low, "high": value.high, "count": value.count}
        return tuple((f"data-{name}", repr(part)) for name, part in parts.items() if part is not None)
    if isinstance(value, bool):
        return (("data-value", str(value).lower()),)
    return (("data-value", value if isinstance(value, str) else repr(value)),)
