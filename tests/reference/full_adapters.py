"""Reference: all bottleneck adapters and the head trained end to end (ChainFed's upper bound), FedAvg by examples.

Mutation "sign": the adapters subtract, h − up(gelu(down h)).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.model import Weights, depth, logits
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
    """The trained adapters and head after `rounds` rounds, `learning_rates` one a round."""
    sign = -1.0 if mutation == "sign" else 1.0

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        used = {name: sign * tensor if ".adapter.up." in name else tensor for name, tensor in trained.items()}
        return cross_entropy(logits({**weights, **used}, ids, range(depth(weights))), labels)

    now = dict(state)
    for r in range(rounds):
        now = combine(now, [
            Update(examples, local_steps(now, loss, batches[r], learning_rates[r])) for examples, batches in clients
        ])  # fmt: skip
    return now
