"""Raw memory samples of a job as a file of its run: a line for each, the phases counted from 0 in the job.

    phase,name,seconds,vmhwm_bytes,anonymous_bytes,file_bytes,unreclaimable_bytes[,accelerator_bytes]
    2,start,0.0529,20234240,9924608,10309632,10092544

`seconds` count from the beginning of the phase.
"""

from __future__ import annotations

import csv
import io
from typing import NamedTuple

from testbed.errors import StoreError


class MemorySample(NamedTuple):
    """What the counters of a trainer said once, in bytes; None where they could not be read."""

    phase: int
    name: str
    seconds: float
    vmhwm_bytes: int | None
    anonymous_bytes: int | None
    file_bytes: int | None
    unreclaimable_bytes: int | None
    accelerator_bytes: int | None = None


_COLUMNS = MemorySample._fields


def parse(text: str, source: str) -> list[MemorySample]:
    """The samples of a file's text; raises StoreError, naming `source`, for one that is not what was written."""
    rows = csv.reader(io.StringIO(text))
    heading = tuple(next(rows, ()))
    if heading not in (_COLUMNS, _COLUMNS[:-1]):
        raise StoreError(f"{source}: expected the columns {','.join(_COLUMNS)}, got {','.join(heading) or 'nothing'}")
    samples = []
    for row in rows:
        if len(row) not in (len(_COLUMNS), len(_COLUMNS) - 1):
            raise StoreError(f"{source}: line {rows.line_num}: expected {len(heading)} values, got {len(row)}")
        try:
            samples.append(MemorySample(int(row[0]), row[1], float(row[2]), *(_count(value) for value in row[3:])))
        except ValueError as error:
            raise StoreError(f"{source}: line {rows.line_num}: {error}") from None
    return samples


def _count(text: str) -> int | None:
    return int(text) if text else None
