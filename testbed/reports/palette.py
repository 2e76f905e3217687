"""The colours of a report, and the pens that figures are drawn with: the same name has the same pen in every figure.

The colours lie about Okabe and Ito's hues.  Their lightness was chosen so that any two of the eight stay apart for
people with each kind of colour blindness, and each stands out from the paper (a contrast of three to one), light or
dark; tests hold it.  Every pen has a marker, a dash and a hatch of its own too: no figure is read by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from testbed.reports.exhibits import Figure, Report

#: Role → colour.  All values of LIGHT differ: a drawing is made with them, and a page puts its own in their place.
LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "ink": "#1c1b19",
    "quiet": "#5d5a54",
    "rule": "#dedbd5",
    "data-0": "#022ea3",
    "data-1": "#cc8613",
    "data-2": "#43a677",
    "data-3": "#4e1247",
    "data-4": "#835b1b",
    "data-5": "#2b67fe",
    "data-6": "#58534d",
    "data-7": "#18190a",
}
DARK: Mapping[str, str] = {
    "paper": "#17181a",
    "ink": "#eceae5",
    "quiet": "#a9a69f",
    "rule": "#3b3c3e",
    "data-0": "#a8bcec",
    "data-1": "#fc9a0b",
    "data-2": "#65f0bd",
    "data-3": "#d91f51",
    "data-4": "#d1a85d",
    "data-5": "#5a8ef0",
    "data-6": "#9a938e",
    "data-7": "#ebee70",
}

_COLOURS = 8
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
#: Lengths of line and gap in points; () is a line without gaps.
_DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.6), (1.2, 1.4), (5, 1.5, 1.2, 1.5))
_HATCHES = ("", "//", "\\\\", "xx", "--", "||", "++", "/|")


@dataclass(frozen=True)
class Pen:
    """How one name is drawn: a role of the palette, and what tells it apart without colour."""

    role: str
    marker: str
    dash: tuple[float, ...]
    hatch: str


Pens = Mapping[str, Pen]


def pen(index: int) -> Pen:
    """The pen of the name at this place; the eight colours come again with other markers, dashes and hatches."""
    again = index // _COLOURS
    return Pen(
        role=f"data-{index % _COLOURS}",
        marker=_MARKERS[(index + 3 * again) % len(_MARKERS)],
        dash=_DASHES[(index + again) % len(_DASHES)],
        hatch=_HATCHES[(index + 3 * again) % len(_HATCHES)],
    )


def pens_of(report: Report) -> Pens:
    """A pen for every name in the figures of a report.

    Figures that share a name are counted through, in the order in which the names come: methods (first those of the
    report's order), phases, outcomes.  Those that share none begin again with the first pen.
    """
    families = [dict.fromkeys(report.order)]
    for exhibit in report.exhibits:
        if isinstance(exhibit, Figure):
            names = dict.fromkeys(names_of(exhibit))
            family = next((known for known in families if not known.keys().isdisjoint(names)), None)
            if family is None:
                families.append(names)
            else:
                family |= {name: None for name in names if not any(name in known for known in families)}
    return {name: pen(index) for family in families for index, name in enumerate(family)}


def names_of(figure: Figure) -> list[str]:
    """What a figure's legend tells apart by pen."""
    return list(dict.fromkeys([series.name for series in figure.series] + [span.name for span in figure.spans]))
