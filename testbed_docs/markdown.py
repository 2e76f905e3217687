"""Markdown from the code's own words: tables, and docstrings as they stand."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\*_<\[\]|])")
_AS_IT_STANDS = re.compile(r"(`[^`]+`|https?://[^\s)>,]+)")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(' '.join(str(cell).split()) for cell in line)} |" for line in lines) + "\n"


def plain(text: str) -> str:
    """Text in which nothing but `code` and addresses means anything."""
    found = (
        _in_cell(piece) if _AS_IT_STANDS.fullmatch(piece) else _SPECIAL.sub(r"\\\1", piece)
        for piece in _AS_IT_STANDS.split(text)
    )
    return "".join(found)


def code(text: object) -> str:
    """One word or line of code; a dash for an empty one."""
    return _in_cell(f"`{text}`") if str(text) else "–"


def _in_cell(text: str) -> str:
    """A bar within code would end a table's cell."""
    return text.replace("|", "\\|")


def docstring(thing: object) -> str:
    """A docstring's paragraphs, and what is indented in it as it stands (YAML examples, tables, drawings)."""
    return paragraphs(inspect.getdoc(thing) or "")


def paragraphs(text: str) -> str:
    """The same of a text."""
    found = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.splitlines()
        indented = [line for line in lines if line.startswith("  ")]
        if indented and len(indented) == len(lines):
            found.append(block if lines[0].startswith("    ") else "\n".join(f"  {line}" for line in lines))
        elif indented or _is_drawing(block):
            found.append("\n".join(f"    {line}" for line in lines))
        else:
            found.append(plain(block).replace("  ", " "))
    return "\n\n".join(found) + "\n"


def _is_drawing(block: str) -> bool:
    return any(character in block for character in "├└│─►")
