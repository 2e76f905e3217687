"""ProgFed: the model grows from its first blocks to its whole depth while it is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from methods._lora import tensors_of
from methods._stages import StagedLora, phase_name
from testbed.errors import UsageError
from testbed.method import Client, ModelShape, Order, Received, Snapshot, State, Submodel, Update, Workload

if TYPE_CHECKING:
    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace

_GROW = "grow"
_WARM_UP = "warm up"


@dataclass(frozen=True)
class ProgFed(StagedLora):
    """Stage s of S trains LoRA on the first ceil(L · s / S) of L blocks, with the final norm and the head behind them.

    Paper: Wang et al., "ProgFed: Effective, Communication, and Computation Efficient Federated Learning by Progressive
    Training" (ICML 2022, arXiv:2110.05323).  Evidence: the official code, which trains whole networks: it begins with
    the first block and a temporary head, appends the next block every so many rounds, may train only the newest
    parameters for some rounds, and after that trains all so far; nothing is frozen; 4 stages.

    Our reading, for LoRA on a language model: what grows are the adapted blocks; the final norm and the one head of the
    task stand behind the last block so far, so no temporary head is needed; a step's optimizer is new in every job, as
    the code resets it where the model grows.  What is evaluated is the model grown so far (the whole base model
    before the first stage); a client that cannot hold a stage's model takes no part in it.

    stages            S
    rounds_per_stage  rounds of each stage; empty: equal shares
    warmup_rounds     first rounds of every later stage in which only the adapters of its new blocks, and the head, are
                      trained; 0: none
    """

    family: ClassVar[str] = "LoRA, layers that fit"
    memory: ClassVar[str] = "the stage's first blocks, trained through"
    traffic: ClassVar[str] = "A and B of the stage, both ways"

    warmup_rounds: int = 0

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if self.warmup_rounds < 0:
            raise UsageError(f"setting warmup_rounds={self.warmup_rounds}: expected at least 0")

    def depths(self, blocks: int) -> tuple[int, ...]:
        return tuple(dict.fromkeys(math.ceil(blocks * stage / self.stages) for stage in range(1, self.stages + 1)))

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """Scalars beside those of every method with stages: the rounds of the current stage that had a result."""
        state = super().start(base, work, clients, seed, rounds)
        return State(state.tensors, {**state.scalars, "trained": 0})

    def begin(self, state: State, base: BaseModel, round_index: int) -> State:
        begun = super().begin(state, base, round_index)
        if begun.scalars["stage"] == state.scalars["stage"]:
            return begun
        return State(begun.tensors, {**begun.scalars, "trained": 0})

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        stage = state.scalars["stage"]
        submodel = Submodel.first(self.depth(state, base.shape))
        tensors = tensors_of(state, base.shape, submodel.positions)
        kind = _WARM_UP if stage > 1 and state.scalars["trained"] < self.warmup_rounds else _GROW
        scalars = {"stage": stage}
        return [Order(client.index, submodel, kind=kind, tensors=tensors, scalars=scalars) for client in clients]

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        combined = super().combine(state, base, received)
        return replace(combined, scalars={**combined.scalars, "trained": combined.scalars["trained"] + 1})

    def snapshots(self, state: State, base: BaseModel) -> Sequence[Snapshot]:
        grown = Submodel.first(self.depth(state, base.shape))
        return (Snapshot(grown, tensors_of(state, base.shape, grown.positions)),)

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def work(self, workplace: Workplace) -> Update:
        job = workplace.job
        if job.kind != _WARM_UP:
            return super().work(workplace)
        built = workplace.build(job.submodel)
        self.mount(built, workplace.tensors)
        stage = job.scalars["stage"]
        _freeze(built, self.depths(len(built.shape))[stage - 2])
        return self.train_in(phase_name(stage), workplace, built)


def _freeze(built: Built, blocks: int) -> None:
    """Let the adapters of the first `blocks` blocks be as they are."""
    for position in range(blocks):
        built.block_modules[position].requires_grad_(False)
