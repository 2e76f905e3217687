"""Reference: linear probing: the model stays as it is, the head alone is trained on its last token, FedAvg by examples.

Mutation "axis": the text's first token is pooled instead of its last.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.model import HEAD, Weights, depth, head, hidden_states
from tests.reference.steps import Client, State, Update, combine, cross_entropy, local_steps


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """The trained head after `rounds` rounds, `learning_rates` one a round; `state` holds nothing else."""
    blocks = range(depth(weights))

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        last = hidden_states(weights, ids, blocks)[-1]
        pooled = last[:, :1] if mutation == "axis" else last
        return cross_entropy(head(pooled, {**weights, **trained}), labels)

    now = {HEAD: state[HEAD]}
    for r in range(rounds):
        now = combine(now, [
            Update(examples, local_steps(now, loss, batches[r], learning_rates[r])) for examples, batches in clients
        ])  # fmt: skip
    return now
