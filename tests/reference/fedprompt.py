"""Reference: FedPrompt (arXiv:2208.12268): soft prompt vectors before every text, trained with the head; FedAvg.

The blocks see [p_1 … p_m, e(x_1) … e(x_n)]; the text's last token is what the head reads. By examples.

Mutation "behind": the prompt stands behind the first token of the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.model import Weights, block, depth, head
from tests.reference.steps import Client, State, Update, combine, cross_entropy, local_steps

PROMPT = "prompt.weight"


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """The trained prompt (tokens, hidden) and head after `rounds` rounds, `learning_rates` one a round."""
    first = 1 if mutation == "behind" else 0

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(prompted(weights, trained, ids, first), labels)

    now = dict(state)
    for r in range(rounds):
        now = combine(now, [
            Update(examples, local_steps(now, loss, batches[r], learning_rates[r])) for examples, batches in clients
        ])  # fmt: skip
    return now


def prompted(weights: Weights, trained: State, ids: Tensor, first: int = 0) -> Tensor:
    """Logits of texts with the prompt before their token `first`."""
    embedded = weights["model.embed_tokens.weight"][ids]
    prompt = trained[PROMPT].expand(len(ids), -1, -1)
    hidden = torch.cat([embedded[:, :first], prompt, embedded[:, first:]], dim=1)
    for index in range(depth(weights)):
        hidden = block(hidden, {**weights, **trained}, index)
    return head(hidden, {**weights, **trained})
