"""The page: it stands alone, it is whole, it says what it was given and nothing else, and it is the same every time."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from testbed.reports.exhibits import Point, Report, Section, Series, Table, name_column
from testbed.reports.page import page_of
from testbed.reports.palette import DARK, LIGHT, pen, pens_of
from testbed.reports.plot import NARROW, PAPER, WIDE, Sheet, _drawn, image_of
from testbed.statistics import Estimate
from tests.reports.sample import EVIL, METHODS, bars, curves, peaks, report, spans, table

FIGURES = [curves, peaks, bars, spans]
#: Elements that end by themselves.
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Elements with their attributes, in their order; raises when one is closed that was not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def text():
    return page_of(report())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_nothing_is_fetched(text, page):
    """No address of anything elsewhere, but the namespaces' names; and a policy under which none would be asked."""
    links = [value for _, held in page.elements for name, value in held.items() if name in {"src", "href", "action"}]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"@import|url\((?!#)", text)
    (policy,) = [held["content"] for held in page.of("meta") if "http-equiv" in held]
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_names_are_shown_and_never_run(text, page):
    assert len(page.of("script")) == 1  # our own
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert(") > 5
    assert page.texts.count(EVIL) > 1


def test_ids_are_unique_and_every_reference_has_its_own(text, page):
    ids = [held["id"] for _, held in page.elements if "id" in held]
    assert len(ids) == len(set(ids))
    named = [held.get(name, "") for _, held in page.elements for name in ("aria-labelledby", "aria-describedby")]
    links = [held["href"][1:] for _, held in page.elements if held.get("href", "").startswith("#")]
    assert {*" ".join(named).split(), *links, *re.findall(r"url\(#([^)]*)\)", text)} <= set(ids)


def test_who_listens_is_told_everything(page):
    assert [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)] == ["h1", *["h2"] * 6]
    assert all(len(page.of(tag)) == 1 for tag in ("header", "nav", "main", "footer", "h1"))
    drawings = page.of("svg")
    assert len(drawings) == 2 * len(FIGURES)  # for wide and for narrow screens: one of them is shown
    assert all(drawing["role"] == "img" and drawing["aria-labelledby"] for drawing in drawings)
    assert len(page.of("desc")) == len(drawings)
    regions = [held for held in page.of("div") if held.get("role") == "region"]
    assert len(regions) == len(page.of("table")) == len(page.of("caption")) == 2 + len(FIGURES)
    assert all(held["tabindex"] == "0" and held["aria-labelledby"] for held in regions)
    assert all(held["scope"] in {"col", "row"} for held in page.of("th"))
    assert page.of("html")[0]["lang"] == "en"


def test_cells_carry_their_raw_values(text):
    """In full, beside the rounded ones; an estimate with its ends; of what was not measured there is nothing."""
    alone = page_of(Report("one", "", (Section("quality", "Quality", (), (table(),)),)))
    page = Page(alone)
    cells = [held for tag, held in page.elements if tag in {"td", "th"} and held.get("scope") != "col"]
    ours = table().rows[0][1]
    assert isinstance(ours, Estimate)
    assert cells[1] == {
        "class": "number", "data-value": repr(ours.mean), "data-low": repr(ours.low), "data-high": repr(ours.high),
        "data-count": "3",
    }  # fmt: skip
    assert [cell.get("data-value") for cell in cells[:6]] == [
        "lora", repr(ours.mean), str(512 << 20), "12.345678901234567", "true", "100 % of it_all",
    ]  # fmt: skip
    assert [cell.get("data-value") for cell in cells[12:17]] == ["fedpruner", None, None, "0.0", None]
    for said in ("0.670 ± 0.066", "512 MiB", "12.3 s", "0.00 s"):
        assert f">{said}</td>" in alone


def test_the_same_report_gives_the_same_bytes(text):
    assert page_of(report()) == text


def test_the_title_of_each_exhibit_is_told_as_it_is_drawn():
    told = []
    page_of(report(), told.append)
    assert told == [exhibit.title for exhibit in report().exhibits]


def test_an_empty_table_and_an_empty_report_are_pages_too():
    empty = Table("none", "Nothing", "", (name_column("run", "Run"),), ())
    assert "nothing" in Page(page_of(Report("empty", "", (Section("all", "All", (), (empty,)),)))).texts
    Page(page_of(Report("empty", "", ())))


# ── drawings ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("figure", FIGURES)
def test_colours_of_a_drawing_are_the_pages(text, figure):
    """Every colour is a variable, of which the page has a light and a dark value."""
    drawing = re.search(rf"<svg [^>]*{figure().key}-wide-title.*?</svg>", text, re.DOTALL)[0]
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", drawing)) - {"sans"}
    assert used <= set(LIGHT) == set(DARK)
    assert len(used) > 4
    assert not re.search(r"#[0-9a-f]{6}|rgb\(", drawing)


