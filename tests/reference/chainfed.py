"""Reference: ChainFed (arXiv:2604.06819): a window of adapters that moves through the blocks from round to round.

FOAT chooses the first block that is tuned, DLCT trains Q adapters in a row at a time, GPO adds a loss through the later
adapters alone. Blocks are counted from 0. The token-wise linear CKA, the mean over clients by examples, the window's
schedule and what the global loss trains are our reading.

Mutation "sign": the global loss is subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.model import HEAD, Weights, adapter, depth, head, hidden_states
from tests.reference.steps import Client, State, Update, combine, cross_entropy, local_steps


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of (samples, features) each: ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), the columns centred."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def scores(weights: Weights, state: State, ids: Tensor) -> list[float]:
    """One client's CKA(Z_l, Z_0) by block: its batch's tokens behind block l and its adapter against the embeddings."""
    with torch.no_grad():
        first, *outputs = hidden_states({**weights, **state}, ids, range(depth(weights)))
    return [cka(output.flatten(0, 1), first.flatten(0, 1)) for output in outputs]


def first_tuned(scores_by_client: Sequence[tuple[int, Sequence[float]]], threshold: float) -> int:
    """L_start: the first block whose mean score, weighted by examples, is below T; none: the last; T ≥ 1: the first."""
    if threshold >= 1.0:
        return 0
    blocks = range(len(scores_by_client[0][1]))
    total = sum(examples for examples, _ in scores_by_client)
    means = [sum(examples * one[block] for examples, one in scores_by_client) / total for block in blocks]
    return next((block for block in blocks if means[block] < threshold), blocks[-1])


def window_at(t: int, start: int, window: int, blocks: int) -> range:
    """The blocks m … m + Q − 1 of round t: m = L_start + t mod (L − L_start − Q + 1), Q at most L − L_start."""
    size = min(window, blocks - start)
    first = start + t % (blocks - start - size + 1)
    return range(first, first + size)


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    probes: Sequence[Tensor],
    threshold: float,
    window: int,
    trade_off: float,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """The adapters and the head after `rounds` training rounds, `learning_rates` one each.

    probes      by client, the token ids (batch, length) that its scores are taken on before the first of these rounds
    threshold   T
    window      Q, in adapters
    trade_off   λ
    """
    blocks, now = depth(weights), dict(state)
    trade_off = -trade_off if mutation == "sign" else trade_off
    start = first_tuned(
        [(examples, scores(weights, now, ids)) for (examples, _), ids in zip(clients, probes, strict=True)], threshold
    )

    for t in range(rounds):
        tuned = window_at(t, start, window, blocks)
        frozen = {**weights, **now}

        def loss(trained: State, ids: Tensor, labels: Tensor, frozen: Weights = frozen, tuned: range = tuned) -> Tensor:
            held = {**frozen, **trained}
            hidden = hidden_states(held, ids, range(tuned.stop))[-1]
            local = cross_entropy(head(hidden, held), labels)
            if tuned.stop == blocks:
                return local
            for later in range(tuned.stop, blocks):
                hidden = adapter(hidden, held, f"model.layers.{later}")
            return local + trade_off * cross_entropy(head(hidden, held), labels)

        prefixes = tuple(f"model.layers.{block}.adapter." for block in tuned)
        own = {name: tensor for name, tensor in now.items() if name == HEAD or name.startswith(prefixes)}
        now = combine(now, [
            Update(examples, local_steps(own, loss, batches[t], learning_rates[t])) for examples, batches in clients
        ])  # fmt: skip
    return now
