"""Raw power samples of a job as a file of its run: one CSV per meter, which the `replay` meter reads too.

    # meter: ina3221
    # point: module_rail
    # total_rails: VDD_IN
    # interval_seconds: 0.1
    seconds,clock_seconds,VDD_IN_watts,VDD_SOC_watts[,VDD_IN_joules,…]

`seconds` count from the job's first byte; `clock_seconds` say how far the wall clock has moved since the first sample.
"""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from typing import TYPE_CHECKING

from testbed.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.measurement import PowerTrace


def as_text(trace: PowerTrace) -> str:
    """The samples of one meter."""
    return "".join(_lines(trace))


def _lines(trace: PowerTrace) -> Iterator[str]:
    yield f"# meter: {trace.meter}{' (replayed: nothing was measured)' if trace.replayed else ''}\n"
    yield f"# point: {trace.point}\n"
    yield f"# total_rails: {' '.join(trace.total_rails)}\n"
    yield f"# interval_seconds: {trace.interval_seconds:g}\n"
    names = [f"{rail}_watts" for rail in trace.rails]
    names += [f"{rail}_joules" for rail in trace.rails] if trace.counters else []
    yield ",".join(["seconds", "clock_seconds", *names]) + "\n"
    for row in trace.rows:
        yield ",".join(f"{value:.10g}" for value in row) + "\n"


def with_rows(trace: PowerTrace, text: str, source: str) -> PowerTrace:
    """The trace with its samples read again; raises StoreError for a file that is not what was written."""
    lines = [line for line in io.StringIO(text) if not line.startswith("#")]
    try:
        rows = tuple(tuple(map(float, row)) for row in csv.reader(lines[1:]))
    except ValueError as error:
        raise StoreError(f"{source}: expected power samples, one a line: {error}") from None
    widths = {2 + len(trace.rails), 2 + 2 * len(trace.rails)}
    if any(len(row) not in widths for row in rows):
        raise StoreError(f"{source}: expected seconds, clock and {len(trace.rails)} rails on every line")
    return replace(trace, rows=rows)
