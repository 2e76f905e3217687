"""Memory: per device and method what was predicted and what was measured, against the budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING

from testbed.quantities import bytes_text
from testbed.reports.exhibits import (
    DOTS,
    Axis,
    Figure,
    Point,
    Section,
    Series,
    Table,
    bytes_column,
    name_column,
    ratio_column,
)
from testbed.reports.words import DEVICE, METHOD, RUNS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from testbed.job import Result
    from testbed.measurement import PeakMemory
    from testbed.report import DeviceSummary
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Evidence, Group, Material

_MIB = 2**20
_LOW = "Where a sample lies above the estimate, which is of another moment, the interval begins at the estimate."


@dataclass(frozen=True)
class DevicePeak:
    """The worst job of a method on a device, over all its runs, and what is said of the run it was in."""

    group: Group
    device: str
    runs: int
    said: DeviceSummary
    bounds: PeakMemory | None  # of the worst job; None: nothing was measured


def device_peaks(material: Material) -> list[DevicePeak]:
    """Of every method on every device that it planned a client for."""
    return [
        found
        for group in material.groups
        for device in group.devices
        if (found := _device_peak(group, device)) is not None
    ]


def _device_peak(group: Group, device: str) -> DevicePeak | None:
    told = [(run, said) for run in group.runs for said in run.summary.devices if said.device == device and said.clients]
    if not told:
        return None
    run, said = max(told, key=lambda pair: pair[1].peak_worst_bytes or 0)
    worst = _worst(run, device)
    return DevicePeak(group, device, len(told), said, worst.measurement.peak if worst else None)


def _worst(run: Evidence, device: str) -> Result | None:
    """The job that the summary's bounds are of."""
    known = [
        job
        for job in run.results
        if job.device == device and job.finished and job.measurement.peak.estimate_bytes is not None
    ]
    return max(known, key=lambda job: job.measurement.peak.estimate_bytes or 0, default=None)


def memory(material: Material) -> Section | None:
    peaks = device_peaks(material)
    if not peaks:
        return None
    figure = peaks_figure(material, peaks)
    text = (
        "No kernel keeps a watermark of the memory that cannot be reclaimed. So a peak has three bounds: the "
        "largest sample (lower), the process's own watermark less its file pages (estimate), and the cgroup's "
        "watermark with the page cache in it (upper), each with its source."
    )
    return Section("memory", "Memory", (text,), (memory_table(peaks), *((figure,) if figure else ())))


def memory_table(peaks: Sequence[DevicePeak]) -> Table:
    rows = tuple(map(_row, peaks))
    columns = (
        METHOD, DEVICE, RUNS, bytes_column("budget_bytes", "Budget"), name_column("limit", "Limit"),
        bytes_column("predicted_bytes", "Predicted"), bytes_column("peak_median_bytes", "Median peak"),
        bytes_column("peak_lower_bytes", "Worst: lower"), bytes_column("peak_worst_bytes", "estimate"),
        bytes_column("peak_upper_bytes", "upper"), ratio_column("prediction_error", "Error"),
        bytes_column("headroom_bytes", "Headroom"), bytes_column("accelerator_peak_bytes", "On the accelerator"),
        name_column("sources", "Sources: lower / estimate / upper"),
    )  # fmt: skip
    caption = (
        "The worst finished job of all runs, with its bounds; the median is of that job's run. Error: what was "
        "predicted for that very job over its estimate, less one; positive is too high. Headroom: budget less "
        "estimate. A dash: nothing was measured, because no job finished there or the kernel does not tell."
    )
    return _without_idle_columns(Table("memory", "Memory per device and method", caption, columns, rows))


def _without_idle_columns(table: Table) -> Table:
    """Without an accelerator's column where there is none, and with sources that are all alike told once, as a note."""
    keys = [column.key for column in table.columns]
    sources = {row[keys.index("sources")] for row in table.rows} - {None}
    idle = {"sources"} if len(sources) <= 1 else set()
    if all(row[keys.index("accelerator_peak_bytes")] is None for row in table.rows):
        idle.add("accelerator_peak_bytes")
    kept = [place for place, key in enumerate(keys) if key not in idle]
    notes = tuple(f"Sources of lower, estimate and upper bound: {each}." for each in sources if "sources" in idle)
    return replace(
        table,
        columns=tuple(table.columns[place] for place in kept),
        rows=tuple(tuple(row[place] for place in kept) for row in table.rows),
        notes=(*table.notes, *notes),
    )


