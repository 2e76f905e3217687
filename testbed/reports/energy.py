"""Energy: of each run's devices as measured, by phase and by power rail; nothing where no device has a meter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.energy_table import verdict_text
from testbed.reports.exhibits import (
    Axis,
    Column,
    Figure,
    Section,
    Table,
    name_column,
    seconds_column,
)
from testbed.reports.figures import bars
from testbed.reports.material import over
from testbed.reports.words import (
    DEVICE,
    METHOD,
    OF_MEASUREMENT,
    OVER_SEEDS,
    REPLAYED,
    RUN,
    RUNS,
    in_order,
    joules_column,
    measured,
    watts_column,
)
from testbed.statistics import Estimate

if TYPE_CHECKING:
    from testbed.energy import Idle
    from testbed.energy_summary import EnergySummary
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Group, Material


@dataclass(frozen=True)
class _Metered:
    """A device of a run, or all of them together, with its energy."""

    run: str
    method: str
    device: str
    energy: EnergySummary


_ALL = "all"


def _metered(material: Material) -> list[_Metered]:
    """By run; the sum of its devices stands last, where each of several has a meter."""
    found = []
    for run in material.runs:
        told = run.summary
        own = [_Metered(told.run, told.method, d.device, d.energy) for d in told.devices if d.energy is not None]
        found += own
        if told.energy is not None and len(own) > 1:
            found.append(_Metered(told.run, told.method, _ALL, told.energy))
    return found


def energy(material: Material) -> Section:
    rows = _metered(material)
    if not rows:
        text = "No device has a meter, so there is no energy: nothing was estimated in its place."
        return Section("energy", "Energy", (text,))
    exhibits: list[Table | Figure] = [energy_table(rows), phases_figure(material), phases_table(rows)]
    exhibits += [table for table in (rails_table(rows), notes_table(rows)) if table.rows]
    return Section("energy", "Energy", tuple(_paragraphs(material)), tuple(exhibits))


def _paragraphs(material: Material) -> Iterator[str]:
    yield "An energy is of a device's first meter, over the jobs of all its clients, at the point where it sits."
    if material.replayed:
        yield REPLAYED
    lacking = dict.fromkeys(
        d.device for run in material.runs for d in run.summary.devices if d.jobs and d.energy is None
    )
    if lacking:
        yield f"Without a meter, and so without an energy, in one run at least: {', '.join(lacking)}."


# ── as measured ─────────────────────────────────────────────────────────────────────────────────────────────────────
def energy_table(rows: Sequence[_Metered]) -> Table:
    columns = (
        RUN, METHOD, DEVICE, name_column("meter", "Meter"), name_column("point", "Measured at"),
        joules_column("gross_joules", "Gross"), joules_column("net_joules", "Net"),
        watts_column("idle_watts", "At rest"), watts_column("mean_watts", "Mean"), Column("samples", "Samples"),
        seconds_column("longest_gap_seconds", "Longest gap"), name_column("verdict", "Verdict"),
    )  # fmt: skip
    caption = (
        f"Gross energy of all jobs, and net of what the device takes at rest in the same time. {OF_MEASUREMENT} "
        "A dash: not measured (no rest was measured, or a device has no meter)."
    )
    return Table("energy", "Energy per run and device", caption, columns, tuple(map(_energy_row, rows)))


def _energy_row(row: _Metered) -> tuple[Value, ...]:
    gross, net = row.energy.gross, row.energy.net
    return (
        row.run, row.method, row.device, gross.meter, gross.point, measured(gross), measured(net),
        _rest(row.energy.idle), gross.mean_watts if row.device != _ALL else None, gross.samples,
        gross.longest_gap_seconds, verdict_text(gross),
    )  # fmt: skip


def _rest(idle: Idle | None) -> Estimate | None:
    return None if idle is None else Estimate(1, idle.watts, None, idle.low_watts, idle.high_watts)


def phases_table(rows: Sequence[_Metered]) -> Table:
    found = tuple(
        (row.run, row.method, row.device, phase, measured(energy), energy.seconds, energy.samples, verdict_text(energy))
        for row in rows
        for phase, energy in row.energy.phases.items()
        if energy.joules is not None
    )
    columns = (
        RUN, METHOD, DEVICE, name_column("phase", "Phase"), joules_column("gross_joules", "Gross"),
        seconds_column("seconds", "Time"), Column("samples", "Samples"), name_column("verdict", "Verdict"),
    )  # fmt: skip
    caption = f"Gross energy by phase. {OF_MEASUREMENT} A short phase has few samples, and says so in its verdict."
    return Table("energy-phases-measured", "Energy by phase, as measured", caption, columns, found)


def rails_table(rows: Sequence[_Metered]) -> Table:
    found = tuple(
        (row.run, row.method, row.device, rail, measured(energy), energy.mean_watts, verdict_text(energy))
        for row in rows
        for rail, energy in row.energy.rails.items()
    )
    beside = tuple(
        (
            row.run,
            row.method,
            row.device,
            f"{meter} at {energy.point}",
            measured(energy),
            energy.mean_watts,
            verdict_text(energy),
        )
        for row in rows
        for meter, energy in row.energy.beside.items()
    )
    columns = (
        RUN, METHOD, DEVICE, name_column("rail", "Power rail, or other meter"), joules_column("gross_joules", "Gross"),
        watts_column("mean_watts", "Mean"), name_column("verdict", "Verdict"),
    )  # fmt: skip
    caption = (
        f"By the board's own names. Rails may lie within one another and are never added up here. {OF_MEASUREMENT}"
    )
    return Table("rails", "Power rails", caption, columns, (*found, *beside))


def notes_table(rows: Sequence[_Metered]) -> Table:
    """Why an energy is not valid, and what makes it weaker."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.device == _ALL:
            continue
        said = [("problem", text) for text in row.energy.gross.problems] + [
            ("note", text) for text in row.energy.gross.notes
        ]
        said += [("problem of net", text) for text in _of_net(row.energy)]
        for kind, text in said:
            found.setdefault((row.device, kind, text), []).append(row.run)
    columns = (DEVICE, name_column("kind", "Kind"), name_column("said", "What is said"), name_column("runs", "Runs"))
    caption = "Why an energy is not valid (problem), or less certain than its samples look (note)."
    told = tuple((device, kind, text, ", ".join(runs)) for (device, kind, text), runs in found.items())
    return Table("energy-notes", "What is said of the energies", caption, columns, told)


