"""FedProx: federated LoRA whose clients are held near the model that they were sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from methods._lora import LoraMethod
from testbed.errors import UsageError
from testbed.method import ModelShape, Phase, Submodel, Update, Workload

if TYPE_CHECKING:
    from torch.nn import Parameter

    from testbed.node.workplace import Workplace


@dataclass(frozen=True)
class FedProx(LoraMethod):
    """As `lora`, but a client descends its loss plus mu/2 · ‖w − w_t‖², w_t being the values that it was sent.

    Paper: Li et al., "Federated Optimization in Heterogeneous Networks" (MLSys 2020, arXiv:1812.06127).
    Evidence: background knowledge; the paper trains whole networks by SGD and gives mu from 0.001 to 1.

    Our reading: w is all that is trained here, A, B and the head; the term's gradient mu · (w − w_t) joins the loss's
    before the common norm is clipped; the losses that are reported are the task's alone.  The paper's varying amount
    of local work is not part of it: every client does the job's steps.

    mu   weight of the proximal term; 0 is `lora`, bit for bit
    """

    family: ClassVar[str] = "LoRA, homogeneous"
    memory: ClassVar[str] = "whole model, trained through; A and B twice"
    traffic: ClassVar[str] = "A and B, both ways"

    mu: float = 0.01

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if self.mu < 0:
            raise UsageError(f"setting mu={self.mu}: expected at least 0")

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        from testbed.model.adapters import lora_elements

        trained = lora_elements(shape, self.lora(shape), submodel.blocks) + shape.head_elements
        phase = self.train_phase(submodel.blocks, shape, work)
        return (replace(phase, kept_bytes=4 * trained if self.mu else 0),)

    def work(self, workplace: Workplace) -> Update:
        from testbed.node.training import local_steps, update_of

        built = workplace.build(workplace.job.submodel)
        self.mount(built, workplace.tensors)
        workplace.phase("train")
        trained = local_steps(workplace, built, after_backward=self._pull(built.trainable().values()))
        return update_of(workplace, built.trainable(), trained)

    def _pull(self, trainable: Iterable[Parameter]) -> Callable[[], None]:
        """What adds the proximal term's gradient: towards the values that these parameters have now."""
        if not self.mu:
            return lambda: None
        start = [(parameter, parameter.detach().clone()) for parameter in trainable]

        def add() -> None:
            for parameter, sent in start:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - sent, alpha=self.mu)

        return add
