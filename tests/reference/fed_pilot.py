"""Reference: Fed-pilot (methods.md 7.1): which layers carry trainable LoRA is chosen under the device's budget.

The whole model computes, with the LoRA of every layer. A client reaches the last D of the L layers and trains
min(D, ceil(share · L)) of them, and the head: those that nobody has trained yet, deeper ones first, and then those of
the highest importance, of equal ones the deeper. A layer's importance is, of the last round in which it was trained,
the mean over the clients that trained it, weighted by examples, of

    Σ (after − before)² / number of elements        over its LoRA tensors.

A layer's LoRA is averaged over those who trained it, the head over all.

Mutation "least": of the layers that were trained before, those of the lowest importance are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from tests.reference.model import Weights, depth, logits, with_lora
from tests.reference.steps import Client, State, Update, combine, cross_entropy, local_steps


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    reaches: Sequence[int],
    share: float,
    scale: float,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """LoRA and head after the rounds; reaches[client] is D, scale is alpha / rank."""
    linear, layers = with_lora(scale), depth(weights)
    sign = -1.0 if mutation == "least" else 1.0
    current, importances = dict(state), {}
    for r in range(rounds):
        updates = []
        for (examples, batches), reach in zip(clients, reaches, strict=True):
            picked = chosen(importances, reach, layers, share, sign)
            start = {name: t for name, t in current.items() if not is_layers(name) or layer(name) in picked}
            frozen = {name: t for name, t in current.items() if name not in start}

            def loss(trained: State, ids: Tensor, labels: Tensor, frozen: State = frozen) -> Tensor:
                return cross_entropy(logits({**weights, **frozen, **trained}, ids, range(layers), linear), labels)

            updates.append(Update(examples, local_steps(start, loss, batches[r], learning_rates[r])))
        for p in range(layers):
            total, weight = 0.0, 0
            for update in updates:
                own = [name for name in update.tensors if is_layers(name) and layer(name) == p]
                if own:
                    squares = sum(float(((update.tensors[name] - current[name]) ** 2).sum()) for name in own)
                    total += update.examples * squares / sum(current[name].numel() for name in own)
                    weight += update.examples
            if weight:
                importances[p] = total / weight
        current = combine(current, updates)
    return current


def chosen(importances: Mapping[int, float], reach: int, layers: int, share: float, sign: float = 1.0) -> list[int]:
    """The layers that a client trains."""
    reached = range(layers - reach, layers)
    new = [p for p in reversed(reached) if p not in importances]
    old = sorted((p for p in reached if p in importances), key=lambda p: (-sign * importances[p], -p))
    return sorted([*new, *old][: math.ceil(share * layers)])


def is_layers(name: str) -> bool:
    return name.startswith("model.layers.")


def layer(name: str) -> int:
    return int(name.split(".")[2])
