"""Reference: RoLoRA (arXiv:2502.01755): B is trained with A frozen in one round, A with B frozen in the next.

They go on in turns.  The head is trained in every round; what was trained is averaged.

Mutation "stuck": every round trains the factor of the first one.
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
    first: str = "B",
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """A, B and head after `rounds` rounds, `learning_rates` one a round; scale is alpha / rank."""
    linear, blocks = with_lora(scale), range(depth(weights))
    second = {"A": "B", "B": "A"}[first]
    now = dict(state)
    for r in range(rounds):
        still = second if r % 2 == 0 or mutation == "stuck" else first
        frozen = {name: tensor for name, tensor in now.items() if name.endswith(f"lora_{still}.weight")}
        start = {name: tensor for name, tensor in now.items() if name not in frozen}
        fixed = {**weights, **frozen}

        def loss(trained: State, ids: Tensor, labels: Tensor, fixed: Weights = fixed) -> Tensor:
            return cross_entropy(logits({**fixed, **trained}, ids, blocks, linear), labels)

        updates = []
        for examples, batches in clients:
            updates.append(Update(examples, local_steps(start, loss, batches[r], learning_rates[r])))
        now = combine(now, updates)
    return now