def test_text_stays_text_and_is_shown_as_it_is_written():
    """Dollars are no formulas, a name that begins with _ is in the legend, and letters no font has are no error."""
    odd = "größe 電力 $x_1$"
    figure = curves()
    renamed = [*figure.series[:1], type(figure.series[0])(odd, figure.series[1].points)]
    drawn = type(figure)(**{**vars(figure), "series": (*renamed, type(renamed[0])("_mine", renamed[0].points))})
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", image_of(drawn, {}, "svg").decode())
    assert odd in texts
    assert "\N{HAIR SPACE}_mine" in texts
    assert {"lora", "Time (s)", "Accuracy", "majority class"} <= set(texts)


def test_what_was_not_measured_is_not_drawn():
    texts = image_of(curves(), {}, "svg").decode()
    assert ">gap<" in texts
    assert ">empty<" not in texts


@pytest.mark.parametrize("values", [(0.3,), (0.3, 0.4)], ids=["one round", "two rounds"])
def test_methods_with_the_same_values_are_both_seen(values):
    """Lone marks lie beside each other; of two curves that coincide the lower one is the wider."""
    points = tuple(Point(at, value) for at, value in enumerate(values, 1))
    same = replace(curves(0), series=(Series("one", points), Series("other", points)), lines=())
    for axis in (same.x, replace(same.x, start_at_zero=True)):
        first, second = lines_of(replace(same, x=axis))
        if len(values) == 1:
            assert second["x"][0] - first["x"][0] == pytest.approx(6.0)  # points: wider than a mark
        else:
            assert first["x"] == pytest.approx(second["x"])
            assert first["width"] > second["width"] + 2
        assert max(second["x"]) < second["right"] - 4  # the last mark is whole


def lines_of(figure):
    """Where the curves of a figure lie across, in points, and how wide they are."""
    drawing = _drawn(figure, {}, PAPER)
    drawing.draw_without_rendering()
    (axes,) = drawing.axes
    scale = 72 / drawing.dpi
    return [
        {
            "x": [line.get_transform().transform(pair)[0] * scale for pair in line.get_xydata()],
            "right": axes.bbox.x1 * scale,
            "width": line.get_linewidth(),
        }
        for line in axes.lines
    ]


def test_budgets_and_predictions_are_in_the_legend_and_waiting_is_hatched():
    shown = image_of(peaks(), {}, "svg").decode()
    assert all(f">{name}<" in shown for name in ("lora", "lora, predicted", "budget"))
    line = image_of(spans(), {}, "svg").decode()
    assert ">waiting<" in line
    assert "<pattern" in line


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("count", [1, 12])
def test_many_curves_leave_room_for_the_plot(count, width):
    """The legend makes the drawing higher, not the plot lower."""
    box = re.search(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', image_of(curves(count), {}, "svg", Sheet(width)))
    across, high = float(box[1]), float(box[2])
    assert across == pytest.approx(width * 72)
    assert high > 2.1 * 72 + 10 * (count > 1)


def test_fonts_are_embedded_in_a_pdf_as_truetype():
    document = image_of(curves(), {}, "pdf", PAPER)
    assert b"/FontFile2" in document
    assert b"/Type3" not in document


# ── pens ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_name_has_the_same_pen_in_every_figure_and_no_other_has_it():
    pens = pens_of(report())
    assert [pens[name] for name in METHODS] == [pen(index) for index in range(3)]
    assert [pens[name].role for name in ("load", "train")] == ["data-0", "data-1"]  # what time went into: counted apart


def test_pens_differ_without_colour():
    """Of forty, no two in marker, dash and colour; of the first eight, none in marker or hatch alone."""
    forty = [pen(index) for index in range(40)]
    assert len({(each.marker, each.dash, each.role) for each in forty}) == 40
    assert len({each.marker for each in forty[:8]}) == len({each.hatch for each in forty[:8]}) == 8


#: Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as seen with a kind of colour blindness.
SEEN = {
    "all colours": np.eye(3),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(seen: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    relative = to_xyz @ np.clip(seen, 0, 1) / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(linear(each) @ [0.2126, 0.7152, 0.0722]) for each in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper_and_stay_apart_for_everyone(palette):
    data = [colour for role, colour in palette.items() if role.startswith("data")]
    assert all(contrast(colour, palette["paper"]) >= 3 for colour in data)
    assert all(contrast(palette[role], palette["paper"]) >= 4.5 for role in ("ink", "quiet"))
    assert len(set(palette.values())) == len(palette)
    for matrix in SEEN.values():
        seen = [lab(matrix @ linear(colour)) for colour in data]
        assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 20
