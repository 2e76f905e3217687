"""What every reference shares: the local training of one client in one round, and the server's mean.

Written out element by element from the formulas, without torch.optim. Imports nothing of the code that it is compared
with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
LARGEST_NORM = 1.0

State = Mapping[str, Tensor]
Batch = tuple[Tensor, Tensor]
"""Token ids (batch, length) and labels (batch,), both int64."""
Client = tuple[int, Sequence[Sequence[Batch]]]
"""A client's number of examples and its batches, by round and by local step."""
Loss = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]
"""(the tensors that are trained, ids, labels) -> the mean loss of the batch."""


@dataclass
class Update:
    """What a client sends: full-size tensors, and for one that it holds in part the mask of what it holds."""

    examples: int
    tensors: dict[str, Tensor]
    held: dict[str, Tensor] = field(default_factory=dict)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The batch's mean of −log softmax at the label."""
    rows = torch.arange(len(labels))
    return (torch.logsumexp(logits, dim=-1) - logits[rows, labels]).mean()


def clipped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients times min(1, 1 / (their common norm + 1e-6))."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
    coefficient = min(1.0, LARGEST_NORM / (norm + 1e-6))
    return {name: coefficient * gradient for name, gradient in gradients.items()}


@dataclass
class AdamW:
    """AdamW without weight decay; a tensor that gets no gradient in a step is left alone, its moments too."""

    learning_rate: float
    moments: dict[str, tuple[int, Tensor, Tensor]] = field(default_factory=dict)

    def step(self, tensors: State, gradients: State) -> dict[str, Tensor]:
        moved = dict(tensors)
        for name, g in gradients.items():
            t, m, v = self.moments.get(name, (0, torch.zeros_like(g), torch.zeros_like(g)))
            t, m, v = t + 1, BETA_1 * m + (1 - BETA_1) * g, BETA_2 * v + (1 - BETA_2) * g * g
            self.moments[name] = t, m, v
            unbiased_m, unbiased_v = m / (1 - BETA_1**t), v / (1 - BETA_2**t)
            moved[name] = tensors[name] - self.learning_rate * unbiased_m / (unbiased_v.sqrt() + EPSILON)
        return moved


def local_steps(start: State, loss: Loss, batches: Sequence[Batch], learning_rate: float) -> dict[str, Tensor]:
    """One client's round: a fresh AdamW, one step per batch, the gradients clipped together."""
    tensors, optimizer = {name: tensor.detach().clone() for name, tensor in start.items()}, AdamW(learning_rate)
    for ids, labels in batches:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        found = torch.autograd.grad(loss(leaves, ids, labels), list(leaves.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
        tensors = optimizer.step(tensors, clipped(gradients))
    return tensors


def combine(state: State, updates: Sequence[Update]) -> dict[str, Tensor]:
    """Per element, the mean over the clients that hold it, weighted by examples; what nobody holds keeps its value."""
    combined = dict(state)
    for name, before in state.items():
        total, weight = torch.zeros_like(before), torch.zeros_like(before)
        for update in updates:
            if name not in update.tensors:
                continue
            held = update.held.get(name, torch.ones_like(before, dtype=torch.bool)).to(before.dtype)
            total = total + update.examples * held * update.tensors[name]
            weight = weight + update.examples * held
        combined[name] = torch.where(weight > 0, total / weight.clamp(min=1), before)
    return combined
