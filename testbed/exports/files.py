"""Exported tables as Parquet, CSV or JSON files in a folder, each whole or not there.

The folder's schema.json says what was written: an export into the same folder replaces those files, and no others.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from testbed.durable import disk_errors_in_words, read_json, write_json
from testbed.errors import StoreError, UsageError
from testbed.exports.schema import INTEGER, REAL, TEXT, TRUTH, Row, Table, described

if TYPE_CHECKING:
    from io import TextIOWrapper

PARQUET = "parquet"
FORMATS = (PARQUET, "csv", "json")
SCHEMA = "schema.json"
README = "README.md"
_WRITTEN_BY = "testbed export"
#: Rows that are held before they go to the disk.
_BATCH = 20_000


class _Writer(Protocol):
    def write(self, rows: Sequence[tuple[Any, ...]]) -> None: ...

    def close(self) -> None: ...


def write_tables(folder: Path, made: tuple[Table, ...], rows: Iterable[Row], kind: str) -> dict[str, int]:
    """Write `NAME.parquet` (or .csv, .json) for every table; gives the number of rows of each.

    Raises UsageError where the library for the format is lacking, StoreError where the disk takes no more.
    """
    counts = {table.name: 0 for table in made}
    waiting: dict[str, list[tuple[Any, ...]]] = {table.name: [] for table in made}
    by_name = {table.name: table for table in made}
    with disk_errors_in_words(folder), ExitStack() as files:
        writers = {table.name: files.enter_context(_open(folder, table, kind)) for table in made}
        for row in rows:
            own = waiting[row.table]
            own.append(by_name[row.table].tuples(row))
            counts[row.table] += 1
            if len(own) >= _BATCH:
                writers[row.table].write(own)
                own.clear()
        for name, own in waiting.items():
            writers[name].write(own)
    return counts


@contextmanager
def _open(folder: Path, table: Table, kind: str) -> Iterator[_Writer]:
    """A writer of a file that is put in its place when all went well."""
    target = folder / f"{table.name}.{kind}"
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        writer: _Writer = _WRITERS[kind](partial, table)
        try:
            yield writer
        finally:
            writer.close()
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


class _Parquet:
    """Types as they are: an integer with a null stays an integer."""

    def __init__(self, path: Path, table: Table) -> None:
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise UsageError(
                "Parquet needs pyarrow, which is not installed: pip install 'edge-testbed[controller]', or choose "
                "--format csv or --format json"
            ) from None
        kinds = {TEXT: pa.string(), INTEGER: pa.int64(), REAL: pa.float64(), TRUTH: pa.bool_()}
        self._pa = pa
        self._schema = pa.schema(
            [
                pa.field(each.name, kinds[each.kind], metadata={"meaning": each.meaning, "unit": each.unit or ""})
                for each in table.columns
            ],
            metadata={"row": table.meaning},
        )
        self._writer = parquet.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, rows: Sequence[tuple[Any, ...]]) -> None:
        columns = [self._pa.array([row[place] for row in rows], field.type) for place, field in enumerate(self._schema)]
        self._writer.write_table(self._pa.Table.from_arrays(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


class _Text:
    """A text file in UTF-8."""

    def __init__(self, path: Path, table: Table) -> None:
        self.names = [column.name for column in table.columns]
        self.stream: TextIOWrapper = path.open("w", encoding="utf-8", newline="")

    def close(self) -> None:
        self.stream.close()


class _Csv(_Text):
    """A heading, then a line for each row; null is an empty field, a boolean is true or false."""

    def __init__(self, path: Path, table: Table) -> None:
        super().__init__(path, table)
        self._csv = csv.writer(self.stream, lineterminator="\n")
        self._csv.writerow(self.names)

    def write(self, rows: Sequence[tuple[Any, ...]]) -> None:
        self._csv.writerows([str(value).lower() if isinstance(value, bool) else value for value in row] for row in rows)


class _Json(_Text):
    """One array of objects, an object a line."""

    def __init__(self, path: Path, table: Table) -> None:
        super().__init__(path, table)
        self._between = "[\n"

    def write(self, rows: Sequence[tuple[Any, ...]]) -> None:
        for row in rows:
            text = json.dumps(dict(zip(self.names, row, strict=True)), ensure_ascii=False)
            self.stream.write(f"{self._between}{text}")
            self._between = ",\n"

    def close(self) -> None:
        self.stream.write("\n]\n" if self._between != "[\n" else "[]\n")
        super().close()


_WRITERS: dict[str, Callable[[Path, Table], _Writer]] = {PARQUET: _Parquet, "csv": _Csv, "json": _Json}


# ── the folder ──────────────────────────────────────────────────────────────────────────────────────────────────────
def claim(folder: Path, planned: Sequence[str]) -> list[str]:
    """Make the folder, or take one that an export has written; gives the files of that export.

    It is marked at once, so that what a kill leaves there can be exported over.  Raises UsageError for a folder in
    which something else lies: nothing of it is touched.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder with -o")
    with disk_errors_in_words(folder):
        folder.mkdir(parents=True, exist_ok=True)
        before = _before(folder)
        if before is None and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UsageError(
                f"{folder} is not empty, and no export has written it: name another folder with -o, or empty this one"
            )
        files = sorted({*(before or ()), *planned})
        write_json(folder / SCHEMA, {"written_by": _WRITTEN_BY, "complete": False, "files": files}, sync=True)
    return before or []


def _before(folder: Path) -> list[str] | None:
    """The files that an earlier export has written there; None where there was none."""
    try:
        content = read_json(folder / SCHEMA)
    except StoreError:
        return None
    if not isinstance(content, dict) or content.get("written_by") != _WRITTEN_BY:
        return None
    return [str(name) for name in content.get("files", ())]


def finish(
    folder: Path, made: tuple[Table, ...], files: Sequence[str], before: Sequence[str], runs: Sequence[str]
) -> None:
    """Describe what was written, and remove what an earlier export wrote and this one did not."""
    told = list(described(made))
    written = [README, *files]
    content = {"written_by": _WRITTEN_BY, "complete": True, "runs": list(runs), "files": written, "tables": told}
    with disk_errors_in_words(folder):
        partial = folder / f".{README}.{os.getpid()}.partial"
        partial.write_text(_readme(told, runs), encoding="utf-8")
        partial.replace(folder / README)
        write_json(folder / SCHEMA, content, sync=True)
        for name in before:
            path = folder / name
            if name not in written and path.is_file() and path.resolve().is_relative_to(folder.resolve()):
                path.unlink()
                _remove_emptied(path.parent, folder)


def _remove_emptied(path: Path, folder: Path) -> None:
    """A folder below `folder` in which nothing is left, and those above it alike."""
    while path != folder and not any(path.iterdir()):
        path.rmdir()
        path = path.parent


def _readme(tables: Sequence[dict[str, Any]], runs: Sequence[str]) -> str:
    lines = [
        "# Results of runs of the edge testbed",
        "",
        f"Written by `{_WRITTEN_BY}` from {len(runs)} run{'' if len(runs) == 1 else 's'}: {', '.join(runs)}.",
        "",
        "Units are in the names of the columns, and always base units. A value that is null, or an empty field, was",
        "not measured; it is never 0. `run` and `job` join the tables. schema.json says the same for programs.",
    ]
    for table in tables:
        lines += ["", f"## {table['name']}", "", f"A row is {table['row']}.", "", "| column | type | unit | meaning |"]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| {each['name']} | {each['type']} | {each['unit'] or ''} | {each['meaning']} |"
            for each in table["columns"]
        ]
    return "\n".join(lines) + "\n"
