"""Tables on the terminal, all of one look."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Columns of a table that goes into a file or a pipe, where nobody can make the window wider.
PIPED_COLUMNS = 160


def show(made: Table) -> None:
    """Print a table on standard output."""
    Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS).print(made)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()) -> Table:
    """A table of plain text (no markup is read into it); the columns in `numbers` are set to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        made.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