def _of_net(summary: EnergySummary) -> list[str]:
    return [text for text in (summary.net.problems if summary.net else ()) if text not in summary.gross.problems]


# ── over seeds ──────────────────────────────────────────────────────────────────────────────────────────────────────
def phases_figure(material: Material) -> Figure:
    """Each method on each device, stacked by phase: means over the seeds."""
    heights: list[tuple[str, str, float | None]] = []
    rows: list[tuple[Value, ...]] = []
    for group in material.drawn(material.groups):
        for device in group.devices:
            for phase, found in _phase_means(group, device):
                heights.append((f"{group.name}, {device}", phase, found.mean))
                rows.append((group.name, device, phase, found, found.count))
    caption = (
        "Gross energy of a run by phase, each method on each device. "
        f"{OVER_SEEDS} Without what lies between two jobs, which is nobody's."
    )
    columns = (METHOD, DEVICE, name_column("phase", "Phase"), joules_column("gross_joules", "Gross"), RUNS)
    bars_of = list(dict.fromkeys(bar for bar, _, _ in heights))
    order = in_order(phase for _, phase, _ in heights)
    heights.sort(key=lambda height: order.index(height[1]))
    title = "Energy by phase" + (" (replayed)" if material.replayed else "")
    table = Table("energy-phases-data", title, caption, columns, tuple(rows))
    notes = [*([REPLAYED] if material.replayed else []), *material.not_drawn(material.groups)]
    return bars("energy-phases", title, caption, Axis("Energy (J)", start_at_zero=True), table, bars_of, heights, notes)


def _phase_means(group: Group, device: str) -> Iterator[tuple[str, Estimate]]:
    """Of the phases that every run of the group has there."""
    summaries = [told.energy for told in group.on(device)]
    phases = dict.fromkeys(name for each in summaries if each is not None for name in each.phases)
    for phase in phases:
        values = [each.phases[phase].joules if each and phase in each.phases else None for each in summaries]
        found = over(values)
        if found is not None:
            yield phase, found
