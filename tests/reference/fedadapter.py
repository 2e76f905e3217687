"""Reference: FedAdapter (methods.md 7.3): adapters on the last blocks, made deeper and wider in trials.

A configuration (d, w): adapters of width w on the last d of the L blocks. Every `trial_every`-th round is a trial: the
round's clients train, in turns, the present configuration, a deeper one (min(d + depth_step, L), w) and a wider one
(d, min(2 w, W)); W is the width of the adapters in the state. In other rounds all train the present one. A client's
gain

    (loss of its first local step − loss of its last) / depth of its configuration

is averaged over a configuration's clients; the highest goes on, of equal ones the present, the deeper, the wider. Every
element of the configuration that goes on becomes the mean over those who trained it; the rest stays as it was drawn:
with `up` zero it adds nothing.

Mutation "worst": the configuration of the lowest gain goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.model import Weights, depth, logits
from tests.reference.steps import Batch, Client, State, Update, combine, cross_entropy, local_steps

Configuration = tuple[int, int]


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    first: Configuration,
    depth_step: int,
    trial_every: int,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> tuple[dict[str, Tensor], list[Configuration]]:
    """The state after the rounds, and the configuration with which each round went on."""
    blocks = depth(weights)
    widest = next(t.shape[0] for name, t in state.items() if name.endswith("adapter.down.weight"))
    sign = -1.0 if mutation == "worst" else 1.0
    current, present, found = dict(state), first, []
    for r in range(rounds):
        d, w = present
        tried = [present, (min(d + depth_step, blocks), w), (d, min(2 * w, widest))]
        trial = (r + 1) % trial_every == 0
        updates, gains = [], {one: [] for one in tried}
        for index, (examples, batches) in enumerate(clients):
            own = tried[index % 3] if trial else present
            update, gain = train(weights, current, own, blocks, examples, batches[r], learning_rates[r])
            updates.append(update)
            gains[own].append(gain)
        means = {one: sign * sum(values) / len(values) for one, values in gains.items() if values}
        present = max(means, key=lambda one: means[one])  # the first of equal ones
        mean = combine(current, updates)
        for name, before in current.items():
            mean[name] = torch.where(inside(name, before, present, blocks), mean[name], before)
        current = mean
        found.append(present)
    return current, found


def train(
    weights: Weights,
    state: State,
    own: Configuration,
    blocks: int,
    examples: int,
    batches: Sequence[Batch],
    learning_rate: float,
) -> tuple[Update, float]:
    """One client's round on one configuration: what it sends, at full size, and its gain."""
    held = {name: inside(name, tensor, own, blocks) for name, tensor in state.items()}
    start = {name: tensor[held[name]] for name, tensor in state.items() if bool(held[name].any())}  # flat
    losses = []

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        shaped = {name: tensor.view(cut(state[name], held[name])) for name, tensor in trained.items()}
        value = cross_entropy(logits({**weights, **shaped}, ids, range(blocks)), labels)
        losses.append(float(value.detach()))
        return value

    trained = local_steps(start, loss, batches, learning_rate)
    sent = {name: state[name].clone() for name in trained}
    for name, tensor in trained.items():
        sent[name][held[name]] = tensor
    return Update(examples, sent, held), (losses[0] - losses[-1]) / own[0]


def inside(name: str, tensor: Tensor, own: Configuration, blocks: int) -> Tensor:
    """Which elements of a tensor of the state belong to a configuration; the head does to each."""
    held = torch.zeros(tensor.shape, dtype=torch.bool)
    if not name.startswith("model.layers."):
        return ~held
    if int(name.split(".")[2]) < blocks - own[0]:
        return held
    if ".down." in name:
        held[: own[1]] = True
    elif name.endswith("up.weight"):
        held[:, : own[1]] = True
    else:
        held[:] = True
    return held


def cut(tensor: Tensor, held: Tensor) -> tuple[int, ...]:
    """The shape of the elements that are held: all of some rows, or of some columns."""
    if tensor.dim() == 1:
        return (int(held.sum()),)
    return int(held.any(1).sum()), int(held.any(0).sum())
