"""Reference: SLoRA (arXiv:2308.06522): sparse fine-tuning first, then LoRA that begins with its decomposition.

First stage: y = W x + D x, D zero but for fixed elements of the weight, which are trained with the head and averaged.
Second stage, on the original W: y = W x + scale · B A x, beginning with the best factors of D / scale: with
D / scale = U S Vᵀ, B = U √S and A = √S Vᵀ, cut to the rank.

Mutation "scale": the second stage begins with the factors of D itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.reference.model import HEAD, Weights, depth, logits, with_lora
from tests.reference.steps import Client, State, Update, combine, cross_entropy, local_steps


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    sparse_rounds: int,
    elements: Mapping[str, Tensor],
    rank: int,
    scale: float,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """The trained tensors after the rounds: head, and "<map>.sparse" or LoRA.

    elements   by linear map, which of its weight's elements are trained, counted row by row
    scale      alpha / rank
    """
    blocks = range(depth(weights))

    def sparse_loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        moved = {**weights, HEAD: trained[HEAD]}
        for name, where in elements.items():
            change = dense(weights[f"{name}.weight"], where, trained[f"{name}.sparse"])
            moved[f"{name}.weight"] = weights[f"{name}.weight"] + change
        return cross_entropy(logits(moved, ids, blocks), labels)

    def lora_loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits({**weights, **trained}, ids, blocks, with_lora(scale)), labels)

    now = {HEAD: state[HEAD]}
    now |= {f"{name}.sparse": torch.zeros(len(where), dtype=torch.float64) for name, where in elements.items()}
    for r in range(rounds):
        if r == sparse_rounds:
            begun = {HEAD: now[HEAD]}
            for name, where in elements.items():
                change = dense(weights[f"{name}.weight"], where, now[f"{name}.sparse"])
                change = change if mutation == "scale" else change / scale
                u, s, v = torch.linalg.svd(change, full_matrices=False)
                begun[f"{name}.lora_A.weight"] = s[:rank, None].sqrt() * v[:rank]
                begun[f"{name}.lora_B.weight"] = u[:, :rank] * s[:rank].sqrt()
            now = begun
        loss = sparse_loss if r < sparse_rounds else lora_loss
        now = combine(now, [Update(n, local_steps(now, loss, batches[r], learning_rates[r])) for n, batches in clients])
    return now


def dense(weight: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """D of one map."""
    return torch.zeros(weight.numel(), dtype=weight.dtype).index_put((where,), values).view(weight.shape)
