"""The memory frontier of what was run: what was predicted to fit, and where that was tried, what survived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from testbed.frontier.record import AXES, all_frontiers
from testbed.reports.exhibits import (
    DOTS,
    Axis,
    Column,
    Figure,
    Point,
    Section,
    Series,
    Table,
    bytes_column,
    name_column,
    ratio_column,
)
from testbed.reports.words import DEVICE, METHOD, key_of

if TYPE_CHECKING:
    from testbed.frontier.record import Frontier, FrontierPoint, Trial
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Evidence, Material

_AXIS = name_column("axis", "Axis")
_Found = Sequence[tuple[str, "FrontierPoint"]]  # what the method is called, and a point of it


def frontiers(material: Material) -> Section | None:
    """Of the report's own work on its own devices, as the records beside its runs have them; None without any."""
    folders = dict.fromkeys(run.folder.path.resolve().parent for run in material.runs)
    beside = [_matching(each, material.runs) for folder in folders for each in all_frontiers(folder)]
    known = [each for each in beside if each.points]
    found = [(name, point) for each, name in zip(known, _names(known), strict=True) for point in each.points]
    if not found:
        return None
    figures = [figure for axis in AXES if (figure := frontier_figure(axis, found)) is not None]
    text = (
        "How far each device goes along one axis, the others as the table says: as predicted, and where real jobs "
        "were tried under the real cap, between the largest value that survived and the smallest that did not. "
        "These are records of `testbed frontier` with the settings, the model, the workload and the devices of these "
        "runs."
    )
    tables = [table for table in (frontier_table(found), trials_table(found)) if table.rows]
    return Section("frontier", "Memory frontier", (text,), (*figures, *tables))


def _matching(frontier: Frontier, runs: Sequence[Evidence]) -> Frontier:
    """The record's points that are of what a run did, on a device that it had; maybe none."""
    alike = [run for run in runs if _alike(frontier, run)]
    return replace(frontier, points=tuple(each for each in frontier.points if _ran(frontier, each, alike)))


def _alike(frontier: Frontier, run: Evidence) -> bool:
    config = run.config
    asked = (frontier.method, frontier.settings, frontier.model, frontier.task)
    return asked == tuple(config.get(name) for name in ("method", "settings", "model", "task"))


def _ran(frontier: Frontier, point: FrontierPoint, runs: Sequence[Evidence]) -> bool:
    """The accelerator is the device's own; and of the workload everything counts but what the point varies."""
    work = {name: value for name, value in frontier.work.items() if name not in {point.axis, "accelerator"}}
    return any(
        work.items() <= run.folder.record.plan.get("work", {}).items()
        and any(_is_of(point, device) for device in run.inventory.get("devices", ()))
        for run in runs
    )


def _is_of(point: FrontierPoint, device: Mapping[str, Any]) -> bool:
    budget = device["budget"]["memory_bytes"]
    known = (device["name"], device["kind"], device["profile"]["name"], device.get("accelerator", "cpu"), budget)
    return known == (point.device, point.kind, point.profile, point.accelerator, point.budget_bytes)


def _names(known: Sequence[Frontier]) -> list[str]:
    """A method's name; with the model's, or the record's, where there are several of it."""
    methods = [each.method for each in known]
    models = [(each.method, each.model) for each in known]
    return [
        each.method
        if methods.count(each.method) == 1
        else f"{each.method}, {each.model if models.count((each.method, each.model)) == 1 else each.id}"
        for each in known
    ]


def frontier_table(found: _Found) -> Table:
    columns = (
        METHOD, DEVICE, _AXIS, name_column("unit", "Unit"), name_column("held", "The others"),
        bytes_column("budget_bytes", "Budget"), Column("predicted", "Predicted"),
        bytes_column("predicted_bytes", "needs"), Column("edge", "Edge"), Column("confirmed", "Survived"),
        Column("refuted", "Too large"), bytes_column("peak_bytes", "Peak there"),
        ratio_column("bytes_error", "Error"), Column("jobs", "Jobs"), name_column("said", "What is said"),
    )  # fmt: skip
    caption = (
        "Predicted: the largest value that the plan admits; edge: the largest whose unreclaimable memory alone "
        "fits. Survived and too large are measured; error is the predicted peak over the measured one there, less "
        "one. A dash: none, or not tried."
    )
    return Table("frontier", "Memory frontier", caption, columns, tuple(_row(name, point) for name, point in found))


