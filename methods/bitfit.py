"""BitFit: only biases are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from methods._averaging import AveragingMethod
from methods._export import export_tensors
from methods._lora import ALL_LINEAR, check_targets, named_targets
from testbed.method import Client, ModelShape, Outfit, State, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.offsets import OffsetShape
    from testbed.model.submodel import Built


@dataclass(frozen=True)
class BitFit(AveragingMethod):
    """Every client trains the biases of the blocks' linear maps and norms, and the head; the server averages them.

    Paper: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models" (ACL 2022, arXiv:2106.10199); with federated averaging: Sun et al., "Conquering the Communication
    Constraints to Enable Large Pre-Trained Models in Federated Learning" (FedPEFT, arXiv:2210.01708).  Evidence:
    background knowledge; the survey lists bias tuning among its selective methods.

    Our reading: what is trained is an offset, zero at the start, on the output of each linear map.  It is the change of
    the map's bias where it has one, and a new bias where the architecture (Llama) has none.  Of norms only those inside
    blocks that have a bias are changed; the embeddings' and the final one stay as they are.

    targets   last component of the names of the linear maps ("q_proj", …), or "all-linear"
    norms     whether the biases of the blocks' norms are trained too
    """

    family: ClassVar[str] = "selective"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "one value for each output, both ways"

    targets: tuple[str, ...] = (ALL_LINEAR,)
    norms: bool = True

    def offsets(self, shape: ModelShape) -> OffsetShape:
        """What is mounted on this model; every target named."""
        from testbed.model.offsets import OffsetShape

        return OffsetShape(named_targets(self.targets, shape), self.norms)

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        check_targets(self.targets, shape)

    def outfit(self, shape: ModelShape) -> Outfit | None:
        return self.offsets(shape)

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        from testbed.model.offsets import offset_tensors

        return State({**offset_tensors(base, self.offsets(base.shape)), **base.new_head(seed)})

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """Write offsets.safetensors (offsets and new head by canonical name) and offsets.json, which describes it."""
        offset = "of the module before its last dot: added to the module's output, where its bias would be"
        export_tensors(folder, "offsets", state, base, work, offset=offset)

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        from testbed.model.offsets import mount_offsets

        mount_offsets(built, self.offsets(built.shape))
        built.fill(tensors)
