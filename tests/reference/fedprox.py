"""Reference: FedProx (arXiv:1812.06127) on LoRA: every client descends its loss plus mu/2 · ‖w − w_t‖².

w is everything that is trained (A, B and the head), w_t what the server sent.  The server averages as in FedAvg.

Mutation "sign": the proximal term is subtracted.
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
    mu: float,
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """The trained LoRA factors and head after `rounds` rounds, `learning_rates` one a round; scale is alpha / rank."""
    linear, blocks = with_lora(scale), range(depth(weights))
    mu = -mu if mutation == "sign" else mu
    now = dict(state)

    def objective(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(logits({**weights, **trained}, ids, blocks, linear), labels)
        for name, tensor in trained.items():
            loss = loss + mu / 2 * ((tensor - now[name]) ** 2).sum()
        return loss

    for r in range(rounds):
        updates = []
        for examples, batches in clients:
            updates.append(Update(examples, local_steps(now, objective, batches[r], learning_rates[r])))
        now = combine(now, updates)
    return now
