"""A frontier on the terminal: one row per device and axis, and below it what a table cannot say."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table

from testbed.frontier.record import BATCH_SIZE, CEILING, LENGTH, MEMORY, MODEL, SUBMODEL, Frontier, FrontierPoint
from testbed.job import TIMED_OUT
from testbed.quantities import DASH, bytes_text, percent_text

_LEFT = ("Device", "Largest", "With")
_PREDICTED = ("Plan", "Edge")
_MEASURED = ("Survived", "Too large", "Peak", "Predicted", "Error", "Jobs")


def frontier_table(frontier: Frontier) -> Table:
    """Plan and edge as predicted; where a trial was made, what survived, what was too large, and the measured peak."""
    measured = any(point.trials for point in frontier.points)
    headings = (*_LEFT, "Budget", *_PREDICTED, *(_MEASURED if measured else ()))
    title = f"frontier of {frontier.method} on {frontier.model}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in _LEFT else "right", overflow="fold")
    shown = [point for point in frontier.points if point.same_as is None]
    for point in shown:
        table.add_row(*_row(point, measured=measured))
    return table


def _row(point: FrontierPoint, *, measured: bool) -> list[str]:
    row = [point.device, point.axis.replace("_", " "), _held_text(point), bytes_text(point.budget_bytes)]
    row += [_figure(point, point.predicted), _figure(point, point.edge)]
    if measured:
        trial = point.measured
        row += [
            _figure(point, point.confirmed),
            _too_large(point),
            bytes_text(trial.peak.estimate_bytes if trial else None),
            bytes_text(trial.predicted_peak_bytes if trial else None),
            percent_text(point.bytes_error),
            str(point.jobs) if point.trials else DASH,
        ]
    return row


def _figure(point: FrontierPoint, value: int | None) -> str:
    """What ends at the model's own end, or at the ceiling, is at least so much."""
    if value is None:
        return "none"
    if value == point.limit and point.axis == SUBMODEL:
        return f"{value} (all)"
    return f"≥ {value}" if value == point.limit else str(value)


def _too_large(point: FrontierPoint) -> str:
    trial = point.trial_of(point.refuted)
    if trial is None:
        return DASH
    return f"{trial.value} (timed out)" if trial.outcome == TIMED_OUT else str(trial.value)


def frontier_notes(frontier: Frontier) -> Iterator[str]:
    """What the columns are, and what ended an axis where memory did not."""
    yield (
        "Plan: the largest that the plan admits (libraries' pages included).  Edge: the largest whose memory that the "
        "kernel cannot take back is predicted within the budget."
    )
    if any(point.trials for point in frontier.points):
        yield (
            "Survived, too large: real jobs under the cap.  Peak, predicted: such memory of the largest that survived, "
            "as estimated from the kernel's figures and as predicted."
        )
    for point in frontier.points:
        yield from _notes_of(point)
    yield from _alike(frontier)


def _held_text(point: FrontierPoint) -> str:
    """What the other axes stand at: 64 tokens, 3 of 12 blocks"""
    units = {BATCH_SIZE: "examples", LENGTH: "tokens"}
    return ", ".join(
        f"{value} {units[name].removesuffix('s' * (value == 1))}" if name in units else str(value)
        for name, value in point.held.items()
    )


def _notes_of(point: FrontierPoint) -> Iterator[str]:
    """A refusal, a bracket that is not tight, an end that memory did not make, a job that says nothing."""
    if point.same_as is not None:
        return
    where = f"{point.device}, {point.axis.replace('_', ' ')}"
    if point.unit == "choices":
        words = [point.predicted_text, point.measured.text if point.measured else None]
        yield from (f"{where}: {text}" for text in dict.fromkeys(words) if text)
    if point.refusal:
        yield f"{where}: {point.refusal}"
    if point.limited_by != MEMORY and point.axis != SUBMODEL:
        ends = {MODEL: "the model takes no more", CEILING: "nothing larger was asked for"}
        yield f"{where}: {point.limit} {point.unit} is not the memory's limit: {ends[point.limited_by]}"
    if any(trial.decided for trial in point.trials) and not point.exact:
        gap = f"{point.confirmed or 'none'} and {DASH if point.refuted is None else point.refuted}"
        yield f"{where}: between {gap} nothing was tried"
    yield from (
        f"{where}: {trial.text} says nothing about memory: {trial.outcome}: {trial.error}"
        for trial in point.trials
        if not trial.decided
    )


def _alike(frontier: Frontier) -> Iterator[str]:
    """The devices that were not asked, because another one is like them."""
    alike: dict[str, list[str]] = {}
    for point in frontier.points:
        if point.same_as is not None and point.device not in alike.get(point.same_as, ()):
            alike.setdefault(point.same_as, []).append(point.device)
    for first, others in alike.items():
        yield f"{', '.join(others)}: as {first}, by profile and budget; asked once"


def trial_text(point: FrontierPoint) -> str:
    """The newest trial in a line."""
    trial = point.trials[-1]
    how = "survived" if trial.survived else trial.outcome
    place = f" in {trial.phase}" if trial.phase else ""
    peak = bytes_text(trial.peak.estimate_bytes)
    return (
        f"{point.device}: {trial.text}: {how}{place}, peak {peak} (predicted "
        f"{bytes_text(trial.predicted_peak_bytes)}) of {bytes_text(trial.limit_bytes)}"
    )
