"""A hypernetwork that makes the bottleneck adapter of every block from how often each class occurs (C2A).

With h the histogram of the classes (their shares), for block i of L

    z_i = tanh(P h + e_i)     down_i = H_down z_i, as b × hidden     up_i = H_up z_i, as hidden × b

and behind the block stands x + up_i gelu(down_i x), with the exact GELU and without biases.  Float32 whatever the base
model computes in (float64 where it has that).  Names, all of them outside the blocks:

    hypernetwork.condition.weight   (condition, labels)       P
    hypernetwork.blocks.weight      (L, condition)            row i is e_i
    hypernetwork.down.weight        (b · hidden, condition)   H_down
    hypernetwork.up.weight          (hidden · b, condition)   H_up

The adapters of all blocks are made at once before the model computes, so that the gradients of the two large maps come
into being once, behind the backward pass through the blocks, and not once for each block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import gelu, linear

from testbed.method import Outfit
from testbed.model import initial
from testbed.model.adapters import zero_linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from testbed.method import ModelShape
    from testbed.model.submodel import Built

_NAME = "hypernetwork"
CONDITION, BLOCKS, DOWN, UP = (f"{_NAME}.{part}.weight" for part in ("condition", "blocks", "down", "up"))


@dataclass(frozen=True)
class HypernetworkShape(Outfit):
    """A hypernetwork for the whole model, and what it makes behind every block of the phase."""

    bottleneck: int
    condition: int

    def mount(self, built: Built) -> None:
        mount_hypernetwork(built, self.bottleneck, self.condition)


class Hypernetwork(nn.Module):
    """Zero everywhere until it is filled: the adapters pass everything on.  Its histogram is uniform until `see`."""

    histogram: Tensor

    def __init__(self, blocks: int, hidden: int, labels: int, like: Tensor, *, bottleneck: int, condition: int) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.condition = zero_linear(labels, condition, like)
        self.blocks = zero_linear(condition, blocks, like)
        self.down = zero_linear(condition, bottleneck * hidden, like)
        self.up = zero_linear(condition, hidden * bottleneck, like)
        uniform = torch.full((labels,), 1 / labels, dtype=self.down.weight.dtype, device=like.device)
        self.register_buffer("histogram", uniform, persistent=False)
        self._made: list[tuple[Tensor, Tensor]] = []

    def see(self, label_counts: Sequence[int]) -> None:
        """Make adapters for data with these numbers of examples of each class."""
        counts = torch.tensor(label_counts, dtype=self.histogram.dtype, device=self.histogram.device)
        self.histogram = counts / counts.sum()

    def make(self) -> None:
        """Make the adapters of all blocks; those of the step before are let go of first."""
        self.forget()
        z = torch.tanh(linear(self.histogram, self.condition.weight) + self.blocks.weight)
        downs = self.down(z).unflatten(1, (self.bottleneck, -1)).unbind()
        ups = self.up(z).unflatten(1, (-1, self.bottleneck)).unbind()
        self._made = list(zip(downs, ups, strict=True))

    def forget(self) -> None:
        """Let go of what was made; not before the backward pass, for a block that is computed again needs it there."""
        self._made = []

    def adapt(self, hidden: Tensor, position: int) -> Tensor:
        """What stands behind the block at `position`."""
        if not self._made:  # whoever calls the backbone alone
            self.make()
        down, up = self._made[position]
        added = linear(gelu(linear(hidden.to(down.dtype), down)), up)
        return (hidden + added).to(hidden.dtype)


def mount_hypernetwork(built: Built, bottleneck: int, condition: int) -> Hypernetwork:
    """Mount a trainable hypernetwork for all blocks of the model, and its adapters behind the kept ones."""
    like = next(built.model.parameters())
    shape = built.shape
    made = Hypernetwork(len(shape), shape.hidden, built.work.labels, like, bottleneck=bottleneck, condition=condition)
    built.model.add_module(_NAME, made)
    built.model.register_forward_pre_hook(lambda *_: made.make())
    for position, block in built.block_modules.items():
        block.register_forward_hook(_Adapts(made, position))
    return made


class _Adapts:
    """The forward hook that changes a block's output."""

    def __init__(self, hypernetwork: Hypernetwork, position: int) -> None:
        self.hypernetwork, self.position = hypernetwork, position

    def __call__(self, _: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.hypernetwork.adapt(output[0], self.position), *output[1:])
        return self.hypernetwork.adapt(output, self.position)


def hypernetwork_tensors(
    shape: ModelShape, labels: int, bottleneck: int, condition: int, seed: int
) -> dict[str, Tensor]:
    """Initial values by canonical name, float32: H_up is zero, so that the model is unchanged at first.

    P is uniform within 1/√labels, every e_i within 1/√condition, H_down within 1/√hidden.
    """
    sizes = {
        CONDITION: ((condition, labels), labels**-0.5),
        BLOCKS: ((len(shape), condition), condition**-0.5),
        DOWN: ((bottleneck * shape.hidden, condition), shape.hidden**-0.5),
    }
    drawn = {name: initial.uniform(size, bound, seed, name) for name, (size, bound) in sizes.items()}
    return {**drawn, UP: torch.zeros(shape.hidden * bottleneck, condition)}