def _row(peak: DevicePeak) -> tuple[Value, ...]:
    said, sources = peak.said, peak.bounds.sources if peak.bounds else {}
    named = " / ".join(sources.get(bound, "–") for bound in ("lower", "estimate", "upper")) if sources else None
    return (
        peak.group.name, peak.device, peak.runs, said.budget_bytes, _limit(said), said.predicted_bytes,
        said.peak_median_bytes, said.peak_lower_bytes, said.peak_worst_bytes, said.peak_upper_bytes,
        said.prediction_error, said.headroom_bytes, said.accelerator_peak_bytes, named,
    )  # fmt: skip


def _limit(said: DeviceSummary) -> str | None:
    if said.clients == said.refused:
        return "refused"
    return {True: "UNCAPPED", False: "capped", None: None}[said.uncapped]


def peaks_figure(material: Material, peaks: Sequence[DevicePeak]) -> Figure | None:
    """None where nothing was measured."""
    names = _group_names(peaks)
    drawn = [peak for peak in peaks if peak.group.label in material.shown and peak.said.peak_worst_bytes is not None]
    if not drawn:
        return None
    groups = list(dict.fromkeys(peak.group.name for peak in drawn))
    series: list[Series] = []
    for name in groups:
        own = [peak for peak in drawn if peak.group.name == name]
        series.append(Series(name, tuple(_point(peak, names) for peak in own)))
        series.append(Series(f"{name}, predicted", tuple(_predicted(own, names)), predicts=name))
    caption = (
        "The worst peak of each method on each device: the estimate between its lower and upper bound, beside what was "
        "predicted for the largest of the device's clients (open mark), and the budget (line)."
    )
    return Figure(
        key="peaks",
        title="Peak memory per device",
        caption=caption,
        kind=DOTS,
        x=Axis(""),
        y=Axis("Peak memory (MiB)", _MIB),
        table=_peaks_table(peaks, names, caption),
        series=tuple(series),
        ticks=tuple(
            dict.fromkeys((names[peak_key(p)], "budget", p.said.budget_bytes) for p in drawn if p.said.budget_bytes)
        ),
        notes=(*material.not_drawn(material.groups), _LOW),
    )


def peak_key(peak: DevicePeak) -> tuple[str, int | None]:
    return peak.device, peak.said.budget_bytes


def _group_names(peaks: Iterable[DevicePeak]) -> dict[tuple[str, int | None], str]:
    """A device's name, with its budget where inventories give it several."""
    keys = list(dict.fromkeys(map(peak_key, peaks)))
    several = {device for device, _ in keys if sum(name == device for name, _ in keys) > 1}
    return {
        (device, budget): f"{device} ({bytes_text(budget)})" if device in several else device for device, budget in keys
    }


def _point(peak: DevicePeak, names: dict[tuple[str, int | None], str]) -> Point:
    said = peak.said
    estimate = said.peak_worst_bytes or 0
    known = [value for value in (said.peak_lower_bytes, said.peak_upper_bytes) if value is not None]
    low = None if said.peak_lower_bytes is None else min(estimate, *known)
    high = None if said.peak_upper_bytes is None else max(estimate, *known)
    return Point(names[peak_key(peak)], estimate, low, high)


def _predicted(peaks: Iterable[DevicePeak], names: dict[tuple[str, int | None], str]) -> Iterable[Point]:
    for peak in peaks:
        if peak.said.predicted_bytes is not None:
            yield Point(names[peak_key(peak)], peak.said.predicted_bytes)


def _peaks_table(peaks: Sequence[DevicePeak], names: dict[tuple[str, int | None], str], caption: str) -> Table:
    figures = ("budget_bytes", "predicted_bytes", "peak_lower_bytes", "peak_worst_bytes", "peak_upper_bytes")
    headings = ("Budget", "Predicted", "Lower", "Estimate", "Upper")
    columns = (DEVICE, METHOD, *(bytes_column(key, heading) for key, heading in zip(figures, headings, strict=True)))
    values = attrgetter(*figures)
    rows = tuple((names[peak_key(peak)], peak.group.name, *values(peak.said)) for peak in peaks)
    return Table("peaks-data", "Peak memory per device", caption, columns, rows)
