"""Fed-pilot: the device's budget says how far back-propagation reaches, importance which layers there are trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from methods._lora import LoraMethod
from testbed.errors import UsageError
from testbed.method import Client, ModelShape, Order, Outfit, Phase, Received, State, Submodel, Update, Workload

if TYPE_CHECKING:
    from testbed.model.adapters import LoraShape
    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace


@dataclass(frozen=True)
class ChosenLayers(Outfit):
    """LoRA on every block, trained at the positions `chosen` and frozen elsewhere."""

    lora: LoraShape
    chosen: tuple[int, ...]

    def trains(self, position: int) -> bool:
        return position in self.chosen

    def mount(self, built: Built) -> None:
        self.mount_with(built, 1.0, 0.1 if self.lora.dropout else 0.0)

    def mount_with(self, built: Built, alpha: float, dropout: float) -> None:
        """Frozen factors drop nothing out."""
        from testbed.model.adapters import mount_lora

        frozen = tuple(position for position in built.submodel.positions if position not in self.chosen)
        mount_lora(built, replace(self.lora, positions=self.chosen), alpha, dropout)
        if frozen:
            mount_lora(built, replace(self.lora, positions=frozen, factors=()), alpha, 0.0)


@dataclass(frozen=True)
class FedPilot(LoraMethod):
    """The whole model computes with all LoRA; of the layers that a client can reach, the most important are trained.

    Paper: Zhang et al., "Fed-pilot: Optimizing LoRA Allocation for Efficient Federated Fine-Tuning with Heterogeneous
    Clients" (arXiv:2410.10200).  Evidence: the abstract, and background knowledge: the base model is loaded whole;
    which LoRA modules a client trains is a knapsack problem, of their value under its memory; an aggregation rule
    makes up for layers that were updated too little.  The value's formula and that rule were not available:
    here a layer is averaged over those who trained it.

    Our reading: the budget gives the reach D: gradients go down to the last D of the L blocks and no lower, so that
    nothing of the blocks below is kept for them.  Of the layers in reach a client trains at most ceil(share · L), and
    the head; the server chooses them: layers that nobody has trained yet, deeper ones first, then those of the highest
    importance, of equal ones the deeper.  A layer's importance is the clients' mean squared change of its LoRA, per
    element, in the last round in which it was trained.  Means are weighted by examples.

    share   of the model's layers, how many a client trains at most
    """

    family: ClassVar[str] = "LoRA, layers that fit"
    memory: ClassVar[str] = "whole model, its last blocks trained through"
    traffic: ClassVar[str] = "A and B of all down, of the chosen layers up"

    share: float = 0.5

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def leaks(self) -> str:
        return "which layers are trained follows from the updates without noise" if self.share < 1 else ""

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if not 0 < self.share <= 1:
            raise UsageError(f"setting share={self.share}: expected more than 0, at most 1")

    def choices(self, shape: ModelShape) -> Iterator[Submodel]:
        """All blocks, of which the last D can be trained."""
        blocks = len(shape)
        for reach in range(blocks, 0, -1):
            yield replace(Submodel.first(blocks), trained=tuple(range(blocks - reach, blocks)))

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        """With the lowest layer in reach, and the highest beside it: everything above the lowest is kept."""
        reach = _reach(submodel)
        highest = reach[1:][max(0, len(reach) - self._count(shape)) :]
        outfit = ChosenLayers(self.lora(shape), (reach[0], *highest))
        return (replace(self.train_phase(submodel.blocks, shape, work), outfit=outfit),)

    def _count(self, shape: ModelShape) -> int:
        """How many layers a client trains at most; at least one."""
        return math.ceil(self.share * len(shape) - 1e-9)

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """Scalars: the importance of every layer that was trained, by position."""
        return replace(super().start(base, work, clients, seed, rounds), scalars={"importances": {}})

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        count, importances = self._count(base.shape), state.scalars["importances"]
        return [
            Order(
                client.index,
                replace(client.submodel, trained=chosen(importances, _reach(client.submodel), count)),
                tensors=state.tensors,
            )
            for client in clients
        ]

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        found = {
            str(p): _importance(state, f"{base.shape.block_prefix}.{p}.", received) for p in range(len(base.shape))
        }
        new = {position: value for position, value in found.items() if value is not None}
        scalars = {"importances": {**state.scalars["importances"], **new}}
        return replace(super().combine(state, base, received), scalars=scalars)

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def work(self, workplace: Workplace) -> Update:
        submodel = workplace.job.submodel
        built = workplace.build(submodel)
        ChosenLayers(self.lora(built.shape), _reach(submodel)).mount_with(built, self.alpha, self.dropout)
        built.fill(workplace.tensors)
        return self.train_in("train", workplace, built)


def chosen(importances: Mapping[str, float], reach: Sequence[int], count: int) -> tuple[int, ...]:
    """Which of the layers in reach a client trains, in their order."""

    def last_is_best(position: int) -> tuple[float, int]:
        return importances.get(str(position), math.inf), position

    return tuple(sorted(sorted(reach, key=last_is_best)[-count:]))


def _reach(submodel: Submodel) -> tuple[int, ...]:
    """The layers that a submodel lets train."""
    return submodel.positions if submodel.trained is None else submodel.trained


def _importance(state: State, prefix: str, received: Sequence[Received]) -> float | None:
    """The mean squared change, per element, of the tensors whose names begin so; None where nobody changed them."""
    total, examples = 0.0, 0
    for update in received:
        names = [name for name in update.names if name.startswith(prefix)]
        squares, elements = 0.0, 0
        for name in names:
            before, part = state.tensors[name].double(), update.read(name)
            if part.ranges is None:
                squares += float((part.tensor.double() - before).square().sum())
                elements += before.numel()
        if elements:
            total += update.examples * squares / elements
            examples += update.examples
    return total / examples if examples else None
