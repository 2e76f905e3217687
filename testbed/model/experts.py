"""Rank-one experts on linear maps, and the router that mixes them: y = W x + Σ_{i in top K} g_i · B_i (A_i x).

g = softmax(R x), K experts of each token and map, the first of equal gates.  Experts are frozen; the router is trained.
Both are float32 whatever the base model computes in (float64 where it has that).  Names, for the map "…q_proj":

    …q_proj.experts_A       (experts, inputs)   row i is A_i
    …q_proj.experts_B       (outputs, experts)  column i is B_i, with the scale of the adapter that it comes from
    …q_proj.router.weight   (experts, inputs)   R
    …q_proj.router.quota    int64 ()            K

Every expert is computed and those that a token does not choose are multiplied by 0: a gather of single rows for every
token would cost more than it saves wherever the pool is smaller than the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from testbed.method import Outfit
from testbed.model import blocks
from testbed.model.adapters import zero_linear

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from testbed.model.submodel import Built

EXPERTS_A = "experts_A"
EXPERTS_B = "experts_B"
ROUTER = "router.weight"
QUOTA = "router.quota"


@dataclass(frozen=True)
class MixtureShape(Outfit):
    """Experts and routers on the blocks at `positions`; where blocks have unlike pools, as many as the largest has."""

    experts: tuple[tuple[str, int], ...]  # path of every adapted map in its block, and its number of experts
    positions: tuple[int, ...]

    def trains(self, position: int) -> bool:
        return position in self.positions

    def mount(self, built: Built) -> None:
        for position, block in built.block_modules.items():
            for path, count in self.experts if position in self.positions else ():
                linear = block.get_submodule(path)
                inputs, outputs = blocks.sizes(linear)
                _mount(linear, torch.zeros(count, inputs), torch.zeros(outputs, count), selected=True)


def mount_experts(built: Built, tensors: Mapping[str, Tensor], *, selected: bool) -> None:
    """Mount the experts that `tensors` has for maps of the kept blocks, without a copy where none is needed.

    The routers are zero and admit every expert until `Built.fill`.  With `selected`, the gates of a token's K experts
    are divided by their sum.
    """
    for name in names_of(tensors):
        local = built.local(name)
        if local is not None:
            linear = built.model.get_submodule(local)
            _mount(linear, tensors[f"{name}.{EXPERTS_A}"], tensors[f"{name}.{EXPERTS_B}"], selected=selected)


def names_of(tensors: Iterable[str]) -> list[str]:
    """Linear maps for which a set of tensors has experts."""
    return [name.removesuffix(f".{EXPERTS_A}") for name in tensors if name.endswith(f".{EXPERTS_A}")]


def router_tensors(experts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Routers of zeros for these experts, float32: at first every gate is one over the number of experts."""
    return {f"{name}.{ROUTER}": torch.zeros_like(experts[f"{name}.{EXPERTS_A}"]) for name in names_of(experts)}


def quota_tensors(quotas: Mapping[str, int]) -> dict[str, Tensor]:
    """The numbers of active experts by map, as `Built.fill` takes them."""
    return {f"{name}.{QUOTA}": torch.tensor(quota) for name, quota in quotas.items()}


def _mount(linear: nn.Module, down: Tensor, up: Tensor, *, selected: bool) -> None:
    router = zero_linear(down.shape[1], len(down), next(linear.parameters()))
    router.register_buffer("quota", torch.tensor(len(down), device=router.weight.device))
    linear.register_parameter(EXPERTS_A, nn.Parameter(down.to(router.weight), requires_grad=False))
    linear.register_parameter(EXPERTS_B, nn.Parameter(up.to(router.weight), requires_grad=False))
    linear.router = router
    linear.register_forward_hook(_Mixes(selected=selected))


class _Mixes:
    """The forward hook that adds the gated experts to a linear map's output."""

    def __init__(self, *, selected: bool) -> None:
        self.selected = selected

    def __call__(self, linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = inputs[0].to(linear.experts_A.dtype)
        active = active_gates(linear, hidden, selected=self.selected)
        added: Tensor = (active * (hidden @ linear.experts_A.T)) @ linear.experts_B.T
        return (output + added).to(output.dtype)


def active_gates(linear: Any, hidden: Tensor, *, selected: bool) -> Tensor:
    """The gates of a map, 0 for experts that are not among the token's K largest; (…, experts)."""
    gates: Tensor = linear.router(hidden).softmax(-1)
    active: Tensor = gates * _chosen(gates, linear.router.quota)
    if selected:
        active = active / active.sum(-1, keepdim=True)
    return active


def _chosen(gates: Tensor, quota: Tensor) -> Tensor:
    """1 for the `quota` largest gates of each token, 0 for the others; of equal ones the first wins."""
    order = gates.detach().argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(gates.shape[-1], device=gates.device) < quota
    return torch.zeros_like(order, dtype=gates.dtype).scatter_(-1, order, first.to(gates.dtype).expand_as(order))
