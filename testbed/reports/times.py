"""Time: seconds by phase, a time line of each method, and who waited for whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

from testbed.reports.exhibits import (
    SPANS,
    Axis,
    Column,
    Figure,
    Section,
    Table,
    name_column,
    seconds_column,
)
from testbed.reports.material import over
from testbed.reports.timeline import RoundTimes, round_times
from testbed.reports.words import DEVICE, EMULATED_SECONDS, METHOD, OVER_SEEDS, RUN, RUNS, in_order, key_of

if TYPE_CHECKING:
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Evidence, Group, Material

#: Rows of one time line: rounds are left out before devices are.
_ROWS = 24
_ROUND = Column("round", "Round")


def times(material: Material) -> Section | None:
    if not any(run.rounds for run in material.runs):
        return None
    timed = [(group, found) for group in material.groups if (found := round_times(group.first))]
    figures = [timeline(group, found) for group, found in timed if group.label in material.shown]
    tables = [
        table for table in (phases_table(material), waiting_table(timed), last_table(material, timed)) if table.rows
    ]
    return Section("time", "Time", tuple(_paragraphs(material, timed)), (*figures, *tables))


def _paragraphs(material: Material, timed: Sequence[tuple[Group, list[RoundTimes]]]) -> Iterator[str]:
    if material.emulated:
        yield EMULATED_SECONDS
    if not timed:
        yield "The runs' records do not tell when jobs began, so there is no time line."
        return
    yield (
        "A round's clock begins with the first byte of its first job and ends with its last job; combining and "
        "evaluating are not in it. All moments are the controller's, which compares clocks with each node."
    )
    most = max(times.side_by_side for _, found in timed for times in found)
    devices = max(len(times.devices) for _, found in timed for times in found)
    if material.emulated and most < devices:
        yield (
            f"Emulated devices take turns: at most {most} of {devices} were at work at the same time, so that a "
            "device which begins late had to wait for a core of the machine, and that others waited for it says "
            "nothing of boards."
        )
    yield from material.not_drawn(material.groups)


# ── time lines ──────────────────────────────────────────────────────────────────────────────────────────────────────
def timeline(group: Group, found: Sequence[RoundTimes]) -> Figure:
    """The first, a middle and the last round of the group's first run."""
    rounds, left = _chosen(found)
    spans = [span for times in rounds for span in times.rows(_prefix(times, rounds))]
    rows = list(dict.fromkeys(span.row for span in spans))[:_ROWS]
    shown = tuple(span for span in spans if span.row in set(rows))
    key = key_of("timeline", group.name)
    title = f"Who waited for whom: {group.name}"
    told = ", ".join(str(times.round + 1) for times in rounds)
    caption = (
        f"Round {told} of {len(found)} of {group.first.run}. Each row is a device with the phases of its jobs in "
        "their order; waiting is from its last job until the last job of the round."
    )
    columns = (
        name_column("row", "Row"), name_column("phase", "Phase"), seconds_column("begin_seconds", "Begin"),
        seconds_column("end_seconds", "End"),
    )  # fmt: skip
    data = tuple((span.row, span.name, span.begin, span.end) for span in spans)
    notes = [left] if left else []
    if len({span.row for span in spans}) > len(rows):
        notes.append(f"The first {len(rows)} rows are drawn, the table has all.")
    return Figure(
        key, title, caption, SPANS, Axis("Time since the round began (s)", start_at_zero=True), Axis(""),
        Table(f"{key}-data", title, caption, columns, data), spans=shown, notes=tuple(notes),
    )  # fmt: skip


