"""Sparse changes of linear maps: y = W x + D x, where D has trained values at fixed elements and is zero elsewhere.

Values are float32 whatever the base model computes in (float64 where it has that).  Names, for the map "…q_proj":

    …q_proj.sparse      (elements,)        the values
    …q_proj.sparse_at   int64 (elements,)  where they are: indices into W of shape (outputs, inputs), row by row

The elements are drawn from a seed: one in each of as many equal stretches of W, so that whoever knows the seed knows
them.  D is formed only while a map computes: in memory there is one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from testbed.errors import UsageError
from testbed.method import Outfit
from testbed.model import adapters, blocks, initial

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from testbed.method import Linear, ModelShape
    from testbed.model.adapters import LoraShape
    from testbed.model.submodel import Built

SPARSE = "sparse"
PLACES = "sparse_at"


@dataclass(frozen=True)
class SparseShape(Outfit):
    """Trained elements on every map that LoRA of this shape would adapt, as many as that LoRA has parameters there."""

    like: LoraShape

    def trains(self, position: int) -> bool:
        return self.like.trains(position)

    def mount(self, built: Built) -> None:
        mount_sparse(built, self)


def elements(sparse: SparseShape, inputs: int, outputs: int) -> int:
    """How many of a map's elements are trained: as LoRA has, or all."""
    return min(sparse.like.rank * (inputs + outputs), inputs * outputs)


def mount_sparse(built: Built, sparse: SparseShape) -> None:
    """Mount values of zero, at places yet to be filled in, on the matching linear maps of the kept blocks.

    Raises UsageError when no map of the model matches.
    """
    found = False
    for position, block in built.block_modules.items():
        if sparse.trains(position):
            for path, module in list(block.named_modules()):
                if blocks.is_linear(module) and adapters.adapts(sparse.like, path):
                    _mount(module, elements(sparse, *blocks.sizes(module)))
                    found = True
    if not found:
        raise UsageError(f"no linear map of the kept blocks is called {' or '.join(sparse.like.targets)}")


def _mount(linear: nn.Module, count: int) -> None:
    like = next(linear.parameters())
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = torch.zeros(count, device=like.device, dtype=dtype)
    places = torch.zeros(count, device=like.device, dtype=torch.int64)
    linear.register_parameter(SPARSE, nn.Parameter(values))
    linear.register_parameter(PLACES, nn.Parameter(places, requires_grad=False))
    linear.register_forward_hook(_adds)


def _adds(linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    product: Any = _Product.apply
    added: Tensor = product(inputs[0], linear.sparse, linear.sparse_at, output.shape[-1])
    return (output + added).to(output.dtype)


class _Product(torch.autograd.Function):
    """D x; what the backward pass needs of D is formed again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: Tensor, outputs: int) -> Tensor:
        ctx.save_for_backward(x, values, places)
        ctx.outputs = outputs
        return x.to(values.dtype) @ matrix(values, places, (outputs, x.shape[-1])).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, values, places = ctx.saved_tensors
        [gradient] = gradients
        for_x = for_values = None
        if ctx.needs_input_grad[0]:
            for_x = (gradient @ matrix(values, places, (ctx.outputs, x.shape[-1]))).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.shape[-1]).to(values.dtype)
            for_values = (gradient.reshape(-1, ctx.outputs).T @ rows).view(-1)[places]
        return for_x, for_values, None, None


def matrix(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """D of shape (outputs, inputs)."""
    return values.new_zeros(shape[0] * shape[1]).index_copy_(0, places, values).view(shape)


def sparse_tensors(shape: ModelShape, sparse: SparseShape) -> dict[str, Tensor]:
    """Initial values by canonical name, float32: zero, so that the model is unchanged at first."""
    return {
        f"{name}.{SPARSE}": torch.zeros(elements(sparse, linear.inputs, linear.outputs))
        for name, linear in adapters.adapted(shape, sparse.like)
    }


def sparse_places(shape: ModelShape, sparse: SparseShape, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Where the trained elements are: (canonical name, places) of every map in turn."""
    for name, linear in adapters.adapted(shape, sparse.like):
        yield f"{name}.{PLACES}", places_of(name, linear, sparse, seed)


def places_of(name: str, linear: Linear, sparse: SparseShape, seed: int) -> Tensor:
    """The trained elements of one map, in their order: one of each of equal stretches, all of it as likely."""
    whole, count = linear.inputs * linear.outputs, elements(sparse, linear.inputs, linear.outputs)
    edges = np.arange(count + 1, dtype=np.int64) * whole // count
    widths = edges[1:] - edges[:-1]
    draw = initial.generator(seed, f"{name}.{PLACES}").random(count, dtype=np.float32)
    return torch.from_numpy(edges[:-1] + np.minimum((draw * widths).astype(np.int64), widths - 1))


def matrices(
    tensors: Mapping[str, Tensor], shape: ModelShape, sparse: SparseShape, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """(map's name, D) of every map in turn."""
    for name, linear in adapters.adapted(shape, sparse.like):
        places = places_of(name, linear, sparse, seed)
        yield name, matrix(tensors[f"{name}.{SPARSE}"], places, (linear.outputs, linear.inputs))
