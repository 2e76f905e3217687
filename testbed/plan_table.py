"""The plan as people read it (and as JSON): who trains what, at what predicted peak, and who cannot, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from testbed.method import ATTENTION, FEED_FORWARD
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
    }


def plan_table(prepared: Prepared) -> RenderableType:
    """One row per device (its clients share its budget, in turns); below, what its largest phase is made of."""
    clients = prepared.plan.clients
    table = Table(title=f"plan of {prepared.config.method}", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left", overflow="fold")
    notes = []
    for device in dict.fromkeys(client.device for client in clients):
        own = [client for client in clients if client.device == device]
        table.add_row(*_row(device, own, len(prepared.base.shape)))
        notes.append(_note(own[0]))
    return Group(table, *notes)


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
    if all(block.whole for block in kept):
        return f"{len(kept)} of {blocks}"
    attention, forward = (sum(part in block.parts for block in kept) for part in (ATTENTION, FEED_FORWARD))
    return f"{attention} attention, {forward} feed-forward"


def _note(client: ClientPlan) -> Text:
    if not client.planned:
        return Text(f"refused  {client.device}: {client.reason}", style="yellow")
    parts = client.parts.get(client.predicted_phase or "", {})
    named = [f"{name} {bytes_text(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size]
    return Text(f"{client.device}, {client.predicted_phase}: {', '.join(named)}", style="dim")
