"""Raw power samples on the disk of whoever takes them: appended one by one, read by their times.

A row is a fixed number of doubles, so that a window of a run of hours is found by bisection, and the agent holds none
of it in memory:

    seconds (monotonic clock) · clock offset (wall clock less monotonic clock) · watts of each rail [· joules of each]
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import BinaryIO

Row = tuple[float, ...]
#: What a row begins with, before the rails.
SECONDS, CLOCK_OFFSET, FIRST_RAIL = 0, 1, 2


class PowerLog:
    """A file of rows of one width, in the order of their times."""

    def __init__(self, path: Path, columns: int) -> None:
        self._row = struct.Struct(f"<{columns}d")
        self._file: BinaryIO = path.open("w+b", buffering=0)
        self.count = 0

    def append(self, row: Row) -> None:
        """Add a row; raises OSError where the disk takes no more."""
        self._file.seek(self.count * self._row.size)
        if self._file.write(self._row.pack(*row)) < self._row.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the last bytes of a disk: part of a row
        self.count += 1  # a row that was written in part only is written over by the next

    def rows(self, begin: float, end: float) -> list[Row]:
        """Every row between two times, with the one before and the one after where there are any."""
        first, last = max(0, self._first_from(begin) - 1), min(self.count, self._first_after(end) + 1)
        self._file.seek(first * self._row.size)
        data = self._file.read(max(0, last - first) * self._row.size)
        return list(self._row.iter_unpack(data[: len(data) - len(data) % self._row.size]))

    def close(self) -> None:
        self._file.close()

    def _first_from(self, seconds: float) -> int:
        return self._bisect(lambda at: at >= seconds)

    def _first_after(self, seconds: float) -> int:
        return self._bisect(lambda at: at > seconds)

    def _bisect(self, beyond: Callable[[float], bool]) -> int:
        low, high = 0, self.count
        while low < high:
            middle = (low + high) // 2
            if beyond(self._seconds(middle)):
                high = middle
            else:
                low = middle + 1
        return low

    def _seconds(self, index: int) -> float:
        self._file.seek(index * self._row.size)
        return float(self._row.unpack(self._file.read(self._row.size))[SECONDS])
