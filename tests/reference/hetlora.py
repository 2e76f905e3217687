"""Reference: HETLoRA (methods.md 7.1, arXiv:2401.06432): every client has a rank of its own, and may lower it.

A client of rank r begins with A[:r] and B[:, :r] and descends its loss + penalty · Σ_maps ‖A_tail‖ ‖B_tail‖, the tail
being the ranks from t = max(1, floor(decay · r)) on.  If Σ_maps ‖A_tail‖ ‖B_tail‖ is smaller afterwards than it was at
the start, it sends only the ranks below t, and t is its rank from then on.  The server fills what a client lacks with
zeros and averages with weights S_k / Σ S, S_k = sqrt(Σ_maps ‖B_k A_k‖²), or equal ones where all are 0.  Ranks that no
client of the round has keep their value.  The head's mean is weighted by examples.

Mutation "holders": ranks are averaged over those who have them, instead of with zeros for the others.
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
    penalty: float,
    decay: float,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> tuple[dict[str, Tensor], list[int]]:
    """LoRA and head after the rounds, and every client's rank then; scale is alpha / largest rank, for all clients."""
    now, rank_of = dict(state), list(ranks)
    for r in range(rounds):
        heads, factors = [], []
        for k, (examples, batches) in enumerate(clients):
            start, tail = cut(now, rank_of[k]), max(1, int(decay * rank_of[k]))
            loss = loss_with(weights, scale, penalty, tail)
            trained = local_steps(start, loss, batches[r], learning_rates[r])
            if penalty and tail_product(trained, tail) < tail_product(start, tail):
                rank_of[k], trained = tail, cut(trained, tail)
            heads.append(Update(examples, {HEAD: trained[HEAD]}))
            factors.append(trained)
        head = combine({HEAD: now[HEAD]}, heads)
        now = {**averaged(now, factors, holders=mutation == "holders"), **head}
    return now, rank_of


def maps(tensors: State) -> list[str]:
    """The linear maps that have LoRA."""
    return [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]


def cut(tensors: State, rank: int) -> dict[str, Tensor]:
    """The first ranks, and the head."""
    found = {HEAD: tensors[HEAD]}
    for name in maps(tensors):
        found[f"{name}.lora_A.weight"] = tensors[f"{name}.lora_A.weight"][:rank]
        found[f"{name}.lora_B.weight"] = tensors[f"{name}.lora_B.weight"][:, :rank]
    return found


def tail_product(tensors: State, tail: int) -> Tensor:
    """Σ_maps ‖A_tail‖ ‖B_tail‖."""
    total = torch.zeros((), dtype=torch.float64)
    for name in maps(tensors):
        a, b = tensors[f"{name}.lora_A.weight"][tail:], tensors[f"{name}.lora_B.weight"][:, tail:]
        total = total + a.norm() * b.norm()
    return total


def loss_with(weights: Weights, scale: float, penalty: float, tail: int):
    linear, blocks = with_lora(scale), range(depth(weights))

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        task = cross_entropy(logits({**weights, **trained}, ids, blocks, linear), labels)
        return task + penalty * tail_product(trained, tail)

    return loss


def averaged(now: State, factors: Sequence[State], *, holders: bool) -> dict[str, Tensor]:
    """The zero-padded factors' mean, weighted by the norms of the clients' products."""
    sizes = []
    for own in factors:
        squares = [(own[f"{name}.lora_B.weight"] @ own[f"{name}.lora_A.weight"]).square().sum() for name in maps(own)]
        sizes.append(float(sum(squares)) ** 0.5)
    total = sum(sizes)
    shares = [size / total if total > 0 else 1.0 / len(sizes) for size in sizes]
    found = {}
    for name in maps(now):
        for factor, axis in (("lora_A.weight", 0), ("lora_B.weight", 1)):
            before = now[f"{name}.{factor}"]
            found[f"{name}.{factor}"] = before.clone()
            for i in range(before.shape[axis]):
                place = (i, slice(None)) if axis == 0 else (slice(None), i)
                held = [
                    (share, own[f"{name}.{factor}"][place])
                    for share, own in zip(shares, factors, strict=True)
                    if i < own[f"{name}.{factor}"].shape[axis]
                ]
                if held:
                    weight = sum(share for share, _ in held) if holders else 1.0
                    found[f"{name}.{factor}"][place] = sum(share * value for share, value in held) / weight
    return found
