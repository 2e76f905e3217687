"""Peaks derived again from a job's raw memory samples, as `testbed.node.memory` derived them on the node.

    lower      the largest unreclaimable memory of a sample
    estimate   the largest VmHWM (of a phase's first sample, which may carry the mark of the phase before: its resident
               memory) less the file pages of the sample with the most resident memory

An agent keeps every sample of a phase up to a thousand and then every second one, and so on: how many lines there must
be follows from the number of samples.  Of a thinned phase the figures may be larger than what the lines still say.
The upper bound is the kernel's own counter, which no sample holds: it is checked against the other two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from testbed.quantities import bytes_text
from testbed.verification.checks import Check, counted, judged

if TYPE_CHECKING:
    from testbed.job import Result
    from testbed.measurement import PeakMemory, PhaseMeasurement
    from testbed.memory_samples import MemorySample
    from testbed.store import RunFolder

#: Of a trace, before it is thinned (`testbed.node.memory`).
_MAX_TRACE = 1000
#: By which an estimate may lie above the kernel's counter: pages that a trainer has from the agent that started it are
#: charged to the agent.  A trainer that was ended at its start has little else: 11 MiB.
_CHARGED_ELSEWHERE_BYTES = 16 << 20
_SECONDS_TOLERANCE = 1e-6

_Rows = Sequence["MemorySample"]


def check_peaks(folder: RunFolder, results: Sequence[Result]) -> Check:
    """Every bound of every phase of these jobs."""
    from testbed.errors import StoreError

    failures, phases, samples = [], 0, 0
    for result in results:
        try:
            rows = folder.memory_samples(result)
        except StoreError as error:
            failures.append(str(error))
            continue
        phases += len(result.measurement.phases)
        samples += len(rows)
        failures += [f"{result.job}, {failure}" for failure in _of_job(result, rows)]
    found = f"{counted(phases, 'phase')} of {counted(len(results), 'job')}, from {counted(samples, 'sample')}"
    return judged("peaks", found, failures)


def check_times(results: Sequence[Result]) -> Check:
    """A job's seconds are those of its phases, waiting apart."""
    failures = []
    for result in results:
        measured = result.measurement
        if any(phase.seconds < 0 for phase in measured.phases):
            failures.append(f"{result.job}: a phase took less than no time")
        told = sum(phase.seconds for phase in measured.phases if phase.name != "idle")
        if measured.seconds is not None and abs(told - measured.seconds) > _SECONDS_TOLERANCE:
            failures.append(
                f"{result.job}: its phases took {told:.6f} s together, the result says {measured.seconds:.6f} s"
            )
    return judged("times", f"phases of {counted(len(results), 'job')} add up", failures)


def _of_job(result: Result, rows: _Rows) -> Iterator[str]:
    phases = result.measurement.phases
    strangers = sorted({row.phase for row in rows if not 0 <= row.phase < len(phases)})
    if strangers:
        yield f"there are samples of phase {strangers[0]}, of {counted(len(phases), 'phase')}"
    for number, phase in enumerate(phases):
        died = not result.finished and number == len(phases) - 1
        own = [row for row in rows if row.phase == number]
        for failure in _of_phase(phase, own, died=died):
            yield f"phase {number} ({phase.name}): {failure}"


