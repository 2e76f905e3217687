"""A table as CSV, as LaTeX and as Markdown, from the same values.

CSV holds them raw, in base units, with the columns' keys as its head; the others say them as the page does.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from testbed.reports.exhibits import Table, Value
from testbed.statistics import Estimate

_PARTS = ("mean", "low", "high", "count")
#: Letters of a cell beyond which it is broken into lines.
_LONGEST_LINE = 40
#: What LaTeX reads otherwise than it is written, and what pdfLaTeX's fonts lack.
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "—": "---",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "→": r"$\rightarrow$",
    "µ": r"$\mu$",
    "…": r"\ldots{}",
    "’": "'",
    "\N{LEFT SINGLE QUOTATION MARK}": "`",
    "“": "``",
    "”": "''",
    "\N{NO-BREAK SPACE}": "~",
    "\n": " ",
}
_LATEX_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))
_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>|])")


# ── CSV ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def csv_of(table: Table) -> str:
    """None is empty; an estimate is four columns: KEY_mean, KEY_low, KEY_high, KEY_count."""
    estimates = [_holds_estimates(table, index) for index in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [
        [f"{column.key}_{part}" for part in _PARTS] if wide else [column.key]
        for column, wide in zip(table.columns, estimates, strict=True)
    ]
    writer.writerow([name for head in heads for name in head])
    for row in table.rows:
        fields = [_fields(value, wide=wide) for value, wide in zip(row, estimates, strict=True)]
        writer.writerow([field for own in fields for field in own])
    return out.getvalue()


def _holds_estimates(table: Table, index: int) -> bool:
    return any(isinstance(row[index], Estimate) for row in table.rows)


def _fields(value: Value, *, wide: bool) -> list[object]:
    if isinstance(value, Estimate):
        return [value.mean, value.low, value.high, value.count]
    plain = str(value).lower() if isinstance(value, bool) else value
    return [plain, None, None, None] if wide else [plain]


# ── LaTeX ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def latex_of(table: Table) -> str:
    r"""A tabular for `\input`, with booktabs' rules; caption and notes stand above it as comments."""
    columns = "".join(_latex_column(table, index) for index in range(len(table.columns)))
    remarks = (f"{table.title}. {table.caption}", *table.notes, r"Needs \usepackage{booktabs}.")
    return "\n".join(
        [
            *(f"% {' '.join(remark.split())}" for remark in remarks),
            f"\\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            _latex_line([column.heading for column in table.columns]),
            r"\midrule",
            *map(_latex_line, table.texts()),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _latex_column(table: Table, index: int) -> str:
    """Numbers to the right; names to the left, over several lines where one is a sentence."""
    if table.columns[index].number:
        return "r"
    longest = max((len(row[index]) for row in table.texts()), default=0)
    return "l" if longest <= _LONGEST_LINE else f"p{{{_LONGEST_LINE / 2:.0f}em}}"


def latex_text(text: str) -> str:
    """A text as LaTeX prints it, letter by letter."""
    return _LATEX_SPECIAL.sub(lambda found: _LATEX[found[0]], text)


def _latex_line(cells: Sequence[str]) -> str:
    """Braces keep a cell that begins with a bracket or a star from being read as an option of the line before."""
    safe = [f"{{{text}}}" if text[:1] in {"[", "*"} else text for text in map(latex_text, cells)]
    return f"{' & '.join(safe)} \\\\"


# ── Markdown ────────────────────────────────────────────────────────────────────────────────────────────────────────
def markdown_of(table: Table) -> str:
    """Title, caption, the table as GitHub and MkDocs read it, and the notes."""
    rules = ["--:" if column.number else ":--" for column in table.columns]
    lines = [[column.heading for column in table.columns], *table.texts()]
    head, *rows = [f"| {' | '.join(map(markdown_text, line))} |" for line in lines]
    parts = [f"**{markdown_text(table.title)}.** {markdown_text(table.caption)}".rstrip(), ""]
    parts += [head, f"| {' | '.join(rules)} |", *rows]
    notes = [f"- {markdown_text(note)}" for note in table.notes]
    return "\n".join([*parts, *(["", *notes] if notes else []), ""])


def markdown_text(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    return _MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(text.split()))
