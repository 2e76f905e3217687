"""Reference: ProgFed (methods.md 7.2): the model grows from its first blocks to its whole depth.

Our reading on LoRA: stage s of S trains the first ceil(L (s+1) / S) blocks, with the final norm and the head right
behind them. All LoRA so far is trained, nothing is frozen again; the stages have equally many rounds.

Mutation "newest_only": a stage trains only the blocks that it adds (and the head), the earlier ones stay frozen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tests.reference.model import Weights, depth, logits, with_lora
from tests.reference.steps import Client, State, Update, combine, cross_entropy, local_steps


def blocks_of_round(round_index: int, rounds: int, stages: int, layers: int) -> int:
    """How many blocks the model has in this round."""
    stage = round_index * stages // rounds
    return math.ceil(layers * (stage + 1) / stages)


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    stages: int,
    scale: float,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """LoRA and head after the rounds; scale is alpha / rank."""
    current, linear = dict(state), with_lora(scale)
    for round_index in range(rounds):
        grown = blocks_of_round(round_index, rounds, stages, depth(weights))
        first = grown - math.ceil(depth(weights) / stages) if mutation == "newest_only" else 0
        prefixes = tuple(f"model.layers.{index}." for index in range(first, grown))
        start = {n: t for n, t in current.items() if n.startswith(prefixes) or not n.startswith("model.layers.")}
        frozen = {**weights, **current}

        def loss(
            tensors: dict[str, Tensor], ids: Tensor, labels: Tensor, grown: int = grown, frozen: Weights = frozen
        ) -> Tensor:
            return cross_entropy(logits({**frozen, **tensors}, ids, range(grown), linear), labels)

        updates = [
            Update(examples, local_steps(start, loss, batches[round_index], learning_rates[round_index]))
            for examples, batches in clients
        ]
        current = combine(current, updates)
    return current
