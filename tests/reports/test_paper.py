"""Files for a paper: the same numbers in each form, and nothing in them that LaTeX, CSV or Markdown reads otherwise."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from testbed.errors import StoreError, UsageError
from testbed.reports.exhibits import Figure
from testbed.reports.page import page_of
from testbed.reports.paper import write_paper
from testbed.reports.table_texts import csv_of, latex_of, latex_text, markdown_of, markdown_text
from testbed.statistics import Estimate
from tests.reports.sample import EVIL, report, table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("paper") / "of" / "mine"
    write_paper(report(), place)
    return place


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_exhibit_is_there_in_every_form_and_listed(folder):
    wanted = {"index.md"}
    for exhibit in report().exhibits:
        images = ("pdf", "svg", "png") if isinstance(exhibit, Figure) else ()
        kind = "figures" if images else "tables"
        wanted |= {f"{kind}/{exhibit.key}.{ending}" for ending in (*images, "tex", "csv", "md")}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == wanted
    starts = {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}
    assert all((folder / "figures" / f"peaks.{form}").read_bytes().startswith(start) for form, start in starts.items())
    listed = set(re.findall(r"\]\(([^)]*)\)", (folder / "index.md").read_text()))
    assert listed == wanted - {"index.md"}


def test_a_folder_in_which_others_keep_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "index.md").write_text("keep\n")
    with pytest.raises(UsageError, match="is not empty, and no `--paper` has written it; name another folder"):
        write_paper(report(), tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("index.md", "keep\n")]


def test_foreign_files_stay_and_the_same_report_gives_the_same_bytes(tmp_path):
    first = {path: path.read_bytes() for path in write_paper(report(), tmp_path)}
    tmp_path.joinpath("figures", "mine.tex").write_text("mine")
    assert {path: path.read_bytes() for path in write_paper(report(), tmp_path)} == first
    assert tmp_path.joinpath("figures", "mine.tex").read_text() == "mine"
    assert not list(tmp_path.rglob("*.partial"))


def test_a_place_that_takes_nothing_is_told(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match="expected a folder"):
        write_paper(report(), tmp_path / "taken")
    empty = replace(report(), sections=())
    write_paper(empty, tmp_path / "paper")
    (tmp_path / "paper" / "tables").write_text("")
    with pytest.raises(StoreError, match=r"tables/runs.tex: cannot be written .*; name another place"):
        write_paper(report(), tmp_path / "paper")


# ── the same numbers ────────────────────────────────────────────────────────────────────────────────────────────────
def test_csv_holds_raw_values_in_base_units(folder):
    rows = list(csv.DictReader((folder / "tables" / "quality.csv").read_text().splitlines()))
    ours = table().rows[0][1]
    assert isinstance(ours, Estimate)
    assert rows[0] == {
        "method": "lora", "accuracy_mean": repr(ours.mean), "accuracy_low": repr(ours.low),
        "accuracy_high": repr(ours.high), "accuracy_count": "3", "peak_bytes": str(512 << 20),
        "seconds": "12.345678901234567", "capped": "true", "remark": "100 % of it_all",
    }  # fmt: skip
    assert rows[1]["method"] == EVIL
    assert (rows[1]["accuracy_low"], rows[1]["accuracy_count"], rows[1]["seconds"]) == ("", "2", "")
    assert (rows[2]["accuracy_mean"], rows[2]["seconds"], rows[2]["capped"]) == ("", "0.0", "")


def test_page_latex_and_markdown_say_the_same():
    """Cell by cell, once each form's own spelling is undone."""
    said = list(table().texts())
    latex = [line.removesuffix(r" \\").split(" & ") for line in latex_of(table()).splitlines() if line.endswith(r"\\")]
    assert latex[1:] == [[latex_text(text) for text in row] for row in said]
    lines = [line for line in markdown_of(table()).splitlines() if line.startswith("|")][2:]
    assert lines == [f"| {' | '.join(map(markdown_text, row))} |" for row in said]
    page = page_of(report())
    assert all(f">{text}</t" in page for text in ("0.670 ± 0.066", "512 MiB", "12.3 s", "–"))


# ── spelling ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("text", "spelt"),
    [
        ("50 % & more_of #1", r"50 \% \& more\_of \#1"),
        ("$x^2$ {a} ~", r"\$x\textasciicircum{}2\$ \{a\} \textasciitilde{}"),
        (r"C:\new", r"C:\textbackslash{}new"),
        ("<b> |", r"\textless{}b\textgreater{} \textbar{}"),
        ("0.6 ± 0.1 – −1 ≥ 2 × 3", r"0.6 $\pm$ 0.1 -- $-$1 $\geq$ 2 $\times$ 3"),
    ],
)
def test_latex_prints_what_was_written(text, spelt):
    assert latex_text(text) == spelt


def test_a_cell_is_no_option_of_the_line_before():
    bracketed = type(table())(**{**vars(table()), "rows": (("[1]", None, None, None, None, "*"),)})
    assert "\n{[1]} & -- & -- & -- & -- & {*} \\\\" in latex_of(bracketed)


def test_markdown_shows_what_was_written():
    assert markdown_text("a|b <i>\n*c* _d_ [e]") == r"a\|b \<i\> \*c\* \_d\_ \[e\]"
    assert len([line for line in markdown_of(table()).splitlines() if line.startswith("|")]) == 2 + len(table().rows)


def test_a_comment_of_latex_stays_on_its_line():
    broken = type(table())(**{**vars(table()), "caption": "one\ntwo"})
    assert all(line.startswith("%") for line in latex_of(broken).split("\\begin")[0].splitlines())


def test_csv_without_rows_has_its_head():
    assert (
        csv_of(type(table())(**{**vars(table()), "rows": ()})) == "method,accuracy,peak_bytes,seconds,capped,remark\n"
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None and "CI" not in os.environ, reason="there is no pdflatex here")
def test_latex_takes_it_in(folder, tmp_path):
    """As the index says, all of it."""
    floats = "\n".join(re.findall(r"```latex\n(.*?)```", (folder / "index.md").read_text(), re.DOTALL))
    head = r"\documentclass[twocolumn]{article}\usepackage{booktabs}\usepackage{graphicx}\begin{document}"
    (tmp_path / "paper.tex").write_text(f"{head}\n{floats}\n\\end{{document}}\n")
    for place in ("figures", "tables"):
        (tmp_path / place).symlink_to(folder / place)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout
