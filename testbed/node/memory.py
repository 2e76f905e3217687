"""Peak memory of a process, phase by phase, from /proc and its cgroup.  What each bound means: `testbed.measurement`.

Reads only what is cheap (`status` is counters, no page table is walked), so that twenty samples a second cost nothing.

Where there is an accelerator, its memory (`testbed.node.accelerator_memory`) belongs to every bound once:

- VmHWM and the anonymous and shared memory of `status` never hold it: the driver's pages are no anonymous memory, and
  where they are mapped they are file pages, which are taken off.  It is added.
- what a v2 group's memory.stat is summed up from (anon, shmem, kernel stacks, page tables, sockets, slab) does not hold
  it either, charged or not: memory that a driver takes for itself is in memory.current and in `kernel`
  (https://docs.kernel.org/admin-guide/cgroup-v2.html).  It is added.
- a v1 group's kmem counter, and the peak of either, hold it where it is charged.  It is added where it is not; where
  that is not known, the peak gets it (it is an upper bound), the sample does not.

Samples of both are taken together, and added before the largest is looked for: only in the upper bound, where the
kernel's peak knows no moment, are two peaks added.  What an accelerator held between two samples shows nowhere but in
the peak that the trainer's own allocator tells.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from testbed.node.kernel_file import KernelFile

if TYPE_CHECKING:
    from testbed.node.accelerator_memory import AcceleratorMemory
    from testbed.node.limits import Group

PROC = Path("/proc")
_KIB = 1024
#: Written to clear_refs: start a new VmHWM, touch nothing else.
_RESET_HIGH_WATER = b"5"
_MAX_TRACE = 1000
_UNKNOWN: tuple[None, str] = (None, "")


def parse_status(data: bytes | None) -> dict[str, int]:
    """VmHWM, VmRSS, RssAnon, RssFile, RssShmem, … in bytes; empty when the process is gone or a zombie."""
    lines = (data or b"").splitlines()
    values = (line.split() for line in lines if line.endswith(b" kB"))
    return {words[0][:-1].decode(): int(words[1]) * _KIB for words in values}


def mebibytes(count: int) -> str:
    """For messages."""
    return f"{count / (1 << 20):.1f} MiB"


class AcceleratorSample(NamedTuple):
    """What a trainer held on the accelerator once, in bytes; None where it is not known.

    process_bytes        by the driver's table: the trainer and its children
    system_delta_bytes   what all processes held, less what they held when last there was no trainer
    least_bytes          what the trainer held for certain
    most_bytes           what it can have held
    """

    process_bytes: int | None = None
    system_delta_bytes: int | None = None
    least_bytes: int | None = None
    most_bytes: int | None = None
    family: str = ""  # nvmap or nvml: the driver that tells

    @property
    def figure(self) -> int | None:
        """The best that is known."""
        return self.process_bytes if self.process_bytes is not None else self.system_delta_bytes

    @property
    def source(self) -> str:
        """Where `figure` comes from: nvmap_process, nvmap_delta, nvml_process or nvml_delta; "" where there is none."""
        if self.figure is None:
            return ""
        return f"{self.family}_process" if self.process_bytes is not None else f"{self.family}_delta"


_NOTHING_HELD = AcceleratorSample()


class Sample:
    """What the counters said once: bytes, and refaults since the group was made.

    lower   unreclaimable memory with the accelerator's, none of it twice: what was held for certain.  Of the trainer
            itself: where it is not `alone` in its group, what the group holds is not it
    """

    def __init__(
        self,
        status: dict[str, int],
        group: Group | None,
        accelerator: AcceleratorSample = _NOTHING_HELD,
        *,
        group_may_hold_it: bool = False,
        alone: bool = True,
    ) -> None:
        self.high_water = status["VmHWM"]
        self.resident = status["VmRSS"]
        self.anonymous = status.get("RssAnon", 0)
        self.file = status.get("RssFile", 0)
        in_group, self.refaults = group.usage() if group is not None else (None, None)
        own = self.anonymous + status.get("RssShmem", 0)
        self.unreclaimable = own if in_group is None or not alone else in_group
        self.accelerator = accelerator
        apart = own if group_may_hold_it else self.unreclaimable
        self.lower = max(self.unreclaimable, apart + (accelerator.least_bytes or 0))

    @property
    def lower_source(self) -> str:
        """Where `lower` comes from; the accelerator is named where it has added something."""
        return f"sampled+{self.accelerator.source}" if self.lower > self.unreclaimable else "sampled"

    @property
    def whole(self) -> int | None:
        """Resident memory without file pages, and the accelerator's; None where the latter is not known."""
        figure = self.accelerator.figure
        return None if figure is None else self.resident - self.file + figure