def _chosen(found: Sequence[RoundTimes]) -> tuple[list[RoundTimes], str | None]:
    """The first, a middle and the last; of many devices fewer rounds, and the note that says so."""
    three = [found[index] for index in sorted({0, len(found) // 2, len(found) - 1})]
    fit = max(1, _ROWS // max(len(times.devices) for times in found))
    if len(three) <= fit:
        return three, None
    return three[-fit:], f"Of so many devices {fit} rounds are drawn and not three."


def _prefix(times: RoundTimes, rounds: Sequence[RoundTimes]) -> str:
    return f"round {times.round + 1}: " if len(rounds) > 1 else ""


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def phases_table(material: Material) -> Table:
    """Seconds by phase, summed over the jobs of a device in a run: means over the seeds."""
    rows = [(group, device) for group in material.groups for device in group.devices]
    phases = in_order(n for group, device in rows for told in group.on(device) for n in told.phase_seconds)
    found = tuple(_phase_row(group, device, phases) for group, device in rows if any(t.jobs for t in group.on(device)))
    columns = (METHOD, DEVICE, RUNS, *(seconds_column(f"{phase}_seconds", phase) for phase in phases))
    caption = (
        f"Seconds by phase, summed over all jobs of the device in a run; idle is the wait for a job. {OVER_SEEDS} "
        "A dash: the method has no such phase there, or one of its runs lacks it."
    )
    return Table("seconds", "Seconds by phase", caption, columns, found)


def _phase_row(group: Group, device: str, phases: Sequence[str]) -> tuple[Value, ...]:
    told = group.on(device)
    return (
        group.name,
        device,
        len(told),
        *(over([each.phase_seconds.get(phase) for each in told]) for phase in phases),
    )


def waiting_table(timed: Sequence[tuple[Group, list[RoundTimes]]]) -> Table:
    """Over all rounds of every run of a group."""
    rows: list[tuple[Value, ...]] = []
    for group, _ in timed:
        rounds = [times for run in group.runs for times in round_times(run)]
        devices = dict.fromkeys(each.device for times in rounds for each in times.devices)
        rows += [(group.name, device, *_waits(device, rounds)) for device in devices]
    columns = (
        METHOD, DEVICE, Column("rounds", "Rounds"), Column("times_last", "Last in"),
        seconds_column("before_seconds", "Waited before"), seconds_column("work_seconds", "Work"),
        seconds_column("waited_seconds", "Waited after"),
    )  # fmt: skip
    caption = (
        "Over all rounds of all runs; seconds are means per round. Before: until the device's first job began; "
        "work: the phases of its jobs; after: from its last job's end until the round's. Last in: rounds in which "
        "the others waited for it."
    )
    return Table("waiting", "Who waited for whom", caption, columns, tuple(rows))


def _waits(device: str, rounds: Sequence[RoundTimes]) -> tuple[Value, ...]:
    pairs = [(times, each) for times in rounds for each in times.devices if each.device == device]
    count = len(pairs)
    return (
        count,
        sum(times.last is each for times, each in pairs),
        sum(each.begin for _, each in pairs) / count,
        sum(end - begin for _, each in pairs for begin, end, _ in each.spans) / count,
        sum(times.waited(each) for times, each in pairs) / count,
    )


def last_table(material: Material, timed: Sequence[tuple[Group, list[RoundTimes]]]) -> Table:
    """Round by round, of the runs that are drawn."""
    rows = [
        row for group, found in timed if group.label in material.shown for row in _last_rows(group, group.first, found)
    ]
    columns = (
        METHOD, RUN, _ROUND, name_column("last", "Last"), seconds_column("round_seconds", "Round took"),
        name_column("longest", "Longest wait"), seconds_column("longest_seconds", "of"),
        seconds_column("waited_seconds", "All waits"),
    )  # fmt: skip
    caption = (
        "Each round of the runs whose time lines are drawn: who ended last, and how long the others waited for it."
    )
    return Table("last", "Last in each round", caption, columns, tuple(rows))


def _last_rows(group: Group, run: Evidence, found: Sequence[RoundTimes]) -> Iterator[tuple[Value, ...]]:
    for times in found:
        longest = min(times.devices, key=attrgetter("end"))
        alone = len(times.devices) == 1
        yield (
            group.name, run.run, times.round + 1, times.last.device, times.seconds, None if alone else longest.device,
            None if alone else times.waited(longest), sum(map(times.waited, times.devices)),
        )  # fmt: skip
