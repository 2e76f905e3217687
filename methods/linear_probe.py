"""Linear probing: the model stays as it is and only its new head is trained; a lower bound of adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from methods._averaging import AveragingMethod
from testbed.errors import UsageError
from testbed.method import (
    IMAGE_CLASSIFICATION,
    SEQUENCE_CLASSIFICATION,
    STREAMED,
    Client,
    ModelShape,
    Phase,
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


@dataclass(frozen=True)
class LinearProbe(AveragingMethod):
    """Every client trains the task's head on the frozen model's features; the server averages it, by examples.

    The lower bound of ChainFed's tables ("linear probing", arXiv:2604.06819).  Evidence: its name; our reading is that
    the head is all that the checkpoint lacks (a BERT's pooler too), and that the features are those of evaluation,
    without dropout and with a batch norm's stored statistics.  Nothing is kept for a backward pass through the blocks.

    streamed   hold one block at a time and read all of them again at every step: for a device that holds no whole model
    """

    tasks: ClassVar[frozenset[str]] = frozenset({SEQUENCE_CLASSIFICATION, IMAGE_CLASSIFICATION})
    family: ClassVar[str] = "bounds"
    memory: ClassVar[str] = "whole model (or a block), forward only"
    traffic: ClassVar[str] = "the head, both ways"

    streamed: bool = False

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if not shape.head_elements:
            raise UsageError(
                f"linear_probe trains a new head, and this {shape.architecture} checkpoint has its own for "
                f"{work.labels} classes: give it the pretrained model without one"
            )

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        return (
            Phase(
                "train",
                submodel.blocks,
                work.batch_size,
                work.length,
                backward=True,
                streamed=self.streamed,
                trained_elements=shape.head_elements,
            ),
        )

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        return State(base.new_head(seed))

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """Write the head, all that the base model's own folder lacks, as head.safetensors."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(state.tensors), folder / "head.safetensors", metadata={"format": "pt"})

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        built.fill(tensors)

    def work(self, workplace: Workplace) -> Update:
        from testbed.node.training import local_steps, update_of

        work = workplace.job.work
        if self.streamed:
            work = replace(work, holding=STREAMED, checkpointing=False)
        built = workplace.build(workplace.job.submodel, work)
        self.mount(built, workplace.tensors)
        built.model.eval()
        workplace.phase("train")
        trained = local_steps(workplace, built)
        return update_of(workplace, built.trainable(), trained)
