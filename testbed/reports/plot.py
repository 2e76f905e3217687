"""A figure of the report, drawn by matplotlib: for the page and for paper, from the same data with the same pens.

Nothing is kept between drawings (no pyplot), and the same data give the same bytes.  Groups lie one below the other, as
names of methods and devices are too long to stand beside each other in a column of a paper; the legend stands above the
plot, where it covers nothing.
"""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from testbed.reports.exhibits import BARS, CURVES, DOTS, SPANS, Figure
from testbed.reports.palette import LIGHT, Pens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

#: Inches: a column of a paper (and a phone), and the width of a page.
NARROW, WIDE = 3.4, 7.0
_PNG_DOTS_PER_INCH = 300
_RULE_POINTS = 0.6


@dataclass(frozen=True)
class Sheet:
    """What is drawn on: its width in inches, the fonts that are tried one after the other, and their size in points."""

    width: float
    fonts: tuple[str, ...] = ("STIXGeneral", "DejaVu Sans")
    points: float = 8.0


PAPER = Sheet(NARROW)


def image_of(figure: Figure, pens: Pens, form: str, sheet: Sheet = PAPER) -> bytes:
    """The figure as "svg" (text as text), "pdf" (fonts embedded as TrueType) or "png" (300 dots per inch)."""
    no_date: Mapping[str, Mapping[str, None]] = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "png": {"Software": None},
    }
    out = io.BytesIO()
    with _style(sheet, figure.key):
        drawing = _drawn(figure, pens, sheet)
        drawing.savefig(out, format=form, dpi=_PNG_DOTS_PER_INCH, metadata=dict(no_date[form]))
    return out.getvalue()


@contextmanager
def _style(sheet: Sheet, salt: str) -> Iterator[None]:
    import matplotlib as mpl

    style = {
        "font.family": list(sheet.fonts),
        "font.size": sheet.points,
        "text.parse_math": False,  # a device's name may hold dollars
        "text.color": LIGHT["ink"],
        "axes.labelcolor": LIGHT["ink"],
        "axes.edgecolor": LIGHT["quiet"],
        "axes.linewidth": _RULE_POINTS,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-4, 6),
        "axes.unicode_minus": True,
        "grid.color": LIGHT["rule"],
        "grid.linewidth": _RULE_POINTS,
        "xtick.color": LIGHT["quiet"],
        "ytick.color": LIGHT["quiet"],
        "xtick.labelcolor": LIGHT["ink"],
        "ytick.labelcolor": LIGHT["ink"],
        "figure.facecolor": LIGHT["paper"],
        "axes.facecolor": LIGHT["paper"],
        "legend.frameon": False,
        "hatch.linewidth": 0.5,
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        # Of names in scripts that the fonts lack: where text stays text, the reader's own fonts have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _drawn(figure: Figure, pens: Pens, sheet: Sheet) -> Drawing:
    from matplotlib.figure import Figure as Drawing
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from testbed.reports import plot_groups, plot_values

    draw = {
        CURVES: plot_values.draw_curves,
        SPANS: plot_groups.draw_spans,
        BARS: plot_groups.draw_bars,
        DOTS: plot_groups.draw_dots,
    }[figure.kind]
    drawing: Drawing = Drawing(figsize=(sheet.width, 1.0), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.05))
    axes: Axes = drawing.add_subplot()
    height, legend = draw(axes, figure, pens, sheet)
    rows = _legend(drawing, legend, sheet)
    drawing.set_figheight(height + rows * sheet.points * 1.45 / 72)
    return drawing


Legend = list[tuple[str, Any]]
#: Of the legend, in the size of its letters: a handle with its space, the space between two columns.
_HANDLE, _BETWEEN = 3.4, 1.4


def _legend(drawing: Drawing, entries: Legend, sheet: Sheet) -> int:
    """Above the plot, in as many columns as fit; gives the number of its rows."""
    if not entries:
        return 0
    widths = [_text_points(name, sheet) + _HANDLE * sheet.points for name, _ in entries]
    room = sheet.width * 72 - 2 * sheet.points
    columns = next((count for count in range(len(entries), 1, -1) if _width(widths, count, sheet) <= room), 1)
    drawing.legend(
        [handle for _, handle in entries],
        [f"\N{HAIR SPACE}{name}" if name.startswith("_") else name for name, _ in entries],  # else left out
        loc="outside upper left",
        ncols=columns,
        handlelength=2.4,
        columnspacing=_BETWEEN,
        borderaxespad=0.5,
        borderpad=0.0,
        labelspacing=0.35,
    )
    return -(-len(entries) // columns)


def _width(widths: Sequence[float], columns: int, sheet: Sheet) -> float:
    """Of a legend, in points: the entries fill one column after the other, the first ones by one more if need be."""
    rows, longer = divmod(len(widths), columns)
    ends = list(itertools.accumulate(rows + (column < longer) for column in range(columns)))
    wholes = [max(widths[begin:end]) for begin, end in itertools.pairwise([0, *ends])]
    return sum(wholes) + (columns - 1) * _BETWEEN * sheet.points


def _text_points(text: str, sheet: Sheet) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=list(sheet.fonts), size=sheet.points)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width)
