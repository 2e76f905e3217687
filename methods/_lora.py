"""What methods that train LoRA factors share: shape, initial state, one client's training, the PEFT folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from methods._averaging import AveragingMethod
from testbed.errors import UsageError
from testbed.method import (
    Client,
    ModelShape,
    Outfit,
    State,
    Workload,
)

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.adapters import LoraShape
    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraMethod(AveragingMethod):
    """LoRA on the linear maps of the kept blocks, and on the task's head where it has a new one.

    rank      r of the LoRA paper (arXiv:2106.09685): factors A (r × inputs) and B (outputs × r)
    alpha     scale: the adapter adds (alpha / rank) · B A x
    dropout   on the adapter's input, in training
    targets   last component of the names of the adapted maps ("q_proj", …), or "all-linear"
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)

    def lora(self, shape: ModelShape) -> LoraShape:
        """The adapters' shape on this model; every target named."""
        from testbed.model.adapters import LoraShape

        return LoraShape(self.rank, named_targets(self.targets, shape), dropout=self.dropout > 0)

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if self.rank < 1:
            raise UsageError(f"setting rank={self.rank}: expected at least 1")
        check_targets(self.targets, shape)

    def outfit(self, shape: ModelShape) -> Outfit | None:
        return self.lora(shape)

    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        from testbed.model.adapters import lora_tensors

        return State({**lora_tensors(base.shape, self.lora(base.shape), seed), **base.new_head(seed)})

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        from testbed.model.adapters import export_peft

        export_peft(folder, base, state.tensors, self.lora(base.shape), self.alpha, self.dropout, work)

    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        from testbed.model.adapters import mount_lora

        mount_lora(built, self.lora(built.shape), self.alpha, self.dropout)
        built.fill(tensors)


def named_targets(targets: tuple[str, ...], shape: ModelShape) -> tuple[str, ...]:
    """The setting `targets` with every linear map named."""
    names = tuple(dict.fromkeys(linear.path.split(".")[-1] for block in shape.blocks for linear in block))
    return names if targets == (ALL_LINEAR,) else targets


def check_targets(targets: tuple[str, ...], shape: ModelShape) -> None:
    """Raise UsageError where one of them is no linear map of this model's blocks."""
    known = set(named_targets((ALL_LINEAR,), shape))
    if unknown := set(targets) - known - {ALL_LINEAR}:
        raise UsageError(
            f"setting targets={','.join(targets)}: {min(unknown)!r} is no linear map of a "
            f"{shape.architecture} block; there are {', '.join(sorted(known))} (or {ALL_LINEAR})"
        )


def tensors_of(state: State, shape: ModelShape, positions: Sequence[int]) -> dict[str, Tensor]:
    """The state's tensors that lie in these blocks, and those outside all blocks."""
    kept = tuple(f"{shape.block_prefix}.{position}." for position in positions)
    return {
        name: tensor
        for name, tensor in state.tensors.items()
        if name.startswith(kept) or not name.startswith(f"{shape.block_prefix}.")
    }


def random_positions(blocks: int, count: int, key: str) -> list[int]:
    """`count` of the positions 0…blocks - 1 in their order, each subset as likely as another; the same for one key."""
    return sorted(Random(key).sample(range(blocks), count))
