"""FedDPA: every client has two adapters, a global one that is averaged and a personal one that it keeps."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from methods._lora import LoraMethod
from testbed.errors import UsageError
from testbed.method import EVALUATE, Client, ModelShape, Order, Outfit, Phase, State, Submodel, Update, Workload

if TYPE_CHECKING:
    from testbed.model.adapters import LoraShape
    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace


@dataclass(frozen=True)
class FedDPA(LoraMethod):
    """y = W x + s · [(1 − w) B_g A_g x + w B_p A_p x]: a job trains the global adapter g, then the personal one p.

    Paper: Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models" (FedDPA, NeurIPS 2024,
    arXiv:2403.19211), the variant FedDPA-T.  Evidence: background knowledge: the global adapter is learnt federally,
    the personal one by each client on top of it, and both are added with weights.

    Our reading: w is the same in training and use, for all clients and inputs (the paper's depends on how near an
    input is to the client's data).  In every job the global adapter and the head are trained while the personal one
    counts but is frozen; then the personal one is, with these frozen at what they became, on the batches that follow
    and with a fresh optimizer.  Both adapters have the same shape, s = alpha / rank.  Quality is the mean of the
    clients' own, each with the newest global adapter and head.  The result of a run is the global adapter at its full
    scale; the personal ones are on their nodes.

    personal_weight   w; at 0 the global adapter is that of `lora`
    personal_steps    local steps of the personal adapter; none: as many as the global one's
    """

    family: ClassVar[str] = "LoRA, personalized"
    memory: ClassVar[str] = "whole model, trained through; two adapters"
    traffic: ClassVar[str] = "A and B, both ways; a second pair stays"

    personal_weight: float = 0.5
    personal_steps: int | None = None

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if not 0 <= self.personal_weight <= 1:
            raise UsageError(f"setting personal_weight={self.personal_weight}: expected a number from 0 to 1")
        if self.personal_steps is not None and self.personal_steps < 1:
            raise UsageError(f"setting personal_steps={self.personal_steps}: expected at least 1, or none")

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        train = replace(self.train_phase(submodel.blocks, shape, work), outfit=self._both(shape))
        return (
            train,
            replace(train, name="personalise", outfit=self._both(shape, personalising=True), trained_elements=0),
            replace(train, name=EVALUATE, backward=False),
        )

    def _both(self, shape: ModelShape, *, personalising: bool = False) -> Both:
        of_all, personal = self.lora(shape), self._personal(shape)
        if personalising:
            return Both(replace(of_all, factors=()), personal)
        return Both(of_all, replace(personal, factors=()))

    def _personal(self, shape: ModelShape) -> LoraShape:
        return replace(self.lora(shape), name="personal")

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def evaluations(self, state: State, base: BaseModel, clients: Sequence[Client]) -> Sequence[Order]:
        return [Order(client.index, client.submodel, EVALUATE, tensors=state.tensors) for client in clients]

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def work(self, workplace: Workplace) -> Update:
        from testbed.node.training import evaluated, local_steps, update_of

        built = workplace.build(workplace.job.submodel)
        self._mount_both(built, workplace)
        if workplace.job.kind == EVALUATE:
            workplace.phase(EVALUATE)
            return evaluated(workplace, built)
        workplace.phase("train")
        update = update_of(workplace, built.trainable(), local_steps(workplace, built))
        _personalise(built)
        workplace.phase("personalise")
        done = workplace.job.steps
        trained = local_steps(workplace, built, steps=range(done, done + (self.personal_steps or done)))
        own = {name: parameter.detach() for name, parameter in built.trainable().items()}
        return replace(update, state=own, scalars={**update.scalars, "personal_loss": trained.loss})

    def _mount_both(self, built: Built, workplace: Workplace) -> None:
        """Both adapters with their weights, the personal one frozen: what the client kept, or a new one."""
        from testbed.model.adapters import lora_tensors, mount_lora

        both = self._both(built.shape)
        mount_lora(built, both.of_all, self.alpha * (1 - self.personal_weight), self.dropout)
        mount_lora(built, both.personal, self.alpha * self.personal_weight, self.dropout)
        built.fill(workplace.tensors)
        built.fill(workplace.state or lora_tensors(built.shape, both.personal, workplace.job.seed))


@dataclass(frozen=True)
class Both(Outfit):
    """Two adapters on the same maps."""

    of_all: LoraShape
    personal: LoraShape

    def trains(self, position: int) -> bool:
        return self.of_all.trains(position) or self.personal.trains(position)

    def mount(self, built: Built) -> None:
        self.of_all.mount(built)
        self.personal.mount(built)


def _personalise(built: Built) -> None:
    """From here on the personal adapter alone is trained; the first optimizer, which refers to itself, is let go of."""
    gc.collect()
    for name, parameter in built.model.named_parameters():
        parameter.requires_grad_(".personal_" in name)
