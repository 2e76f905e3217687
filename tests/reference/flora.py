"""Reference: FLoRA (methods.md 7.1, arXiv:2409.05976): the sum of the clients' products goes into the base weights.

Every round each client trains new LoRA of its own rank r_k on the merged model: A the first r_k rows of what is drawn
for the round, B zero.  Then W ← W + Σ_k p_k (alpha / r_k) B_k A_k with p_k = n_k / Σ n, and the head is averaged.

Mutation "noise": p_k goes into both factors, as in a mean of A and B apart.
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
    drawn: Sequence[Mapping[str, Tensor]],
    ranks: Sequence[int],
    alpha: float,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """All weights after the rounds, the head among them; drawn[round] has by linear map the A of the largest rank."""
    model, head = dict(weights), {HEAD: state[HEAD]}
    total = sum(examples for examples, _ in clients)
    for r in range(rounds):
        updates, merged = [], dict(model)
        for (examples, batches), rank in zip(clients, ranks, strict=True):
            start = {**head, **fresh(model, drawn[r], rank)}
            trained = local_steps(start, loss_on(model, alpha / rank), batches[r], learning_rates[r])
            updates.append(Update(examples, {HEAD: trained[HEAD]}))
            share = examples / total
            share = share * share if mutation == "noise" else share
            for name in drawn[r]:
                product = trained[f"{name}.lora_B.weight"] @ trained[f"{name}.lora_A.weight"]
                merged[f"{name}.weight"] = merged[f"{name}.weight"] + share * (alpha / rank) * product
        model, head = merged, combine(head, updates)
    return {**model, **head}


def fresh(model: Weights, drawn: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What a client of this rank begins a round with."""
    start = {}
    for name, a in drawn.items():
        start[f"{name}.lora_A.weight"] = a[:rank]
        start[f"{name}.lora_B.weight"] = torch.zeros(len(model[f"{name}.weight"]), rank, dtype=torch.float64)
    return start


def loss_on(model: Weights, scale: float):
    """The loss of LoRA with this scale on these weights."""
    linear, blocks = with_lora(scale), range(depth(model))

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits({**model, **trained}, ids, blocks, linear), labels)

    return loss