def _row(name: str, point: FrontierPoint) -> tuple[Value, ...]:
    peak = point.measured_peak
    held = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in point.held.items())
    return (
        name, point.device, point.axis.replace("_", " "), point.unit, held, point.budget_bytes, point.predicted,
        point.predicted_bytes, point.edge, point.confirmed, point.refuted, peak.estimate_bytes if peak else None,
        point.bytes_error, point.jobs or None, "; ".join(_said(point)) or None,
    )  # fmt: skip


def _said(point: FrontierPoint) -> Iterator[str]:
    if point.refusal:
        yield point.refusal
    if point.same_as:
        yield f"as {point.same_as}, which has the same profile and budget"
    if point.predicted is not None and point.predicted >= point.limit:
        yield f"{point.limit} is the {point.limited_by}'s end, not memory's"
    if point.trials and not point.exact:
        yield "not exact: values between were not tried"


def trials_table(found: _Found) -> Table:
    tried = [(name, point, trial) for name, point in found if point.same_as is None for trial in point.trials]
    columns = (
        METHOD, DEVICE, _AXIS, name_column("tried", "Tried"), Column("value", "Value"),
        name_column("outcome", "Outcome"), bytes_column("predicted_peak_bytes", "Predicted peak"),
        bytes_column("lower_bytes", "Lower"), bytes_column("estimate_bytes", "Estimate"),
        bytes_column("upper_bytes", "Upper"), bytes_column("limit_bytes", "Cap"), Column("jobs", "Jobs"),
        Column("steps", "Steps of each"), name_column("cause", "Cause"),
    )  # fmt: skip
    rows = tuple(_trial_row(*each) for each in tried)
    caption = "Every value that real jobs were tried with."
    return Table("frontier-trials", "Trials at the frontier", caption, columns, rows)


def _trial_row(name: str, point: FrontierPoint, trial: Trial) -> tuple[Value, ...]:
    peak = trial.peak
    return (
        name, point.device, point.axis.replace("_", " "), trial.text, trial.value, trial.outcome,
        trial.predicted_peak_bytes, peak.lower_bytes, peak.estimate_bytes, peak.upper_bytes, trial.limit_bytes,
        trial.jobs, trial.steps, trial.error,
    )  # fmt: skip


def frontier_figure(axis: str, found: _Found) -> Figure | None:
    """What survived, with the bracket up to what did not, beside what was predicted; None where nothing fits at all."""
    own = [(name, point) for name, point in found if point.axis == axis]
    if not any(point.predicted is not None or point.confirmed is not None for _, point in own):
        return None
    series: list[Series] = []
    for name in dict.fromkeys(name for name, _ in own):
        points = [point for method, point in own if method == name]
        tried = [Point(p.device, p.confirmed, p.confirmed, p.refuted) for p in points if p.confirmed is not None]
        said = tuple(Point(p.device, p.predicted) for p in points if p.predicted is not None)
        if tried:
            series.append(Series(name, tuple(tried)))
        if said:
            series.append(Series(f"{name}, predicted", said, predicts=name))
    words = axis.replace("_", " ")
    title = f"Largest {words} per device"
    caption = (
        f"The largest {words} that survived under the device's cap, up to the smallest that did not, beside the "
        "largest that the plan admits (open mark). Without a trial there is the prediction alone."
    )
    key = key_of("frontier", axis)
    columns = (
        METHOD,
        DEVICE,
        Column("predicted", "Predicted"),
        Column("confirmed", "Survived"),
        Column("refuted", "Too large"),
    )
    rows = tuple((name, p.device, p.predicted, p.confirmed, p.refuted) for name, p in own)
    heading = f"Largest {words} ({own[0][1].unit})"
    return Figure(
        key, title, caption, DOTS, Axis(""), Axis(heading, start_at_zero=True),
        Table(f"{key}-data", title, caption, columns, rows), series=tuple(series),
    )  # fmt: skip