def rows_kept(samples: int) -> int:
    """How many lines the agent keeps of so many samples of a phase."""
    rows, every = 0, 1
    for number in range(1, samples + 1):
        if number % every == 0:
            rows += 1
        if rows > _MAX_TRACE:
            rows, every = -(-rows // 2), every * 2
    return rows


def _of_phase(phase: PhaseMeasurement, rows: _Rows, *, died: bool) -> Iterator[str]:
    peak = phase.peak
    if len(rows) != (kept := rows_kept(peak.samples)):
        yield f"{counted(len(rows), 'sample')} in the file, {kept} of the {peak.samples} that were taken are kept"
        return
    if any(row.name != phase.name for row in rows):
        yield f"samples are said to be of {next(row.name for row in rows if row.name != phase.name)}"
    if any(later.seconds < earlier.seconds for earlier, later in pairwise(rows)):
        yield "the samples' seconds go back"
    if rows:
        yield from _bounds(peak, rows, died=died)
    elif peak.lower_bytes is not None or peak.estimate_bytes is not None:
        yield "it has a peak without a sample"
    yield from _upper(peak)


def _bounds(peak: PeakMemory, rows: _Rows, *, died: bool) -> Iterator[str]:
    """Each figure with what the samples say, and whether it may be larger than that."""
    thinned = len(rows) < peak.samples
    sources = peak.sources
    nearest = max(rows, key=_resident)
    unreclaimable = max(row.unreclaimable_bytes or 0 for row in rows)
    lower = unreclaimable if unreclaimable or peak.lower_bytes else None
    yield from _compared(
        "lower bound", peak.lower_bytes or None, lower, more=thinned or "+" in sources.get("lower", "")
    )
    if not thinned:
        yield from _compared("file pages at the peak", peak.file_bytes, nearest.file_bytes)
    if _on_accelerator(rows, peak):
        held = max((row.accelerator_bytes for row in rows if row.accelerator_bytes is not None), default=None)
        yield from _compared("accelerator memory", peak.accelerator_bytes, held, more=thinned)
    estimate, open_above = _estimate(peak, rows, nearest)
    yield from _compared("estimate", peak.estimate_bytes, estimate, more=thinned or died or open_above)


def _estimate(peak: PeakMemory, rows: _Rows, nearest: MemorySample) -> tuple[int | None, bool]:
    """The estimate by the samples, and whether something that no sample holds may have been added to it."""
    source = peak.sources.get("estimate", "")
    marks = [_resident(row) for row in rows] if source == "sampled" else [row.vmhwm_bytes or 0 for row in rows]
    own = max([_resident(rows[0]), *marks[1:]]) - (nearest.file_bytes or 0)
    if not _on_accelerator(rows, peak):
        return own, False
    if source.endswith("+torch_reserved") or peak.estimate_bytes is None:
        return (own, True) if peak.estimate_bytes is not None else (None, False)
    found = [
        _resident(row) - (row.file_bytes or 0) + row.accelerator_bytes
        for row in rows
        if row.accelerator_bytes is not None
    ]
    if nearest.accelerator_bytes is not None:
        found.append(own + nearest.accelerator_bytes)
    return max(found, default=None), False


def _on_accelerator(rows: _Rows, peak: PeakMemory) -> bool:
    added = any("+" in source for source in peak.sources.values())
    return added or peak.accelerator_bytes is not None or any(row.accelerator_bytes is not None for row in rows)


def _upper(peak: PeakMemory) -> Iterator[str]:
    upper = peak.upper_bytes
    # 0 is what older records have of a group to which nothing had been charged yet: it was not measured.
    if not upper or any("+" in source for source in peak.sources.values()):
        return
    # A phase of older records begins with the sample before it, of which something may have been freed meanwhile.
    if peak.lower_bytes is not None and peak.lower_bytes > upper + _CHARGED_ELSEWHERE_BYTES:
        yield f"the lower bound ({bytes_text(peak.lower_bytes)}) lies above the upper one ({bytes_text(upper)})"
    if peak.estimate_bytes is not None and peak.estimate_bytes > upper + _CHARGED_ELSEWHERE_BYTES:
        yield f"the estimate ({bytes_text(peak.estimate_bytes)}) lies above the upper bound ({bytes_text(upper)})"


def _compared(what: str, recorded: int | None, derived: int | None, *, more: bool = False) -> Iterator[str]:
    """`more`: what is recorded may be larger than what the samples still say."""
    if recorded == derived or (more and recorded is not None and derived is not None and recorded > derived):
        return
    yield f"the samples give {_said(derived)} as the {what}, the result says {_said(recorded)}"


def _said(count: int | None) -> str:
    return "nothing" if count is None else f"{bytes_text(count)} ({count} B)"


def _resident(row: MemorySample) -> int:
    """A trainer shares no memory with others, so this is all of it."""
    return (row.anonymous_bytes or 0) + (row.file_bytes or 0)
