"""FedSA-LoRA: clients share A, and each keeps a B and a head of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from methods._export import export_tensors
from methods._lora import LoraMethod
from testbed.method import (
    EVALUATE,
    Client,
    ModelShape,
    Order,
    Phase,
    Snapshot,
    State,
    Submodel,
    Update,
    Workload,
)

if TYPE_CHECKING:
    from testbed.model.checkpoint import BaseModel
    from testbed.node.workplace import Workplace


@dataclass(frozen=True)
class FedSALora(LoraMethod):
    """Every client trains A and B on all blocks and its head, and sends only A, which is averaged; the rest stays.

    Paper: Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning" (FedSA-LoRA, ICLR 2025,
    arXiv:2410.01463).  Evidence: the official code uploads and averages A alone, by examples; B and the classifier
    stay with their client.  It has RoBERTa-large on GLUE, rank 8, alpha 16, 3 clients, Dirichlet 0.5, 10 local steps,
    batches of 128 and a learning rate of 0.02.

    Our reading: AdamW, as everywhere here.  A client that has trained nothing yet has a zero B and the run's new head.
    Quality is the mean of the clients' own, each with the newest A and what it keeps.  There is no global model: the
    result of a run is A (shared.safetensors), and each client's own part is on its node.
    """

    family: ClassVar[str] = "LoRA, personalized"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "A, both ways; B and head stay"

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        train = self.train_phase(submodel.blocks, shape, work)
        return (train, replace(train, name=EVALUATE, backward=False))

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        from testbed.model.adapters import LORA_A

        state = super().start(base, work, clients, seed, rounds)
        shared = {name: tensor for name, tensor in state.tensors.items() if name.endswith(LORA_A)}
        return replace(state, tensors=shared, scalars={**state.scalars, "seed": seed})

    def snapshots(self, state: State, base: BaseModel) -> Sequence[Snapshot]:
        """What a client has that was never there: A with a zero B and the new head."""
        head = base.new_head(state.scalars["seed"])
        return (Snapshot(Submodel.first(len(base.shape)), {**state.tensors, **head}),)

    def evaluations(self, state: State, base: BaseModel, clients: Sequence[Client]) -> Sequence[Order]:
        return [Order(client.index, client.submodel, EVALUATE, tensors=state.tensors) for client in clients]

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """Write A as shared.safetensors, and shared.json, which says what it is: PEFT knows no adapter without B."""
        export_tensors(
            folder,
            "shared",
            state,
            base,
            work,
            rank=self.rank,
            alpha=self.alpha,
            tensors="lora_A of every adapted map: y = W x + alpha / rank * B A x",
            not_here="each client's own lora_B and head: they never left its node",
        )

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def work(self, workplace: Workplace) -> Update:
        from testbed.model.adapters import LORA_A
        from testbed.node.training import evaluated

        built = workplace.build(workplace.job.submodel)
        self.mount(built, workplace.tensors)
        built.fill(workplace.state or {})
        if workplace.job.kind == EVALUATE:
            workplace.phase(EVALUATE)
            return evaluated(workplace, built)
        update = self.train_in("train", workplace, built)
        shared = {name: part for name, part in update.tensors.items() if name.endswith(LORA_A)}
        own = {name: part.tensor for name, part in update.tensors.items() if name not in shared}
        return replace(update, tensors=shared, state=own)
