"""What was run: the runs, their devices and settings, what is not like for like, and every figure of each run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from testbed.report import fairness
from testbed.report_tables import device_line, run_line
from testbed.reports.exhibits import Column, Section, Table, bytes_column, name_column
from testbed.reports.grouping import options_of, settings_of
from testbed.reports.words import DEVICE, METHOD, REPLAYED, RUN, yes_column

if TYPE_CHECKING:
    from testbed.report import DeviceSummary, RunSummary
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Evidence, Group, Material

#: Of a run's configuration: what has a column of its own, or names nothing that a reader could choose.
_SHOWN_ELSEWHERE = frozenset({"model", "task", "data", "seed"})
#: So many runs are listed before anything else; more of them stand at the end.
FEW = 12
#: Columns that tell two devices apart: its name, profile, kind and budget.
_IDENTITY = 4
_SETTING = name_column("setting", "Setting")
_VALUE = name_column("value", "Value")


def what_was_run(material: Material) -> Section:
    exhibits = [devices_table(material), common_table(material), settings_table(material)]
    if len(material.runs) <= FEW:
        exhibits.insert(0, runs_table(material))
    exhibits += [table for table in (unlike_table(material), cells_table(material)) if table.rows]
    return Section("runs", "What was run", tuple(_paragraphs(material)), tuple(exhibits))


def _paragraphs(material: Material) -> Iterator[str]:
    runs = [run.summary for run in material.runs]
    where = {True: "on emulated devices", False: "on boards", None: "on boards and emulated devices"}
    kinds = {run.emulated for run in runs}
    yield f"{len(runs)} runs of {len(material.labels)} methods {where[kinds.pop() if len(kinds) == 1 else None]}."
    uncapped = [run.run for run in runs if run.uncapped]
    if uncapped:
        yield f"UNCAPPED: no limit held the trainers of {_some(uncapped)}; their memory budgets were not enforced."
    if material.replayed:
        yield REPLAYED
    yield from material.notes
    yield from material.choice
    yield from (f"{run.run}: {note}." for run in runs for note in run.notes)


def _some(names: Sequence[str], limit: int = 8) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


# ── runs ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def runs_table(material: Material) -> Table:
    columns = (
        RUN, METHOD, name_column("data", "Data"), name_column("model", "Model"), Column("seed", "Seed"),
        name_column("state", "State"), Column("rounds", "Rounds"), Column("rounds_planned", "of"),
        Column("devices", "Devices"), Column("clients", "Clients"), Column("refused", "Refused"),
        yes_column("emulated", "Emulated"), yes_column("uncapped", "Uncapped"),
        yes_column("replayed", "Replayed power"),
    )  # fmt: skip
    rows = tuple(_run_row(run) for run in material.runs)
    caption = "Every run. A dash: not known, or of both kinds. Refused are clients whose budget admitted no submodel."
    return Table("runs", "Runs", caption, columns, rows)


def _run_row(run: Evidence) -> tuple[Value, ...]:
    told = run.summary
    return (
        told.run, told.method, told.data, told.model, told.seed, told.state, told.rounds, told.rounds_planned,
        len(told.devices), told.clients, len(told.refusals), told.emulated, told.uncapped, _replayed(told),
    )  # fmt: skip


def _replayed(run: RunSummary) -> bool | None:
    """None where no device has a meter."""
    energies = [device.energy.gross for device in run.devices if device.energy is not None]
    return any(energy.replayed for energy in energies) if energies else None


# ── devices ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def devices_table(material: Material) -> Table:
    columns = (
        DEVICE, name_column("profile", "Hardware profile"), name_column("kind", "Kind"),
        bytes_column("budget_bytes", "Budget"), name_column("meter", "Meter"), name_column("point", "Measured at"),
        name_column("unverified", "Not verified in its profile"),
    )  # fmt: skip
    measured_first = sorted(
        ((device, run) for run in material.runs for device in run.summary.devices),
        key=lambda pair: pair[0].energy is None,
    )
    known: dict[tuple[Value, ...], tuple[Value, ...]] = {}
    for device, run in measured_first:
        row = _device_row(device, run)
        known.setdefault((*row[:_IDENTITY], row[-2]), row)
    rows = tuple(known.values())
    caption = (
        "Every device as the inventory had it. An emulated device has a board's memory budget and nothing else of it. "
        "A dash: it has no meter, and so no energy."
    )
    return Table("devices", "Devices", caption, columns, rows)


def _device_row(device: DeviceSummary, run: Evidence) -> tuple[Value, ...]:
    stored: Mapping[str, Any] = next(
        (each for each in run.inventory.get("devices", ()) if each.get("name") == device.device), {}
    )
    profile = stored.get("profile")
    details = profile if isinstance(profile, Mapping) else {}
    unverified = ", ".join(details.get("unverified") or ())
    meter, point = _meter(device, stored)
    return (
        device.device, details.get("title") or device.profile, device.kind, device.budget_bytes, meter, point,
        unverified or None,
    )  # fmt: skip


def _meter(device: DeviceSummary, stored: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """As measured; of a device that measured nothing, as its inventory has it."""
    if device.energy is not None:
        gross = device.energy.gross
        return gross.meter + (" (replayed)" if gross.replayed else ""), gross.point
    first: Mapping[str, Any] = next(iter(stored.get("meters") or ()), {})
    return first.get("name"), first.get("point")


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────
def common_table(material: Material) -> Table:
    contents = [_options(group) for group in material.groups]
    rows = [(name, value) for name, value in contents[0].items() if _all_alike(name, contents)]
    caption = "What all methods had alike, defaults included."
    return Table("settings-common", "Settings in common", caption, (_SETTING, _VALUE), tuple(rows))


def settings_table(material: Material) -> Table:
    """In which the methods differ, and each method's own."""
    contents = [_options(group) for group in material.groups]
    names = dict.fromkeys(name for content in contents for name in content)
    differing = [name for name in names if not _all_alike(name, contents)]
    rows: list[tuple[Value, ...]] = []
    for group, content in zip(material.groups, contents, strict=True):
        own = {**{name: content.get(name, "") for name in differing}, **_texts(settings_of(group.first))}
        rows.append((group.name, group.first.summary.method, ", ".join(f"{k}={v}" for k, v in own.items()) or None))
    columns = (name_column("label", "Label"), METHOD, name_column("settings", "Settings"))
    caption = "What the methods did not have alike, and each method's own settings, defaults included. A dash: none."
    return Table("settings", "Settings of each method", caption, columns, tuple(rows))


