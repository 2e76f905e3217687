"""InclusiveFL: every client trains the first blocks, as many as it can hold; momentum comes from the deeper ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from methods._lora import LoraMethod, tensors_of
from testbed.errors import UsageError
from testbed.method import Client, ModelShape, Order, Part, Received, State, Submodel, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel


@dataclass(frozen=True)
class InclusiveFL(LoraMethod):
    """A client that holds c blocks trains LoRA on the first c and the head; a block is averaged over its holders.

    Paper: Liu et al., "No One Left Behind: Inclusive Federated Learning over Heterogeneous Devices" (KDD 2022,
    arXiv:2202.08036).  Evidence: FedRA's official code has it as a baseline: prefixes of the model by capacity, means
    over holders, and, in a version that its run script does not use, momentum distillation: the last block of a small
    model moves by 0.8 times its own change and 0.2 times the mean of the previous changes of the deeper blocks of the
    next larger model.

    Our reading: it is LoRA and the head that are trained; c is the largest that the plan's prediction admits; the
    previous changes are those of the global model in the round before, zero in the first; the next larger model is the
    next larger capacity of the run's clients; tensors are matched by their names inside the block; means are weighted
    by examples.

    momentum   share of the deeper blocks' previous changes in that of a smaller model's last block; 0: none
    """

    family: ClassVar[str] = "LoRA, layers that fit"
    memory: ClassVar[str] = "the first blocks that fit, trained through"
    traffic: ClassVar[str] = "A and B of these blocks, both ways"

    momentum: float = 0.2

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if not 0 <= self.momentum < 1:
            raise UsageError(f"setting momentum={self.momentum}: expected at least 0, below 1")

    def choices(self, shape: ModelShape) -> Iterator[Submodel]:
        yield from (Submodel.first(count) for count in range(len(shape), 0, -1))

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """Scalars: the capacities that there are, and what the names of blocks begin with."""
        capacities = sorted({len(client.submodel.blocks) for client in clients})
        scalars = {"capacities": capacities, "prefix": base.shape.block_prefix}
        return replace(super().start(base, work, clients, seed, rounds), scalars=scalars)

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        submodels = {len(client.submodel.blocks): client.submodel for client in clients}
        sent = {count: tensors_of(state, base.shape, own.positions) for count, own in submodels.items()}
        return [Order(client.index, client.submodel, tensors=sent[len(client.submodel.blocks)]) for client in clients]

    def mean(self, state: State, received: Sequence[Received]) -> dict[str, Tensor]:
        return super().mean(state, [self._distilled(state, update) for update in received])

    def _distilled(self, state: State, update: Received) -> Received:
        """The update, or that of a smaller model with momentum in its last block."""
        from testbed.model.blocks import place

        places = (place(state.scalars["prefix"], name)[0] for name in update.names)
        capacity = 1 + max((position for position in places if position is not None), default=-1)
        larger = next((count for count in state.scalars["capacities"] if count > capacity), None)
        if not self.momentum or not capacity or larger is None:
            return update
        return _Distilled(update, state, range(capacity, larger), self.momentum)

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        """The server keeps the changes of the blocks that some clients hold and others do not."""
        combined = super().combine(state, base, received)
        capacities = state.scalars["capacities"]
        if not self.momentum or len(capacities) < 2:
            return combined
        prefixes = tuple(f"{base.shape.block_prefix}.{position}." for position in range(capacities[0], capacities[-1]))
        deltas = {
            f"delta.{name}": combined.tensors[name] - before
            for name, before in state.tensors.items()
            if name.startswith(prefixes)
        }
        return replace(combined, server={**combined.server, **deltas})

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────


class _Distilled:
    """An update in whose last block the change is mixed with the previous ones of the blocks `deeper`."""

    def __init__(self, update: Received, state: State, deeper: range, momentum: float) -> None:
        self.client: int = update.client
        self.examples: int = update.examples
        self.scalars: Mapping[str, Any] = update.scalars
        self.names: tuple[str, ...] = update.names
        self._update, self._state, self._deeper, self._momentum = update, state, deeper, momentum

    def read(self, name: str) -> Part:
        part, prefix = self._update.read(name), self._state.scalars["prefix"]
        last = f"{prefix}.{self._deeper.start - 1}."
        if not name.startswith(last) or part.ranges is not None:
            return part
        before = self._state.tensors[name].double()
        mixed = before + (1 - self._momentum) * (part.tensor.double() - before)
        inside = name.removeprefix(last)
        deltas = [self._state.server.get(f"delta.{prefix}.{position}.{inside}") for position in self._deeper]
        for delta in deltas:
            if delta is not None and delta.shape == before.shape:
                mixed += self._momentum / len(deltas) * delta.double()
        return Part(mixed)
