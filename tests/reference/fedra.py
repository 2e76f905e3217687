"""Reference: FedRA (methods.md 7.2): each client trains a random subset of the layers.

Every round and client a uniformly random subset of layers, as large as the client can hold, makes a shallow model in
which LoRA and head are trained; each layer's LoRA is averaged over those who held it, the head over all.

Mutation "everyone_counts": a layer's mean runs over all clients, and who did not hold it counts with the old value.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.model import Weights, logits, with_lora
from tests.reference.steps import Batch, Client, State, Update, combine, cross_entropy, local_steps


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    subsets: Sequence[Sequence[Sequence[int]]],
    scale: float,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """LoRA and head after the rounds; subsets[round][client] are the drawn layers, scale is alpha / rank."""
    current = dict(state)
    for round_index in range(rounds):
        updates = []
        for (examples, batches), subset in zip(clients, subsets[round_index], strict=True):
            start = held(current, subset)
            trained = train(weights, start, sorted(subset), batches[round_index], scale, learning_rates[round_index])
            updates.append(Update(examples, {**current, **trained} if mutation == "everyone_counts" else trained))
        current = combine(current, updates)
    return current


def held(state: State, blocks: Sequence[int]) -> dict[str, Tensor]:
    """What a client with these blocks trains: their LoRA, and what lies outside all blocks (the head)."""
    own = tuple(f"model.layers.{index}." for index in blocks)
    return {name: t for name, t in state.items() if name.startswith(own) or not name.startswith("model.layers.")}


def train(
    weights: Weights,
    start: State,
    blocks: Sequence[int],
    batches: Sequence[Batch],
    scale: float,
    learning_rate: float,
) -> dict[str, Tensor]:
    """One client's round on the model that consists of these blocks alone."""
    linear = with_lora(scale)

    def loss(tensors: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits({**weights, **tensors}, ids, blocks, linear), labels)

    return local_steps(start, loss, batches, learning_rate)
