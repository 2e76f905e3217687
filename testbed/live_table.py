"""A running run, drawn: a head line, and one row per device with its peak against its budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from testbed.job import REFUSED
from testbed.live_view import IDLE, DeviceView, RunView
from testbed.quantities import DASH, bytes_text, number_text, seconds_text

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Widths of terminal from which on a column is shown: what a narrow one cannot hold is left out, not squeezed.
_STEP_FROM, _LOSS_FROM, _CLIENT_FROM, _BYTES_FROM = 46, 56, 66, 92


def render(view: RunView, width: int) -> RenderableType:
    """The whole view for a terminal of this many columns."""
    return Group(_head(view, width), _devices(view, width))


def _head(view: RunView, width: int) -> Text:
    parts = [view.run_id] if width >= _CLIENT_FROM else []
    if view.status != "running":
        parts.append(view.status)
    parts.append(f"round {0 if view.round is None else view.round + 1}/{view.rounds}")
    if view.quality_round is not None:
        parts.append(view.quality_text())
    parts.append(seconds_text(view.elapsed))
    left = view.seconds_left(done=view.round or 0)
    if left is not None and view.status == "running":
        parts.append(f"about {seconds_text(left)} left")
    return Text("  ".join(parts), style="bold", overflow="fold")


def _devices(view: RunView, width: int) -> Table:
    columns = _columns(view, width)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in columns:
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for device in view.devices.values():
        table.add_row(*(cell(device) for cell in columns.values()))
    return table


def _columns(view: RunView, width: int) -> dict[str, Callable[[DeviceView], Text]]:
    """Heading → cell, as many as the width holds."""
    columns: dict[str, Callable[[DeviceView], Text]] = {"Device": lambda device: Text(device.name), "State": _state}
    if width >= _CLIENT_FROM:
        columns["Client"] = lambda device: Text(DASH if device.client is None else str(device.client))
        columns["Round"] = lambda _: Text(DASH if view.round is None else str(view.round + 1))
    if width >= _STEP_FROM:
        columns["Step"] = _step
    if width >= _LOSS_FROM:
        columns["Loss"] = lambda device: Text(number_text(device.loss))
    bar = 20 if width >= _BYTES_FROM else 8
    columns["Peak of budget"] = lambda device: _memory(device, bar, with_bytes=width >= _BYTES_FROM)
    if width >= _BYTES_FROM and any(device.watts is not None for device in view.devices.values()):
        columns["Power"] = lambda device: Text(DASH if device.watts is None else f"{device.watts:.2f} W")
    return columns


def _state(device: DeviceView) -> Text:
    calm = device.state in {IDLE, REFUSED}
    style = "dim" if calm else "yellow" if device.failed and device.step is None else ""
    return Text(device.state, style=style)


def _step(device: DeviceView) -> Text:
    if device.step is None:
        return Text(DASH)
    return Text(f"{device.step}/{device.steps}" if device.steps is not None else str(device.step))


def _memory(device: DeviceView, cells: int, *, with_bytes: bool) -> Text:
    if device.peak_bytes is None or not device.budget_bytes:
        return Text(f"{DASH} of {bytes_text(device.budget_bytes)}" if with_bytes else DASH, style="dim")
    share = device.peak_bytes / device.budget_bytes
    filled = min(cells, round(share * cells))
    style = "red" if share > 1 else "yellow" if share > 0.95 else "green"
    text = Text("█" * filled, style=style).append("░" * (cells - filled), style="dim").append(f" {share:4.0%}")
    both = f"  {bytes_text(device.peak_bytes)} of {bytes_text(device.budget_bytes)}"
    return text.append(both) if with_bytes else text