class PhaseMeter:
    """Measures one trainer, one phase after another; a phase without a trainer gets its seconds only.

    `end` gives a phase in the JSON form of `testbed.measurement.PhaseMeasurement`; the sample that ends a phase begins
    the next.
    """

    def __init__(
        self, pid: int | None, group: Group | None, proc: Path = PROC, accelerator: AcceleratorMemory | None = None
    ) -> None:
        self.group = group if pid is not None else None
        self._pid = pid
        self._accelerator = accelerator if pid is not None else None
        self._group_may_hold_it = (
            self.group is not None
            and self.group.version == "v1"
            and accelerator is not None
            and accelerator.charged is not False
        )
        folder = proc / str(pid)
        self._status = KernelFile(folder / "status") if pid is not None else None
        self._clear = KernelFile(folder / "clear_refs", os.O_WRONLY)
        self._last: Sample | None = None
        self.alone = True  # in its group: nothing else is charged there
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

    @property
    def unreclaimable_bytes(self) -> int | None:
        """Memory that cannot be taken back, at the last sample."""
        return self._last.unreclaimable if self._last is not None else None

    @property
    def accelerator_bytes(self) -> int | None:
        """What the trainer held on the accelerator at the last sample."""
        return self._last.accelerator.figure if self._last is not None else None

    def begin(self, name: str) -> None:
        """Open a phase, with new peaks where the kernel can start them."""
        self.name = name
        self._start = time.monotonic()
        self._samples = 0
        self._trace: list[tuple[float | None, ...]] = []
        self._every = 1  # of the samples, this one is kept in the trace
        self._lowest: Sample | None = None  # the sample with the most that was held for certain
        self._nearest: Sample | None = None  # the sample with the most resident memory
        self._fullest: tuple[int, str] | None = None  # the most of that and the accelerator's together, and its source
        self._held: int | None = None  # the largest figure of the accelerator …
        self._can_be_held: int | None = None  # … and what it can have been
        self._held_source = ""
        self._high_water: int | None = None
        self._exact = self._status is not None and self._clear.write(_RESET_HIGH_WATER)
        if self.group is not None:
            self.group.reset_peak()
        first = self._last = self._take()  # anew: what the last one saw may have been freed before the peak began again
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

    def end(self, at: float | None = None, dead: int | None = None, reserved: int | None = None) -> dict[str, Any]:
        """Close the phase, now or `at`.

        dead       high-water mark that the kernel gave for a reaped process
        reserved   what the trainer's allocator held at most on the accelerator in this phase, if the trainer says so:
                   the CUDA context lies outside it, so it counts only where nothing better is known, and in the upper
                   bound
        """
        now = time.monotonic() if at is None else at
        readable = self.sample()
        exact = self._exact and (readable or dead is not None)
        if dead is not None and self._exact:
            self._high_water = max(self._high_water or 0, dead)
        peak = self._peak("vmhwm" if exact else "sampled", reserved)
        return {
            "name": self.name,
            "seconds": max(0.0, now - self._start),
            "peak": peak,
            "trace": self._trace,
            "begun_seconds": self._start,  # on the monotonic clock: a task tells it from its own beginning
        }

    @property
    def estimate_bytes(self) -> int | None:
        """The phase's peak as far as it is known: high-water mark less the file pages of the sample nearest to it.

        With what the accelerator held then; or the two together at another sample, where that is more.
        """
        return self._estimate("", None)[0]

    def over_budget(self, limit_bytes: int | None) -> str | None:
        """Why the trainer must be ended: it holds more than its limit at the last sample, and no kernel prevents that.

        Also where the board itself is about to run out of memory.  None where it may go on; always on a CPU device,
        whose cgroup sees everything.
        """
        if self._accelerator is None or self._last is None:
            return None
        shortage = self._accelerator.shortage()
        if shortage is not None:
            return (
                f"the board was about to run out of memory in phase {self.name}: {shortage}; "
                "a smaller budget leaves the board more"
            )
        if limit_bytes is None or (self.group is not None and self._accelerator.charged):
            return None
        return over_budget(self.name, self._last, limit_bytes)

    def _take(self) -> Sample | None:
        status = parse_status(self._status.read()) if self._status is not None else {}
        if "VmRSS" not in status:
            return None
        if self._accelerator is None or self._pid is None:
            return Sample(status, self.group, alone=self.alone)
        held = self._accelerator.sample(self._pid)
        return Sample(status, self.group, held, group_may_hold_it=self._group_may_hold_it, alone=self.alone)

    def _add(self, sample: Sample, mark: int) -> None:
        self._samples += 1
        if self._nearest is None or sample.resident > self._nearest.resident:
            self._nearest = sample
        self._high_water = max(self._high_water or 0, mark)
        if self._lowest is None or sample.lower > self._lowest.lower:
            self._lowest = sample
        self._add_held(sample, sample.accelerator)
        if self._samples % self._every == 0:
            self._keep(sample)

    def _add_held(self, sample: Sample, held: AcceleratorSample) -> None:
        if held.figure is not None and (self._held is None or held.figure > self._held):
            self._held, self._held_source = held.figure, held.source
        if held.most_bytes is not None:
            self._can_be_held = max(self._can_be_held or 0, held.most_bytes)
        if sample.whole is not None and (self._fullest is None or sample.whole > self._fullest[0]):
            self._fullest = (sample.whole, f"sampled+{held.source}")

    def _keep(self, sample: Sample) -> None:
        """Add to the trace; one that has grown long keeps every second sample, so that the agent stays small."""
        at = round(time.monotonic() - self._start, 4)
        row = (at, sample.high_water, sample.anonymous, sample.file, sample.unreclaimable or None)
        held = () if self._accelerator is None else (sample.accelerator.figure,)
        self._trace.append((*row, *held))
        if len(self._trace) > _MAX_TRACE:
            self._trace = self._trace[::2]
            self._every *= 2

    def _peak(self, estimate_source: str, reserved: int | None) -> dict[str, Any]:
        lowest = self._lowest
        # A group counts nothing of a process that has not yet charged anything to it: that is not measured.
        bounds = {
            "lower": (lowest.lower, lowest.lower_source) if lowest is not None and lowest.lower else _UNKNOWN,
            "estimate": self._estimate(estimate_source, reserved),
            "upper": self._upper(reserved),
        }
        return {
            **{f"{bound}_bytes": value for bound, (value, _) in bounds.items()},
            "sources": {bound: source for bound, (value, source) in bounds.items() if value is not None},
            "file_bytes": self._nearest.file if self._nearest is not None else None,
            "refaults": self._new_refaults(),
            "samples": self._samples,
            "accelerator_bytes": self._held,
        }

    def _estimate(self, source: str, reserved: int | None) -> tuple[int | None, str]:
        nearest = self._nearest
        if self._high_water is None or nearest is None:
            return _UNKNOWN
        own = self._high_water - nearest.file
        if self._accelerator is None:
            return own, source
        at_mark = nearest.accelerator
        found: list[tuple[int, str]] = []
        if at_mark.figure is not None:
            found.append((own + at_mark.figure, f"{source}+{at_mark.source}"))
        if self._fullest is not None:
            found.append(self._fullest)
        if not found and reserved is not None:
            found.append((own + reserved, f"{source}+torch_reserved"))
        # A sum with a part that nobody knows is not known: it is not the other part.
        return max(found, key=lambda each: each[0], default=_UNKNOWN)

    def _upper(self, reserved: int | None) -> tuple[int | None, str]:
        peak = self.group.peak() if self.group is not None else None
        if self.group is None or not peak:  # 0: nothing was charged to it yet
            return _UNKNOWN
        if self._accelerator is None or self._accelerator.charged:
            return peak, self.group.peak_source
        if reserved is not None and reserved > (self._can_be_held or 0):
            return peak + reserved, f"{self.group.peak_source}+torch_reserved"
        if self._can_be_held is None:
            return _UNKNOWN
        return peak + self._can_be_held, f"{self.group.peak_source}+{self._held_source}"

    def _new_refaults(self) -> int | None:
        last = self._last.refaults if self._last is not None else None
        return None if last is None or self._first_refaults is None else last - self._first_refaults


def over_budget(phase: str, sample: Sample, limit_bytes: int) -> str | None:
    """The sentence for a trainer that holds more than its budget together with the accelerator; None where it does not.

    Only what it holds for certain counts: nobody is ended by a guess.
    """
    held = sample.accelerator.least_bytes
    if held is None or sample.lower <= limit_bytes:
        return None
    own, source = sample.lower - held, sample.accelerator.source
    return (
        f"over budget in phase {phase}: {mebibytes(sample.lower)} held, {mebibytes(own)} by the process and "
        f"{mebibytes(held)} on the accelerator ({source}), the budget is {mebibytes(limit_bytes)}"
    )
