"""Bottleneck adapters behind blocks: h + up(gelu(down h)) on a block's output, with the exact GELU.

Float32 whatever the base model computes in (float64 where it has that), biases included.  Names, for block 3:

    model.layers.3.adapter.down.weight   (bottleneck, hidden)
    model.layers.3.adapter.down.bias     (bottleneck,)
    model.layers.3.adapter.up.weight     (hidden, bottleneck)
    model.layers.3.adapter.up.bias       (hidden,)

An auxiliary branch is made of the adapters of blocks that a submodel does not have: they take what its last block
gives, one after the other, and the model's own final norm and head follow.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import gelu

from testbed.errors import WireError
from testbed.method import Outfit
from testbed.model import initial
from testbed.model.adapters import zero_linear
from testbed.model.surgery import block_list

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from torch import Tensor

    from testbed.method import ModelShape
    from testbed.model.submodel import Built
    from testbed.task import Batch

_BRANCH = "auxiliary_branch"


@dataclass(frozen=True)
class BottleneckShape(Outfit):
    """A trained adapter behind every block of the phase."""

    bottleneck: int

    def mount(self, built: Built) -> None:
        mount_adapters(built, self.bottleneck)


class Bottleneck(nn.Module):
    """h + up(gelu(down h)); zero everywhere until it is filled: it passes h on."""

    def __init__(self, hidden: int, bottleneck: int, like: Tensor) -> None:
        super().__init__()
        self.down = zero_linear(hidden, bottleneck, like, bias=True)
        self.up = zero_linear(bottleneck, hidden, like, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        added: Tensor = self.up(gelu(self.down(hidden.to(self.down.weight.dtype))))
        return (hidden + added).to(hidden.dtype)


def mount_adapters(
    built: Built, bottleneck: int, trained: Collection[int] | None = None, positions: Collection[int] | None = None
) -> None:
    """Mount an adapter behind every kept block, or behind those at `positions`.

    Those at other positions than `trained` (None: all) are frozen.
    """
    for position, block in built.block_modules.items():
        if positions is not None and position not in positions:
            continue
        adapter = Bottleneck(built.shape.hidden, bottleneck, next(block.parameters()))
        adapter.requires_grad_(trained is None or position in trained)
        block.adapter = adapter
        block.register_forward_hook(_adapts)


def _adapts(block: Any, _: Any, output: Any) -> Any:
    return _changed(output, block.adapter)


def mount_branch(built: Built, bottleneck: int, positions: Iterable[int]) -> None:
    """Mount the frozen adapters of blocks that the submodel does not have, beside its blocks: see `both_losses`."""
    like = next(built.model.parameters())
    adapters = {str(position): Bottleneck(built.shape.hidden, bottleneck, like) for position in positions}
    built.model.add_module(_BRANCH, nn.ModuleDict(adapters).requires_grad_(requires_grad=False))


def fill_adapters(built: Built, tensors: Mapping[str, Tensor]) -> None:
    """Fill what is mounted, by canonical name, a branch included; what belongs to neither is passed over.

    Raises WireError for a shape that is not its own.
    """
    built.fill(tensors)
    own = dict(built.model.named_parameters())
    for name, value in tensors.items():
        position, _, rest = name.removeprefix(f"{built.prefix}.").partition(".adapter.")
        target = own.get(f"{_BRANCH}.{position}.{rest}")
        if target is None:
            continue
        if target.shape != value.shape:
            raise WireError(f"tensor {name} has the shape {tuple(value.shape)}, expected {tuple(target.shape)}")
        target.data = value.to(target.device, target.dtype, copy=True)


def both_losses(built: Built, batch: Batch) -> tuple[Tensor, Tensor]:
    """The task's loss on what the last block gives, and on what the branch makes of it.

    The blocks compute once.  For the branch the model's forward runs again with one step in the place of its blocks,
    so that whatever the architecture does around them (masks, final norm, pooling) is done there too.
    """
    found = []
    last = block_list(built)[-1]
    handle = last.register_forward_hook(lambda _, __, output: found.append(output))
    try:
        local = built.loss(batch)
    finally:
        handle.remove()
    with _in_place_of_blocks(built, _Gives(_changed(found[0], _through_branch(built)))):
        return local, built.loss(batch)


def _through_branch(built: Built) -> nn.Module:
    branch: Any = built.model.get_submodule(_BRANCH)
    return nn.Sequential(*branch.values())


def _changed(output: Any, change: nn.Module) -> Any:
    """A block's output with its hidden state changed; some architectures give more beside it."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


class _Gives(nn.Module):
    """A step that gives a known output, whatever goes in."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


@contextmanager
def _in_place_of_blocks(built: Built, module: nn.Module) -> Iterator[None]:
    """Inside, the model's forward walks this one module instead of its blocks."""
    blocks = block_list(built)
    owner, _, name = built.prefix.rpartition(".")
    parent = built.model.get_submodule(owner)
    setattr(parent, name, nn.ModuleList([module]))
    try:
        yield
    finally:
        setattr(parent, name, blocks)


def adapter_tensors(shape: ModelShape, bottleneck: int, seed: int) -> dict[str, Tensor]:
    """Initial adapters of every block by canonical name, float32.

    down is uniform within 1/√hidden and everything else zero, so that the model is unchanged at first.
    """
    tensors = {}
    for position in range(len(shape)):
        prefix = f"{shape.block_prefix}.{position}.adapter"
        down = f"{prefix}.down.weight"
        tensors[down] = initial.uniform((bottleneck, shape.hidden), shape.hidden**-0.5, seed, down)
        tensors[f"{prefix}.down.bias"] = torch.zeros(bottleneck)
        tensors[f"{prefix}.up.weight"] = torch.zeros(shape.hidden, bottleneck)
        tensors[f"{prefix}.up.bias"] = torch.zeros(shape.hidden)
    return tensors
