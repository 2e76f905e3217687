"""The report as files for a paper: every figure as PDF, SVG and PNG, every table as LaTeX, CSV and Markdown.

FOLDER/
  index.md                        what there is, and how a paper takes it in
  figures/KEY.pdf .svg .png       a column wide (3.4 inches), fonts embedded
  figures/KEY.tex .csv .md        the numbers of the figure
  tables/KEY.tex .csv .md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from testbed.durable import disk_errors_in_words
from testbed.errors import UsageError
from testbed.reports.exhibits import Figure, Report, Table
from testbed.reports.files import write_file
from testbed.reports.palette import Pens, pens_of
from testbed.reports.plot import image_of
from testbed.reports.table_texts import csv_of, latex_of, latex_text, markdown_of, markdown_text

INDEX = "index.md"
#: The index's first line: by it the folder is known again, and is written over.
_MARK = "<!-- Written by `testbed report --paper`, which replaces it. -->"
_IMAGES = ("pdf", "svg", "png")
_TEXTS = {"tex": latex_of, "csv": csv_of, "md": markdown_of}


def write_paper(report: Report, folder: Path, tell: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Write everything below `folder`, and give the files; what else is there stays.

    `tell` is called with the title of each exhibit before it is drawn.  Raises UsageError for a folder in which others
    keep files, and StoreError when the place takes nothing.
    """
    check_folder(folder)
    pens = pens_of(report)
    # First, so that what a kill leaves there is known for a paper's and can be written over.
    index = write_file(folder / INDEX, _index(report))
    written: list[Path] = []
    for exhibit in report.exhibits:
        tell(exhibit.title)
        written += [write_file(folder / name, content) for name, content in _files(exhibit, pens)]
    return [*written, index]


def check_folder(folder: Path) -> None:
    """Raise UsageError for what is no folder, and for one that is neither empty nor an earlier paper's."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--paper {folder}: expected a folder, there is a file; name another place")
    if not folder.is_dir() or _is_ours(folder / INDEX):
        return
    with disk_errors_in_words(folder):
        taken = any(not path.name.startswith(".") for path in folder.iterdir())
    if taken:
        raise UsageError(
            f"--paper {folder}: is not empty, and no `--paper` has written it; name another folder, or empty this one"
        )


def _is_ours(index: Path) -> bool:
    try:
        with index.open(encoding="utf-8", errors="replace") as file:
            return file.readline().rstrip() == _MARK
    except OSError:
        return False


def _files(exhibit: Table | Figure, pens: Pens) -> Iterator[tuple[str, bytes | str]]:
    """Place below the folder → content."""
    if isinstance(exhibit, Figure):
        for form in _IMAGES:
            yield f"figures/{exhibit.key}.{form}", image_of(exhibit, pens, form)
    table = exhibit.table if isinstance(exhibit, Figure) else exhibit
    for ending, text_of in _TEXTS.items():
        yield f"{_place(exhibit)}.{ending}", text_of(table)


def _place(exhibit: Table | Figure) -> str:
    return f"{'figures' if isinstance(exhibit, Figure) else 'tables'}/{exhibit.key}"


# ── the index ───────────────────────────────────────────────────────────────────────────────────────────────────────
def _index(report: Report) -> str:
    parts = [_MARK, f"# {markdown_text(report.title)}", markdown_text(report.subtitle)]
    parts += ["\n".join(f"- {markdown_text(name)}: {markdown_text(value)}" for name, value in report.facts)]
    parts.append(
        "Numbers in the LaTeX and Markdown tables are rounded for reading; the CSV files hold them in full, in base "
        "units. The LaTeX tables need `\\usepackage{booktabs}`, the figures `\\usepackage{graphicx}`."
    )
    for section in report.sections:
        if section.exhibits:
            parts += [f"## {markdown_text(section.title)}", *map(_entry, section.exhibits)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _entry(exhibit: Table | Figure) -> str:
    place = _place(exhibit)
    endings = (*_IMAGES, *_TEXTS) if isinstance(exhibit, Figure) else tuple(_TEXTS)
    links = " ".join(f"[{ending}]({place}.{ending})" for ending in endings)
    head = f"### {markdown_text(exhibit.title)}\n\n{markdown_text(exhibit.caption)}\n\n{links}"
    notes = "\n".join(f"- {markdown_text(note)}" for note in exhibit.notes)
    return "\n\n".join(part for part in (head, notes, f"```latex\n{_float(exhibit)}\n```") if part)


def _float(exhibit: Table | Figure) -> str:
    """How a paper takes it in."""
    caption = f"\\caption{{{latex_text(f'{exhibit.title}. {exhibit.caption}')}}}"
    if isinstance(exhibit, Figure):
        body = f"\\includegraphics[width=\\columnwidth]{{{_place(exhibit)}.pdf}}"
        lines = [r"\begin{figure}", r"\centering", body, caption, f"\\label{{fig:{exhibit.key}}}", r"\end{figure}"]
    else:
        body = f"\\input{{{_place(exhibit)}.tex}}"
        lines = [r"\begin{table}", r"\centering", caption, f"\\label{{tab:{exhibit.key}}}", body, r"\end{table}"]
    return "\n".join(lines)
