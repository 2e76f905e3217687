"""Reference: FedDPA-T (arXiv:2403.19211): y = W x + s · [(1 − w) B_g A_g x + w B_p A_p x], global g and personal p.

In every round a client first trains the global adapter and the head with the personal one frozen, then the personal one
with these frozen at what they became, on further batches and with a fresh optimizer.  The server averages the global
adapter and the head; the personal one stays with its client.

Mutation "unweighted": both adapters count fully, whatever w is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.model import Linear, Weights, depth, logits
from tests.reference.steps import Client, Loss, State, Update, combine, cross_entropy, local_steps


def with_both(global_scale: float, personal_scale: float) -> Linear:
    """x Wᵀ + global_scale · (x A_gᵀ) B_gᵀ + personal_scale · (x A_pᵀ) B_pᵀ."""

    def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
        y = x @ weights[f"{name}.weight"].T
        for adapter, scale in (("lora", global_scale), ("personal", personal_scale)):
            y = y + scale * (x @ weights[f"{name}.{adapter}_A.weight"].T) @ weights[f"{name}.{adapter}_B.weight"].T
        return y

    return linear


def run(
    weights: Weights,
    state: State,
    personal: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    steps: int,
    learning_rates: Sequence[float],
    scale: float,
    weight: float,
    mutation: str | None = None,
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The global adapter with the head, and every client's personal adapter; `personal` is what each begins with.

    Of a client's batches of a round the first `steps` are the global adapter's, and all others the personal one's.
    """
    linear = with_both(scale, scale) if mutation == "unweighted" else with_both(scale * (1 - weight), scale * weight)
    blocks = range(depth(weights))

    def beside(frozen: Weights) -> Loss:
        def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(logits({**weights, **frozen, **trained}, ids, blocks, linear), labels)

        return loss

    now, private = dict(state), [dict(personal) for _ in clients]
    for r in range(rounds):
        sent = []
        for k, (examples, batches) in enumerate(clients):
            trained = local_steps(now, beside(private[k]), batches[r][:steps], learning_rates[r])
            private[k] = local_steps(private[k], beside(trained), batches[r][steps:], learning_rates[r])
            sent.append(Update(examples, trained))
        now = combine(now, sent)
    return now, private
