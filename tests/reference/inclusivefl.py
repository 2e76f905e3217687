"""Reference: InclusiveFL (methods.md 7.2): a client of capacity c trains the first c layers, and momentum.

A layer's LoRA is averaged over those who held it, the head over all. With momentum m, a client whose capacity c is not
the largest sends as the change of its last layer (position c − 1)

    δ ← (1 − m) · δ + m · mean over p = c … c' − 1 of D_p

c' is the next larger capacity of the run's clients, D_p the change of layer p of the global model in the round before
(zero in the first), tensors matched by their name inside the layer.

Mutation "sign": the deeper layers' changes are taken off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.model import Weights, logits, with_lora
from tests.reference.steps import Client, State, Update, combine, cross_entropy, local_steps


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    capacities: Sequence[int],
    momentum: float,
    scale: float,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """LoRA and head after the rounds; capacities[client] is its number of layers, scale is alpha / rank."""
    linear = with_lora(scale)
    share = -momentum if mutation == "sign" else momentum
    current = dict(state)
    deltas = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for r in range(rounds):
        updates = []
        for (examples, batches), capacity in zip(clients, capacities, strict=True):

            def loss(trained: State, ids: Tensor, labels: Tensor, blocks: range = range(capacity)) -> Tensor:
                return cross_entropy(logits({**weights, **trained}, ids, blocks, linear), labels)

            start = {name: t for name, t in current.items() if layer(name) is None or layer(name) < capacity}
            trained = local_steps(start, loss, batches[r], learning_rates[r])
            larger = sorted(c for c in capacities if c > capacity)
            if larger and momentum:
                for name in trained:
                    if layer(name) != capacity - 1:
                        continue
                    inside = name.removeprefix(f"model.layers.{capacity - 1}.")
                    deeper = [deltas[f"model.layers.{p}.{inside}"] for p in range(capacity, larger[0])]
                    own = trained[name] - current[name]
                    mixed = (1 - momentum) * own + share * sum(deeper) / len(deeper)
                    trained[name] = current[name] + mixed
            updates.append(Update(examples, trained))
        following = combine(current, updates)
        deltas = {name: following[name] - current[name] for name in current}
        current = following
    return current


def layer(name: str) -> int | None:
    """The layer of a tensor; None outside all layers."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None
