"""Reference: federated LoRA (FedIT, arXiv:2305.05644): every client trains it all, the server averages A and B apart.

Mutation "scale": the adapters add twice (alpha / rank) · B A x.
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
    """The trained LoRA factors and head after `rounds` rounds, `learning_rates` one a round; scale is alpha / rank."""
    linear = with_lora(2.0 * scale if mutation == "scale" else scale)
    blocks = range(depth(weights))

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits({**weights, **trained}, ids, blocks, linear), labels)

    now = dict(state)
    for r in range(rounds):
        now = combine(now, [
            Update(examples, local_steps(now, loss, batches[r], learning_rates[r])) for examples, batches in clients
        ])  # fmt: skip
    return now
