"""Traffic, and how jobs ended: counts per method and device, every refusal and failure with its cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

from testbed.job import FINISHED, OUTCOMES, REFUSED
from testbed.reports.exhibits import (
    Axis,
    Column,
    Figure,
    Section,
    Table,
    bytes_column,
    name_column,
)
from testbed.reports.figures import BARS_SHOWN, bars
from testbed.reports.material import over
from testbed.reports.words import DEVICE, METHOD, OVER_SEEDS, RUN, RUNS

if TYPE_CHECKING:
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Evidence, Group, Material

_MIB = 2**20


# ── traffic ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def traffic(material: Material) -> Section | None:
    table = traffic_table(material)
    if not any(run.results for run in material.runs):
        return None
    text = (
        "Down is what jobs were sent, up what they sent back. Beside them: what told the measurements, and what "
        "devices were sent because they lacked it (configuration, blocks of the base model, shards). A device keeps "
        "that for later runs."
    )
    return Section("traffic", "Traffic", (text,), (table, traffic_figure(material, table)))


def traffic_table(material: Material) -> Table:
    columns = (
        METHOD, RUNS, bytes_column("round_down_bytes", "Down per round"),
        bytes_column("round_up_bytes", "Up per round"), bytes_column("down_bytes", "Down per run"),
        bytes_column("up_bytes", "Up per run"), bytes_column("measurement_bytes", "Measurements"),
        bytes_column("deployed_bytes", "Deployed"),
    )  # fmt: skip
    caption = f"Bytes over all devices. {OVER_SEEDS} Per round: the run's, over its rounds."
    return Table("traffic", "Traffic", caption, columns, tuple(_traffic_row(group) for group in material.groups))


def _traffic_row(group: Group) -> tuple[Value, ...]:
    down, up = attrgetter("bytes_down"), attrgetter("bytes_up")
    return (
        group.name, len(group.runs), over([_per_round(run, down(run.summary)) for run in group.runs]),
        over([_per_round(run, up(run.summary)) for run in group.runs]), group.over(down), group.over(up),
        group.over(attrgetter("measurement_bytes")), group.over(attrgetter("deployed_bytes")),
    )  # fmt: skip


def _per_round(run: Evidence, whole: int | None) -> float | None:
    return None if whole is None or not run.summary.rounds else whole / run.summary.rounds


def traffic_figure(material: Material, table: Table) -> Figure:
    heights = [
        (group.name, name, group.middle(attrgetter(figure)))
        for group in material.groups
        for name, figure in (("down", "bytes_down"), ("up", "bytes_up"))
    ]
    caption = (
        "Bytes of all jobs of a run, down and up: means over the seeds. Measurements and deployment are not in it."
    )
    names = [group.name for group in material.groups]
    title = "Bytes sent by method"
    data = Table("bytes-sent-data", title, caption, table.columns, table.rows, table.notes)
    axis = Axis("Sent in a run (MiB)", _MIB, start_at_zero=True)
    return bars("bytes-sent", title, caption, axis, data, names, heights)


# ── outcomes ────────────────────────────────────────────────────────────────────────────────────────────────────────
def outcomes(material: Material) -> Section | None:
    counts = _counts(material)
    if not counts:
        return None
    ended = sum(counts.values(), Counter[str]())
    exhibits: list[Table | Figure] = [outcomes_table(material, counts)]
    if set(ended) != {FINISHED}:
        exhibits.append(outcomes_figure(counts))
    exhibits += [table for table in (refusals_table(material), failures_table(material)) if table.rows]
    jobs = sum(ended[outcome] for outcome in OUTCOMES if outcome != REFUSED)
    text = f"{ended[FINISHED]} of {jobs} jobs finished" + (
        "."
        if not ended[REFUSED]
        else f"; {ended[REFUSED]} clients were refused, because no submodel fits their budget."
    )
    return Section("outcomes", "Outcomes", (text,), tuple(exhibits))


def _counts(material: Material) -> dict[tuple[str, str], Counter[str]]:
    """By method and device: jobs by outcome, over all runs; clients that the plan refused count once a run."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for group in material.groups:
        for run in group.runs:
            for refusal in run.summary.refusals:
                found.setdefault((group.name, refusal.device), Counter())[REFUSED] += 1
            for job in run.results:
                if job.outcome != REFUSED:
                    found.setdefault((group.name, job.device), Counter())[job.outcome] += 1
    order = [(group.name, device) for group in material.groups for device in group.devices]
    return {key: found[key] for key in order if key in found}


