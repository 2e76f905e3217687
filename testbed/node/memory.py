"""Peak memory of a process, phase by phase, from /proc and its cgroup.  What each bound means: `testbed.measurement`.

Reads only what is cheap (`status` is counters, no page table is walked), so that twenty samples a second cost nothing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.node.kernel_file import KernelFile

if TYPE_CHECKING:
    from testbed.node.limits import Group

PROC = Path("/proc")
_KIB = 1024
#: Written to clear_refs: start a new VmHWM, touch nothing else.
_RESET_HIGH_WATER = b"5"
_MAX_TRACE = 1000


def parse_status(data: bytes | None) -> dict[str, int]:
    """VmHWM, VmRSS, RssAnon, RssFile, RssShmem, … in bytes; empty when the process is gone or a zombie."""
    lines = (data or b"").splitlines()
    values = (line.split() for line in lines if line.endswith(b" kB"))
    return {words[0][:-1].decode(): int(words[1]) * _KIB for words in values}


class Sample:
    """What the counters said once: bytes, and refaults since the group was made."""

    def __init__(self, status: dict[str, int], group: Group | None) -> None:
        self.high_water = status["VmHWM"]
        self.resident = status["VmRSS"]
        self.anonymous = status.get("RssAnon", 0)
        self.file = status.get("RssFile", 0)
        in_group, self.refaults = group.usage() if group is not None else (None, None)
        own = self.anonymous + status.get("RssShmem", 0)
        self.unreclaimable = own if in_group is None else in_group


class PhaseMeter:
    """Measures one trainer, one phase after another; a phase without a trainer gets its seconds only.

    `end` gives a phase in the JSON form of `testbed.measurement.PhaseMeasurement`; the sample that ends a phase begins
    the next.
    """

    def __init__(self, pid: int | None, group: Group | None, proc: Path = PROC) -> None:
        self.group = group if pid is not None else None
        folder = proc / str(pid)
        self._status = KernelFile(folder / "status") if pid is not None else None
        self._clear = KernelFile(folder / "clear_refs", os.O_WRONLY)
        self._last: Sample | None = None
        self.begin("")

    def close(self) -> None:
        """Let go of the process's files."""
        for file in (self._status, self._clear):
            if file is not None:
                file.close()

    @property
    def anonymous_bytes(self) -> int | None:
        """Anonymous memory at the last sample."""
        return self._last.anonymous if self._last is not None else None

    def begin(self, name: str) -> None:
        """Open a phase, with new peaks where the kernel can start them."""
        self.name = name
        self._start = time.monotonic()
        self._samples = 0
        self._trace: list[tuple[float, int, int, int, int]] = []
        self._every = 1  # of the samples, this one is kept in the trace
        self._lower: int | None = None
        self._nearest: Sample | None = None  # the sample with the most resident memory
        self._high_water: int | None = None
        self._exact = self._status is not None and self._clear.write(_RESET_HIGH_WATER)
        if self.group is not None:
            self.group.reset_peak()
        first = self._last or self._take()
        self._first_refaults = first.refaults if first is not None else None
        if first is not None:
            self._add(first, first.resident)

    def sample(self) -> bool:
        """Read the counters once; False when there is no process to be read."""
        sample = self._last = self._take()
        if sample is None:
            return False
        # Where the mark could not be started again it may belong to an earlier phase: the samples are what is left.
        self._add(sample, sample.high_water if self._exact else sample.resident)
        return True

    def end(self, at: float | None = None, dead: int | None = None) -> dict[str, Any]:
        """Close the phase, now or `at`.  `dead` is the high-water mark that the kernel gave for a reaped process."""
        now = time.monotonic() if at is None else at
        readable = self.sample()
        exact = self._exact and (readable or dead is not None)
        if dead is not None and self._exact:
            self._high_water = max(self._high_water or 0, dead)
        peak = self._peak("vmhwm" if exact else "sampled")
        return {"name": self.name, "seconds": max(0.0, now - self._start), "peak": peak, "trace": self._trace}

    @property
    def estimate_bytes(self) -> int | None:
        """The phase's peak as far as it is known: high-water mark less the file pages of the sample nearest to it."""
        if self._high_water is None or self._nearest is None:
            return None
        return self._high_water - self._nearest.file

    def _take(self) -> Sample | None:
        status = parse_status(self._status.read()) if self._status is not None else {}
        return Sample(status, self.group) if "VmRSS" in status else None

    def _add(self, sample: Sample, mark: int) -> None:
        self._samples += 1
        if self._nearest is None or sample.resident > self._nearest.resident:
            self._nearest = sample
        self._high_water = max(self._high_water or 0, mark)
        self._lower = max(self._lower or 0, sample.unreclaimable)
        if self._samples % self._every == 0:
            self._keep(sample)

    def _keep(self, sample: Sample) -> None:
        """Add to the trace; one that has grown long keeps every second sample, so that the agent stays small."""
        at = round(time.monotonic() - self._start, 4)
        self._trace.append((at, sample.high_water, sample.anonymous, sample.file, sample.unreclaimable))
        if len(self._trace) > _MAX_TRACE:
            self._trace = self._trace[::2]
            self._every *= 2

    def _peak(self, estimate_source: str) -> dict[str, Any]:
        upper = self.group.peak() if self.group is not None else None
        bounds = {
            "lower": (self._lower, "sampled"),
            "estimate": (self.estimate_bytes, estimate_source),
            "upper": (upper, self.group.peak_source if self.group is not None else ""),
        }
        return {
            **{f"{bound}_bytes": value for bound, (value, _) in bounds.items()},
            "sources": {bound: source for bound, (value, source) in bounds.items() if value is not None},
            "file_bytes": self._nearest.file if self._nearest is not None else None,
            "refaults": self._new_refaults(),
            "samples": self._samples,
        }

    def _new_refaults(self) -> int | None:
        last = self._last.refaults if self._last is not None else None
        return None if last is None or self._first_refaults is None else last - self._first_refaults