def _options(group: Group) -> dict[str, str]:
    options = options_of(group.first)
    return _texts({name: value for name, value in options.items() if name not in _SHOWN_ELSEWHERE})


def _all_alike(name: str, contents: Sequence[Mapping[str, str]]) -> bool:
    return len({content.get(name) for content in contents}) == 1


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


# ── what is not like for like, and what is not done ─────────────────────────────────────────────────────────────────
def unlike_table(material: Material) -> Table:
    """What differs between methods with the same seed under the same circumstances, and should not."""
    notes: dict[tuple[str | None, str], list[int]] = {}
    for circumstances in material.circumstances:
        groups = material.under(circumstances)
        for seed in sorted({run.seed for group in groups for run in group.runs}):
            alike = [(group, run) for group in groups for run in group.runs if run.seed == seed]
            for note in fairness([replace(run.summary, run=group.label) for group, run in alike]):
                notes.setdefault((", ".join(circumstances) or None, note), []).append(seed)
    rows = tuple((under, note, ", ".join(map(str, seeds))) for (under, note), seeds in notes.items())
    columns = (
        name_column("circumstances", "Under"),
        name_column("difference", "Difference"),
        name_column("seeds", "Seeds"),
    )
    caption = (
        "What differs between runs with the same seed and should not. A method may bring it about by its nature "
        "(other adapters begin from another state, a smaller submodel lets more clients take part): it still "
        "explains a result."
    )
    return Table("unlike", "Not like for like", caption, columns, rows)


def cells_table(material: Material) -> Table:
    """The cells of the experiment that are not done."""
    rows = tuple(
        (each.cell.title, each.state, each.run.run_id if each.run else None, each.error)
        for each in material.standings
        if each.state != "done"
    )
    columns = (name_column("cell", "Cell"), name_column("state", "State"), RUN, name_column("reason", "Reason"))
    caption = "Cells of the experiment without a finished run; no figure counts them."
    return Table("not-done", "Cells that are not done", caption, columns, rows)


# ── every figure ────────────────────────────────────────────────────────────────────────────────────────────────────
def every_figure(material: Material) -> Section:
    runs = [run.summary for run in material.runs]
    tables = (
        _flat("run-figures", "Every figure of each run", [run_line(run) for run in runs]),
        _flat("device-figures", "Every figure of each device", [device_line(r, d) for r in runs for d in r.devices]),
    )
    text = "The figures as `testbed report --csv` gives them: raw, in base units. A dash: not measured."
    listed = () if len(material.runs) <= FEW else (runs_table(material),)
    return Section("data", "Every run", (text,), (*listed, *tables))


def _flat(key: str, title: str, lines: Sequence[Mapping[str, Any]]) -> Table:
    """With the columns that any line fills."""
    names = dict.fromkeys(name for line in lines for name in line)
    kept = [name for name in names if name != "level" and any(line.get(name) is not None for line in lines)]
    columns = tuple(Column(name, name, str, number=_is_number(name, lines)) for name in kept)
    rows = tuple(tuple(line.get(name) for name in kept) for line in lines)
    return Table(key, title, "One row each, the columns as in the CSV.", columns, rows)


def _is_number(name: str, lines: Sequence[Mapping[str, Any]]) -> bool:
    return all(isinstance(line.get(name), int | float | None) for line in lines)
