"""What the plan says of the cells that are left: the peak of every device, who is refused, and the work.

The plan of a cell does not depend on its seed, and so there is one for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from testbed.errors import TestbedError
from testbed.experiments.cells import FAILED, Standing, waits
from testbed.experiments.forecast import Guess, Known, Work, left, work_of

if TYPE_CHECKING:
    from testbed.experiments.experiment import Cell
    from testbed.prepare import Prepared
    from testbed.run import ClientPlan

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Peak:
    """The predicted need of one device beside its budget; `refused`: why none of its clients takes part."""

    device: str
    needed_bytes: int | None
    budget_bytes: int
    refused: str | None = None

    @property
    def share(self) -> float:
        """Of the budget."""
        return (self.needed_bytes or 0) / self.budget_bytes


@dataclass(frozen=True)
class Outlook:
    """What the plan of a cell says; `error`: why there is none."""

    peaks: tuple[Peak, ...] = ()
    work: Work | None = None
    error: str | None = None

    @property
    def fullest(self) -> Peak | None:
        """The device of those that take part whose budget is used up most."""
        return max((peak for peak in self.peaks if peak.refused is None), key=lambda peak: peak.share, default=None)

    @property
    def refused(self) -> tuple[Peak, ...]:
        return tuple(peak for peak in self.peaks if peak.refused is not None)


@dataclass(frozen=True)
class Forecast:
    """What a cell that is to be run will take."""

    standing: Standing
    outlook: Outlook
    seconds: Guess
    bytes: Guess
    disk_bytes: Guess


def forecasts(
    standings: Sequence[Standing], known: Known, *, retry_failed: bool, say: Callable[[str], None] = lambda _: None
) -> list[Forecast]:
    """Of every cell that would be run now, in their order; `say` is told before each plan, as they take seconds."""
    waiting = [standing for standing in standings if waits(standing, retry_failed=retry_failed)]
    rows = list(dict.fromkeys(standing.cell.row for standing in waiting))
    outlooks: dict[str, Outlook] = {}
    for standing in waiting:
        row = standing.cell.row
        if row not in outlooks:
            say(f"plan {len(outlooks) + 1} of {len(rows)}: {row}")
            outlooks[row] = outlook_of(standing.cell)
    return [_forecast(standing, outlooks[standing.cell.row], known) for standing in waiting]


def outlook_of(cell: Cell) -> Outlook:
    """Settle the plan of a cell; starts nothing but, once per machine, an empty trainer."""
    from testbed.prepare import prepare

    try:
        prepared = prepare(cell.config, cell.inventory)
    except TestbedError as error:
        return Outlook(error=str(error))
    clients = [client.to_json() for client in prepared.plan.clients]
    peaks = {client.device: _peak(client) for client in prepared.plan.clients}
    return Outlook(tuple(peaks.values()), work_of(clients, cell.config, _deployed_bytes(prepared)))


def _peak(client: ClientPlan) -> Peak:
    if client.planned:
        return Peak(client.device, client.predicted_bytes, client.budget_bytes)
    return Peak(client.device, client.needed_bytes, client.budget_bytes, client.reason)


def _deployed_bytes(prepared: Prepared) -> int:
    """Of the base model's own weights that every device is sent once; code and shards are small beside them."""
    shape = prepared.base.shape
    item = _ITEM_BYTES.get(shape.stored_dtype, 4)
    kept = {client.device: client.submodel for client in prepared.plan.taking_part}
    elements = [
        shape.outside_elements + sum(shape.block_elements[position] for position in submodel.positions)
        for submodel in kept.values()
        if submodel is not None
    ]
    return item * sum(elements)


def _forecast(standing: Standing, outlook: Outlook, known: Known) -> Forecast:
    cell = standing.cell
    done = len(standing.run.rounds()) if standing.run is not None and standing.state != FAILED else 0
    figures = known.seconds(cell, outlook.work), known.bytes(cell, outlook.work), known.disk_bytes(cell)
    seconds, traffic, disk = (left(figure, done, cell.config.rounds) for figure in figures)
    if outlook.error is not None:  # it will not run
        seconds = traffic = disk = replace(Guess(), value=0.0, source="planned", of="it cannot be run")
    return Forecast(standing, outlook, seconds, traffic, disk)
