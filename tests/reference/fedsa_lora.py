"""Reference: FedSA-LoRA (methods.md 7.1, arXiv:2410.01463): A and B are trained, only A is averaged.

Every client goes on with its own B and its own head: B is zero and the head the common one before its first round.

Mutation "average_b": B is averaged as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.model import Weights, depth, logits, with_lora
from tests.reference.steps import Client, State, Update, combine, cross_entropy, local_steps


def run(
    weights: Weights,
    shared: State,
    own: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    learning_rates: Sequence[float],
    scale: float,
    mutation: str | None = None,
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The shared A, and every client's own B and head, after the rounds; `own` is what each of them begins with."""
    linear, blocks = with_lora(scale), range(depth(weights))

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits({**weights, **trained}, ids, blocks, linear), labels)

    now, private = dict(shared), [dict(own) for _ in clients]
    for r in range(rounds):
        sent = []
        for k, (examples, batches) in enumerate(clients):
            trained = local_steps({**now, **private[k]}, loss, batches[r], learning_rates[r])
            private[k] = {name: trained[name] for name in own}
            sent.append(Update(examples, {name: trained[name] for name in now}))
        now = combine(now, sent)
        if mutation == "average_b":
            mean = combine(own, [Update(client[0], kept) for client, kept in zip(clients, private, strict=True)])
            for kept in private:
                kept.update({name: b for name, b in mean.items() if name.endswith("lora_B.weight")})
    return now, private
