"""Reference: FFA-LoRA (methods.md 7.1, arXiv:2403.12313): A stays at its random start, B and the head are averaged.

Mutation "both": A is trained and averaged too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.model import Weights, depth, logits, with_lora
from tests.reference.steps import Client, State, Update, combine, cross_entropy, local_steps


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    learning_rates: Sequence[float],
    scale: float,
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """A, B and head after `rounds` rounds, `learning_rates` one a round; scale is alpha / rank."""
    linear, blocks = with_lora(scale), range(depth(weights))
    frozen = {} if mutation == "both" else {name: a for name, a in state.items() if name.endswith("lora_A.weight")}

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits({**weights, **frozen, **trained}, ids, blocks, linear), labels)

    now = {name: tensor for name, tensor in state.items() if name not in frozen}
    for r in range(rounds):
        updates = []
        for examples, batches in clients:
            updates.append(Update(examples, local_steps(now, loss, batches[r], learning_rates[r])))
        now = combine(now, updates)
    return {**frozen, **now}
