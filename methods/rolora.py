"""RoLoRA: clients train B in one round and A in the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from methods._lora import LoraMethod
from testbed.method import Client, ModelShape, Order, Phase, Received, State, Submodel, Update, Workload

if TYPE_CHECKING:
    from testbed.model.adapters import LoraShape
    from testbed.model.checkpoint import BaseModel
    from testbed.node.workplace import Workplace

_OTHER = {"A": "B", "B": "A"}


@dataclass(frozen=True)
class RoLora(LoraMethod):
    """All clients train one factor on all blocks with the other frozen, B and A in turns, and send what was trained.

    Paper: Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA" (RoLoRA,
    arXiv:2502.01755).  Evidence: background knowledge: the factors alternate from round to round, so that in every
    round the mean of the products is the product of the means.

    Our reading: B is first, because A has no gradient while B is zero; a task's new head is trained in every round;
    a round without result does not count as a turn; every client is sent both factors, as it may not have been there
    in the round before.

    first   factor of the first round
    """

    family: ClassVar[str] = "LoRA, homogeneous"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "A and B down, one of them up"

    first: Literal["B", "A"] = "B"

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        train = self.train_phase(submodel.blocks, shape, work)
        return tuple(replace(train, name=f"train {factor}", outfit=self._only(factor, shape)) for factor in _OTHER)

    def _only(self, factor: str, shape: ModelShape) -> LoraShape:
        return replace(self.lora(shape), factors=(factor,))

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        return replace(super().start(base, work, clients, seed, rounds), scalars={"factor": self.first})

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        turn = {"factor": state.scalars["factor"]}
        return [Order(client.index, client.submodel, tensors=state.tensors, scalars=turn) for client in clients]

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        combined = super().combine(state, base, received)
        return replace(combined, scalars={**combined.scalars, "factor": _OTHER[state.scalars["factor"]]})

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def work(self, workplace: Workplace) -> Update:
        from testbed.model.adapters import mount_lora

        factor = str(workplace.job.scalars["factor"])
        built = workplace.build(workplace.job.submodel)
        mount_lora(built, self._only(factor, built.shape), self.alpha, self.dropout)
        built.fill(workplace.tensors)
        return self.train_in(f"train {factor}", workplace, built)
