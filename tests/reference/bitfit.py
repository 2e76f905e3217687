"""Reference: BitFit (arXiv:2106.10199) in federated use: biases and the head are trained, FedAvg by examples.

The model has no biases: each projection's is new and zero at the start, y = W x + b; b is "<projection>.offset" (out,).

Mutation "sign": y = W x − b.
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
    """The trained biases and head after `rounds` rounds, `learning_rates` one a round."""
    sign = -1.0 if mutation == "sign" else 1.0

    def linear(x: Tensor, tensors: Weights, name: str) -> Tensor:
        plain = x @ tensors[f"{name}.weight"].T
        return plain + sign * tensors[f"{name}.offset"] if f"{name}.offset" in tensors else plain

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits({**weights, **trained}, ids, range(depth(weights)), linear), labels)

    now = dict(state)
    for r in range(rounds):
        now = combine(now, [
            Update(examples, local_steps(now, loss, batches[r], learning_rates[r])) for examples, batches in clients
        ])  # fmt: skip
    return now
