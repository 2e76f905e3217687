"""Trained offsets on the outputs of linear maps and norms: y = W x + b + offset, which trains b, or is one.

Float32 whatever the base model computes in (float64 where it has that), zero at the start.  Names:

    model.layers.3.self_attn.q_proj.offset   (outputs,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from testbed.errors import UsageError
from testbed.method import Outfit
from testbed.model import blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built

OFFSET = "offset"


@dataclass(frozen=True)
class OffsetShape(Outfit):
    """A trained offset on the matching linear maps of every block of the phase, and on norms that have a bias."""

    targets: tuple[str, ...]  # last component of the path of each linear map: ("q_proj", "v_proj")
    norms: bool = True

    def mount(self, built: Built) -> None:
        mount_offsets(built, self)


def mount_offsets(built: Built, offsets: OffsetShape) -> None:
    """Mount offsets of zero on the kept blocks.  Raises UsageError when nothing of the model matches."""
    mounted = 0
    for block in built.block_modules.values():
        for _, module in list(_matching(block, offsets)):
            weight = next(module.parameters())
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            module.register_parameter(
                OFFSET, nn.Parameter(torch.zeros(_outputs(module), dtype=dtype).to(weight.device))
            )
            module.register_forward_hook(_shifts)
            mounted += 1
    if not mounted:
        raise UsageError(f"no linear map of the kept blocks is called {' or '.join(offsets.targets)}")


def _shifts(module: Any, _: Any, output: Tensor) -> Tensor:
    shifted: Tensor = output + module.offset
    return shifted.to(output.dtype)


def offset_tensors(base: BaseModel, offsets: OffsetShape) -> dict[str, Tensor]:
    """Initial offsets of every block by canonical name: zeros, float32."""
    anatomy = blocks.find(blocks.skeleton(base.config, base.task, base.labels, "float32"))
    return {
        f"{anatomy.prefix}.{position}.{path}.{OFFSET}": torch.zeros(_outputs(module))
        for position, block in enumerate(anatomy.blocks)
        for path, module in _matching(block, offsets)
    }


def _matching(block: nn.Module, offsets: OffsetShape) -> Iterator[tuple[str, nn.Module]]:
    for path, module in block.named_modules():
        linear = blocks.is_linear(module) and path.split(".")[-1] in offsets.targets
        norm = offsets.norms and blocks.is_norm(module) and getattr(module, "bias", None) is not None
        if linear or norm:
            yield path, module


def _outputs(module: nn.Module) -> int:
    """How many numbers a linear map, or a norm, gives for one vector."""
    return blocks.sizes(module)[1] if blocks.is_linear(module) else next(module.parameters()).numel()
