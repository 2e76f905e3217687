"""Reference: C2A (methods.md 7.3): a hypernetwork makes every block's adapter from the client's label histogram.

With h the share of each class in the client's data, b the adapters' width and m the model's, for block i

    z_i = tanh(P h + e_i)      down_i = H_down z_i as b × m      up_i = H_up z_i as m × b
    block's output x becomes x + up_i gelu(down_i x)

P, all e_i, H_down, H_up and the head are trained and averaged, weighted by examples.

Mutation "uniform": every client uses the histogram in which all classes are alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.model import Weights, depth, logits
from tests.reference.steps import Client, State, Update, combine, cross_entropy, local_steps

CONDITION, EMBEDDINGS, DOWN, UP = (f"hypernetwork.{name}.weight" for name in ("condition", "blocks", "down", "up"))


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    histograms: Sequence[Tensor],
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """Hypernetwork and head after the rounds; histograms[client] sums to 1."""
    current = dict(state)
    for r in range(rounds):
        updates = []
        for (examples, batches), own in zip(clients, histograms, strict=True):
            histogram = torch.full_like(own, 1 / len(own)) if mutation == "uniform" else own

            def loss(trained: State, ids: Tensor, labels: Tensor, histogram: Tensor = histogram) -> Tensor:
                made = adapters(weights, trained, histogram)
                return cross_entropy(logits({**weights, **trained, **made}, ids, range(depth(weights))), labels)

            updates.append(Update(examples, local_steps(current, loss, batches[r], learning_rates[r])))
        current = combine(current, updates)
    return current


def adapters(weights: Weights, state: State, histogram: Tensor) -> dict[str, Tensor]:
    """The adapters that the hypernetwork makes, by the names under which the model uses them."""
    width = weights["model.norm.weight"].shape[0]
    narrow = state[DOWN].shape[0] // width
    made = {}
    for i in range(depth(weights)):
        z = torch.tanh(state[CONDITION] @ histogram + state[EMBEDDINGS][i])
        prefix = f"model.layers.{i}.adapter"
        made[f"{prefix}.down.weight"] = (state[DOWN] @ z).reshape(narrow, width)
        made[f"{prefix}.up.weight"] = (state[UP] @ z).reshape(width, narrow)
        made[f"{prefix}.down.bias"] = torch.zeros(narrow, dtype=torch.float64)
        made[f"{prefix}.up.bias"] = torch.zeros(width, dtype=torch.float64)
    return made
