"""The plan as people read it (and as JSON): who trains what, at what predicted peak, and who cannot, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from testbed.method import ATTENTION, FEED_FORWARD
from testbed.model.footprint import predict
from testbed.quantities import DASH, bytes_text

if TYPE_CHECKING:
    from testbed.prepare import Prepared
    from testbed.run import ClientPlan

_COLUMNS = ("Device", "Clients", "Examples", "Blocks", "Phase", "Needs", "Budget", "Headroom")
_NUMBERS = frozenset({"Clients", "Examples", "Needs", "Budget", "Headroom"})


def plan_as_json(prepared: Prepared) -> dict[str, Any]:
    """Every client with its submodel, prediction by phase and part, and budget, in bytes."""
    return {
        "method": prepared.config.method,
        "settings": dict(prepared.config.settings),
        "model": {"name": prepared.config.model, "blocks": len(prepared.base.shape)},
        "clients": [client.to_json() for client in prepared.plan.clients],
        "promises": list(prepared.promises),
        "disturbances": prepared.weather.to_json(prepared.config.rounds),
        "meters": {device.name: [meter.name for meter in device.meters] for device in prepared.inventory},
    }


def plan_table(prepared: Prepared) -> RenderableType:
    """One row per device (its clients share its budget, in turns); below, every phase's peak where there are several.

    Last of all stands what the largest phase of each device is made of.
    """
    clients = prepared.plan.clients
    table = Table(title=f"plan of {prepared.config.method}", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left", overflow="fold")
    notes = []
    for device in dict.fromkeys(client.device for client in clients):
        own = [client for client in clients if client.device == device]
        table.add_row(*_row(device, own, len(prepared.base.shape)))
        notes.append(_note(own[0]))
    further = (*prepared.promises, *prepared.weather.lines(prepared.config.rounds), _metered(prepared))
    return Group(table, *_by_phase(prepared), *notes, *(Text(line) for line in further))


def _metered(prepared: Prepared) -> str:
    """Whose energy will be known, and by what."""
    known = {device.name: " and ".join(meter.name for meter in device.meters) for device in prepared.inventory}
    without = [name for name, meters in known.items() if not meters]
    if len(without) == len(known):
        return "energy: of no device, because none has a meter"
    told = ", ".join(f"{name} by {meters}" for name, meters in known.items() if meters)
    return f"energy: {told}" + (f"; not of {', '.join(without)}, without a meter" if without else "")


def _by_phase(prepared: Prepared) -> list[RenderableType]:
    """What every device needs in every phase; a phase that it is not admitted to, with the bytes it would need."""
    names = _all_phases(prepared)
    if len(names) < 2:
        return []
    table = Table(title="needs by phase", title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("Device", overflow="fold")
    for name in names:
        table.add_column(name.capitalize(), justify="right", overflow="fold")
    for client in {client.device: client for client in prepared.plan.clients}.values():
        table.add_row(client.device, *(_need(prepared, client, name) for name in names))
    return [table]


def _all_phases(prepared: Prepared) -> list[str]:
    """The phases of the method's largest choice, and those that only smaller ones have, in their order."""
    largest = next(iter(prepared.method.choices(prepared.base.shape)))
    named = [phase.name for phase in prepared.method.phases(largest, prepared.base.shape, prepared.work)]
    return list(dict.fromkeys([*named, *(name for client in prepared.plan.clients for name in client.parts)]))


def _need(prepared: Prepared, client: ClientPlan, name: str) -> str:
    if client.planned and name in client.parts:
        return bytes_text(sum(client.parts[name].values()))
    known = client.parts if name in client.parts else _parts_of_largest(prepared, client)
    needed = sum(known[name].values()) if name in known else None
    if client.planned or needed is None:
        return DASH if needed is None or needed <= client.budget_bytes else f"no: {bytes_text(needed)}"
    return bytes_text(needed) + ("" if needed <= client.budget_bytes else ", too much")


def _parts_of_largest(prepared: Prepared, client: ClientPlan) -> Mapping[str, Mapping[str, int]]:
    device = next(device for device in prepared.inventory if device.name == client.device)
    work = replace(prepared.work, accelerator=device.accelerator)
    shape = prepared.base.shape
    phases = prepared.method.phases(next(iter(prepared.method.choices(shape))), shape, work)
    footprint = predict(phases, shape, work, prepared.baselines[client.device])
    return {phase.name: phase.parts for phase in footprint.phases}


def _row(device: str, own: Sequence[ClientPlan], blocks: int) -> list[str]:
    first = own[0]
    needed = first.predicted_bytes if first.planned else first.needed_bytes
    return [
        device,
        str(len(own)),
        str(sum(client.examples for client in own)),
        _kept(first, blocks),
        first.predicted_phase or DASH,
        bytes_text(needed),
        bytes_text(first.budget_bytes),
        bytes_text(first.budget_bytes - needed if needed is not None else None),
    ]


def _kept(client: ClientPlan, blocks: int) -> str:
    if client.submodel is None:
        return "refused"
    kept = client.submodel.blocks
    if client.submodel.width < 1:
        return f"{len(kept)} of {blocks}, width {Fraction(client.submodel.width).limit_denominator(1000)}"
    if all(block.whole for block in kept):
        streamed = sum(block.streamed for block in kept)
        return f"{len(kept)} of {blocks}{f', {streamed} streamed' if streamed else ''}"
    attention, forward = (sum(part in block.parts for block in kept) for part in (ATTENTION, FEED_FORWARD))
    return f"{attention} attention, {forward} feed-forward"


def _note(client: ClientPlan) -> Text:
    if not client.planned:
        return Text(f"refused  {client.device}: {client.reason}", style="yellow")
    parts = client.parts.get(client.predicted_phase or "", {})
    named = [f"{name} {bytes_text(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size]
    return Text(f"{client.device}, {client.predicted_phase}: {', '.join(named)}", style="dim")
