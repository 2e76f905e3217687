"""No fine-tuning: the base model as it is, the lower bound of every comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from testbed.method import (
    STREAMED,
    Client,
    Method,
    ModelShape,
    Order,
    Phase,
    Received,
    State,
    Submodel,
    Update,
    Workload,
)

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace

_PHASE = "forward"


@dataclass(frozen=True)
class NoFineTuning(Method):
    """Nobody trains: in the first round every participant tells the loss of the untouched model on its own data.

    The zero-shot row of the papers' tables.  A new head, where the task needs one, has its initial values, so that a
    classifier is near chance.  The loss is the mean over the batches that the local steps of another method would
    train on in that round.  The pass is streamed: one block is in memory at a time, so a device that holds no whole
    model takes part too.  Later rounds ask nobody, and no state ever changes.
    """

    learns: ClassVar[bool] = False
    family: ClassVar[str] = "bounds"
    memory: ClassVar[str] = "one block, forward only"
    traffic: ClassVar[str] = "a loss up, once"

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        return (Phase(_PHASE, submodel.blocks, work.batch_size, work.length, backward=False, streamed=True),)

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        return State(base.new_head(seed), {"seed": seed})

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        if round_index > 0:
            return []
        return [Order(client.index, client.submodel, kind=_PHASE, tensors=state.tensors) for client in clients]

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        return state

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """Write the new head, all that the base model's own folder lacks, as head.safetensors."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(state.tensors), folder / "head.safetensors", metadata={"format": "pt"})

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        built.fill(tensors)

    def work(self, workplace: Workplace) -> Update:
        import torch

        work = replace(workplace.job.work, holding=STREAMED, checkpointing=False)
        built = workplace.build(workplace.job.submodel, work)
        self.mount(built, workplace.tensors)
        built.model.eval()
        workplace.phase(_PHASE)
        with torch.no_grad():
            losses = [float(built.loss(batch)) for batch in workplace.batches()]
        return Update(scalars={"loss": sum(losses) / len(losses)}, examples=len(workplace.shard))
