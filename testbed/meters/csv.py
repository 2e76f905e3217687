"""A bench instrument's export: a CSV file of power, or of volts and amps, that is read after a run.

    meter:
      csv: {file: export.csv, watts: "Power(W)", gain: 0.001}
      csv: {file: joulescope.csv, time: "#time", volts: voltage, amps: current, offset_seconds: 1769900000}
      csv: {file: messung.csv, time: Zeit, watts: "Leistung [W]", decimal: ",", skip_lines: 3}

Times are seconds since 1970, or ISO 8601 (without a zone: this machine's own).  `offset_seconds` is added to them: what
the instrument's clock is behind ours, or where its count began.  With `decimal: ","` columns are separated by ";", else
by ","; `delimiter` says otherwise.  `skip_lines` stand above the header.

A file that an instrument still writes to is read as far as it goes.  The accuracy is the instrument's own, from its
manual: `gain` (a ratio at 95 %), `offset_watts`, `step_watts`, `timing_seconds`; without them 1 %, and one second by
which two clocks that people set may differ, both assumptions.

Tried on: files made for the tests, in the forms above; on no instrument's yet.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_left, bisect_right
from datetime import datetime
from itertools import islice, pairwise
from statistics import median
from typing import TYPE_CHECKING

from testbed.errors import MeterError
from testbed.meters import CONTROLLER, Accuracy, Meter, Reading

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LOOKED_AT = 1000


class CsvMeter(Meter):
    """`watts`, or `volts` and `amps`, and `time` are the names of columns."""

    where = CONTROLLER
    period_seconds = 1.0
    retrospective = True
    point = "dc_input"

    def __init__(  # noqa: PLR0913 -- what a file may look like
        self,
        file: str,
        time: str = "time",
        watts: str | None = None,
        volts: str | None = None,
        amps: str | None = None,
        offset_seconds: float = 0.0,
        *,
        delimiter: str | None = None,
        decimal: str = ".",
        skip_lines: int = 0,
        gain: float = 0.01,
        offset_watts: float = 0.0,
        step_watts: float = 0.0,
        timing_seconds: float = 1.0,
    ) -> None:
        if (watts is None) == (volts is None) or (volts is None) != (amps is None):
            raise ValueError("it needs the name of a column: watts, or both volts and amps")
        if decimal not in {".", ","}:
            raise ValueError(f'decimal: expected "." or ",", got {decimal!r}')
        self._delimiter = delimiter or (";" if decimal == "," else ",")
        if len(self._delimiter) != 1 or self._delimiter == decimal:
            raise ValueError(f"delimiter: expected one character other than the decimal's, got {self._delimiter!r}")
        self._file, self._time, self._offset = file, time, offset_seconds
        self._columns = tuple(column for column in (watts, volts, amps) if column is not None)
        self._decimal, self._skipped = decimal, skip_lines
        self._accuracy = Accuracy(gain, offset_watts, step_watts, timing_seconds)

    def open(self) -> None:
        """Look whether the file is there with its columns, and how close its rows are; raises MeterError."""
        times = [reading.unix_seconds or 0.0 for reading in islice(self._rows(), _LOOKED_AT)]
        if len(times) < 2:
            raise MeterError(f"{self._file}: there are fewer than two rows below its header")
        spacing = median(later - earlier for earlier, later in pairwise(times))
        self.period_seconds = spacing
        self.rails = self.total_rails = (" × ".join(self._columns),)
        self.accuracy = (self._accuracy,)

    def history(self, since: float, until: float) -> Sequence[Reading]:
        found = list(self._rows())
        times = [reading.unix_seconds or 0.0 for reading in found]
        first, last = bisect_right(times, since) - 1, bisect_left(times, until)
        return found[max(0, first) : last + 1]

    def _rows(self) -> Iterator[Reading]:
        """Every row; raises MeterError with its line for one that is wrong."""
        try:
            with open(self._file, encoding="utf-8-sig", newline="") as lines:  # noqa: PTH123 -- a path as it was given
                for _ in range(self._skipped):
                    next(lines, None)
                whole = (line for line in lines if line.endswith("\n"))  # the last one may be half written
                yield from self._read(csv.reader(whole, delimiter=self._delimiter))
        except OSError as error:
            raise MeterError(
                f"{self._file}: cannot be read ({error.strerror}); put the instrument's export there"
            ) from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise MeterError(f"{self._file}: is no CSV file ({error})") from None

    def _read(self, table: Iterator[list[str]]) -> Iterator[Reading]:
        names = [name.strip() for name in next(table, [])]
        where = {column: self._found(names, column) for column in (self._time, *self._columns)}
        before = -math.inf
        for number, cells in enumerate(table, self._skipped + 2):
            if any(map(str.strip, cells)):
                reading = self._reading(number, cells, where, before)
                before = reading.unix_seconds or 0.0
                yield reading

    def _found(self, names: list[str], column: str) -> int:
        if column in names:
            return names.index(column)
        raise MeterError(
            f"{self._file}, line {self._skipped + 1}: there is no column {column!r}; there are "
            f"{', '.join(map(repr, names)) or 'none'} (separated by {self._delimiter!r})"
        )

    def _reading(self, number: int, cells: list[str], where: dict[str, int], before: float) -> Reading:
        def cell(column: str) -> str:
            if where[column] >= len(cells):
                raise self._wrong(number, column, "a value", "nothing")
            return cells[where[column]].strip()

        at = self._seconds(number, cell(self._time)) + self._offset
        if at <= before:
            later = "a later time than the line before has (with fractions of a second where rows are as close)"
            raise self._wrong(number, self._time, later, cell(self._time))
        watts = math.prod(self._number(number, column, cell(column)) for column in self._columns)
        return Reading((watts,), None, at)

    def _seconds(self, number: int, text: str) -> float:
        try:
            return self._plain(text)
        except ValueError:
            pass
        try:
            return datetime.fromisoformat(text.replace("Z", "+00:00").replace(",", ".")).timestamp()
        except (ValueError, OverflowError):
            raise self._wrong(number, self._time, "seconds since 1970, or a time as ISO 8601", text) from None

    def _number(self, number: int, column: str, text: str) -> float:
        try:
            return self._plain(text)
        except ValueError:
            raise self._wrong(number, column, f'a number with the decimal "{self._decimal}"', text) from None

    def _plain(self, text: str) -> float:
        if self._decimal == "," and "." in text:
            raise ValueError(text)
        value = float(text.replace(self._decimal, "."))
        if not math.isfinite(value):
            raise ValueError(text)
        return value

    def _wrong(self, number: int, column: str, expected: str, got: str) -> MeterError:
        return MeterError(f"{self._file}, line {number}, column {column!r}: expected {expected}, got {got!r}")
