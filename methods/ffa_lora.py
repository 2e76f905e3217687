"""FFA-LoRA: A stays at its random start, so that averaging B averages the products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from methods._lora import LoraMethod
from testbed.method import Client, ModelShape, Order, State, Update

if TYPE_CHECKING:
    from testbed.model.adapters import LoraShape
    from testbed.model.checkpoint import BaseModel
    from testbed.node.workplace import Workplace


@dataclass(frozen=True)
class FFALora(LoraMethod):
    """Every client trains B on all blocks with the common A frozen; only B and the head travel and are averaged.

    Paper: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning" (FFA-LoRA, ICLR 2024,
    arXiv:2403.12313).  Evidence: background knowledge: A frozen at its common random start, B trained and averaged,
    so that the mean of the clients' B A is the mean of their B, times A, exactly.

    Our reading: a task's new head is trained and averaged as in `lora`; A is the start that `lora` draws from the
    run's seed, and a client draws it itself, so that neither direction carries it.
    """

    family: ClassVar[str] = "LoRA, homogeneous"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "B, both ways"

    def lora(self, shape: ModelShape) -> LoraShape:
        from testbed.model.adapters import B

        return replace(super().lora(shape), factors=(B,))

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        from testbed.model.adapters import LORA_A

        sent = {name: tensor for name, tensor in state.tensors.items() if not name.endswith(LORA_A)}
        return [Order(client.index, client.submodel, tensors=sent) for client in clients]

    def work(self, workplace: Workplace) -> Update:
        from testbed.model.adapters import lora_tensors

        built = workplace.build(workplace.job.submodel)
        self.mount(built, lora_tensors(built.shape, self.lora(built.shape), workplace.job.seed))
        built.fill(workplace.tensors)
        return self.train_in("train", workplace, built)
