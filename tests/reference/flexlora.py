"""Reference: FlexLoRA (methods.md 7.1, arXiv:2402.11505): products are averaged, and taken apart by their SVD.

Client k trains the first r_k rows of A and columns of B.  The server forms P = Σ_k p_k B_k A_k with p_k = n_k / Σ n for
each map; with P = U S Vᵀ the next B = U √S and A = √S Vᵀ, cut to the largest rank R.  Where P has less rank (a
singular value of at most 1e-6 times the largest), B is zero there and A keeps its row, so that it can be trained.

Mutation "factors": A and B are averaged apart, ranks that a client lacks counting as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    ranks: Sequence[int],
    scale: float,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """LoRA and head after the rounds; scale is alpha / largest rank, for all clients."""
    linear, blocks = with_lora(scale), range(depth(weights))

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits({**weights, **trained}, ids, blocks, linear), labels)

    now = dict(state)
    total = sum(examples for examples, _ in clients)
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    for r in range(rounds):
        sent, heads = [], []
        for (examples, batches), rank in zip(clients, ranks, strict=True):
            start = {HEAD: now[HEAD]}
            for name in names:
                start[f"{name}.lora_A.weight"] = now[f"{name}.lora_A.weight"][:rank]
                start[f"{name}.lora_B.weight"] = now[f"{name}.lora_B.weight"][:, :rank]
            sent.append(local_steps(start, loss, batches[r], learning_rates[r]))
            heads.append(Update(examples, {HEAD: sent[-1][HEAD]}))
        following = combine({HEAD: now[HEAD]}, heads)
        for name in names:
            pairs = [(own[f"{name}.lora_A.weight"], own[f"{name}.lora_B.weight"]) for own in sent]
            shares = [examples / total for examples, _ in clients]
            a, b = now[f"{name}.lora_A.weight"], now[f"{name}.lora_B.weight"]
            a, b = apart(shares, pairs, a, b) if mutation == "factors" else decomposed(shares, pairs, a)
            following |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        now = following
    return now


def decomposed(
    shares: Sequence[float], pairs: Sequence[tuple[Tensor, Tensor]], before: Tensor
) -> tuple[Tensor, Tensor]:
    """The next A and B; `before` is the A that there was."""
    product = sum(share * (b @ a) for share, (a, b) in zip(shares, pairs, strict=True))
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    next_a, next_b = before.clone(), torch.zeros(len(product), len(before), dtype=torch.float64)
    for i in range(min(len(before), len(s))):
        if s[i] > 1e-6 * s[0]:
            next_a[i], next_b[:, i] = s[i].sqrt() * v[i], s[i].sqrt() * u[:, i]
    return next_a, next_b


def apart(
    shares: Sequence[float], pairs: Sequence[tuple[Tensor, Tensor]], a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    mean_a, mean_b = torch.zeros_like(a), torch.zeros_like(b)
    for share, (own_a, own_b) in zip(shares, pairs, strict=True):
        mean_a[: len(own_a)] += share * own_a
        mean_b[:, : len(own_a)] += share * own_b
    return mean_a, mean_b
