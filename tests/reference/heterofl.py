"""Reference: HeteroFL (methods.md 7.3): each client trains a narrower model, the leading channels of every layer.

A client with ratio p holds the first p n of the n channels of every axis; the picture's own channels and the classes
are never cut. The server takes the mean of each element over those who hold it. BatchNorm's weights and running
statistics are cut and averaged like everything else.

Mutation "everyone_counts": an element's mean runs over all clients, and who did not hold it counts with the old value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.reference.image_model import HEAD, HEAD_BIAS, STEM, Client, Model, is_running, local_steps, logits
from tests.reference.steps import Update, combine, cross_entropy

Window = Callable[[int, int, float], list[int]]
"""(round, width n, ratio p) -> the channels that a client holds."""


def run(
    weights: Model,
    state: Model,
    clients: Sequence[Client],
    rounds: int,
    *,
    ratios: Sequence[float],
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """The whole model after the rounds; weights and state together are the model before, ratios[client] is p."""
    everyone = mutation == "everyone_counts"
    return run_windows({**weights, **state}, clients, rounds, ratios, learning_rates, leading, everyone=everyone)


def leading(round_index: int, width: int, ratio: float) -> list[int]:
    """The first p n channels, in every round."""
    return list(range(int(ratio * width)))


def run_windows(
    model: Model,
    clients: Sequence[Client],
    rounds: int,
    ratios: Sequence[float],
    learning_rates: Sequence[float],
    window: Window,
    *,
    everyone: bool = False,
) -> dict[str, Tensor]:
    """The rounds of width-sliced training, whatever the window."""
    current = dict(model)
    for round_index in range(rounds):
        updates = []
        for (examples, batches), ratio in zip(clients, ratios, strict=True):
            places = {name: place(name, current, round_index, ratio, window) for name in current}
            narrow = {name: tensor[places[name]] for name, tensor in current.items()}
            trained = [name for name in narrow if not is_running(name)]
            after = local_steps(narrow, trained, loss, batches[round_index], learning_rates[round_index])
            updates.append(widened(current, after, places, examples, everyone=everyone))
        current = combine(current, updates)
    return current


def loss(model: Model, pixels: Tensor, labels: Tensor, running: dict[str, Tensor]) -> Tensor:
    return cross_entropy(logits(model, pixels, running), labels)


def place(name: str, model: Model, round_index: int, ratio: float, window: Window) -> tuple[Tensor, ...]:
    """The index that cuts a tensor to the client's channels: (outputs, inputs) of a weight, (outputs,) of a vector."""
    channels = [
        torch.tensor(window(round_index, width, ratio) if cut else range(width))
        for cut, width in zip(cut_axes(name), model[name].shape, strict=False)
    ]
    return (channels[0],) if len(channels) == 1 else (channels[0][:, None], channels[1][None, :])


def cut_axes(name: str) -> tuple[bool, ...]:
    """Which of a tensor's first axes are cut: all but the picture's channels and the classes."""
    if name == HEAD_BIAS:
        return (False,)
    if name == HEAD:
        return (False, True)
    if name.endswith(".convolution.weight"):
        return (True, not name.startswith(STEM))
    return (True,)


def widened(
    full: Model, after: Model, places: dict[str, tuple[Tensor, ...]], examples: int, *, everyone: bool
) -> Update:
    """A client's narrow tensors put back to where they were cut from, with the mask of what it holds."""
    tensors, held = {}, {}
    for name, tensor in after.items():
        tensors[name], held[name] = full[name].clone(), torch.zeros_like(full[name], dtype=torch.bool)
        tensors[name][places[name]] = tensor
        held[name][places[name]] = True
    return Update(examples, tensors, {} if everyone else held)