def outcomes_table(material: Material, counts: dict[tuple[str, str], Counter[str]]) -> Table:
    runs = {group.name: len(group.runs) for group in material.groups}
    columns = (METHOD, DEVICE, RUNS, *(Column(name, name.replace("_", " ").capitalize()) for name in OUTCOMES))
    rows: tuple[tuple[Value, ...], ...] = tuple(
        (name, device, runs[name], *(count[each] for each in OUTCOMES)) for (name, device), count in counts.items()
    )
    caption = (
        "Jobs by how they ended, over all runs of a method. Refused counts clients, once a run: the plan, or the "
        "node, let them take no part."
    )
    return Table("outcomes", "Outcomes per method and device", caption, columns, rows)


def outcomes_figure(counts: dict[tuple[str, str], Counter[str]]) -> Figure:
    """Per method and device, or where these are too many per method."""
    by_device = len(counts) <= BARS_SHOWN
    bars_of: dict[str, Counter[str]] = {}
    for (name, device), count in counts.items():
        bars_of.setdefault(f"{name}, {device}" if by_device else name, Counter()).update(count)
    present = [each for each in OUTCOMES if any(count[each] for count in bars_of.values())]
    heights = [(bar, each.replace("_", " "), float(count[each])) for bar, count in bars_of.items() for each in present]
    caption = (
        f"Jobs and refused clients by outcome, over all runs, per {'method and device' if by_device else 'method'}."
    )
    title = "How jobs ended"
    rows: tuple[tuple[Value, ...], ...] = tuple(
        (bar, *(count[each] for each in present)) for bar, count in bars_of.items()
    )
    columns = (name_column("bar", "Bar"), *(Column(each, each.replace("_", " ").capitalize()) for each in present))
    data = Table("how-jobs-ended-data", title, caption, columns, rows)
    axis = Axis("Jobs and refused clients", start_at_zero=True)
    return bars("how-jobs-ended", title, caption, axis, data, list(bars_of), heights)


def refusals_table(material: Material) -> Table:
    """Alike refusals of several runs in one row."""
    found: dict[tuple[Value, ...], list[str]] = {}
    for group in material.groups:
        for run in group.runs:
            for told in run.summary.refusals:
                key = (group.name, told.device, told.client, told.needed_bytes, told.budget_bytes, told.reason)
                found.setdefault(key, []).append(str(run.seed))
    columns = (
        METHOD, DEVICE, Column("client", "Client"), bytes_column("needed_bytes", "Needs"),
        bytes_column("budget_bytes", "Budget"), name_column("reason", "Reason"), name_column("seeds", "Seeds"),
    )  # fmt: skip
    rows = tuple((*key, ", ".join(seeds)) for key, seeds in found.items())
    return Table("refusals", "Refusals", "Clients that took no part, and why.", columns, rows)


def failures_table(material: Material) -> Table:
    """Alike failures of one run in one row, with the rounds they happened in."""
    found: dict[tuple[Value, ...], list[str]] = {}
    for run in material.runs:
        for told in run.summary.failures:
            key = (run.run, run.summary.method, told.device, told.client, told.outcome, told.phase, told.error)
            found.setdefault(key, []).append(str(told.round + 1))
    columns = (
        RUN, METHOD, DEVICE, Column("client", "Client"), name_column("outcome", "Outcome"),
        name_column("phase", "Phase"), name_column("error", "Cause"), name_column("rounds", "Rounds"),
    )  # fmt: skip
    rows: Sequence[tuple[Value, ...]] = [(*key, ", ".join(rounds)) for key, rounds in found.items()]
    return Table("failures", "Failures", "Jobs that did not finish, and why.", columns, tuple(rows))
