"""Reference: FedRolex (methods.md 7.3): HeteroFL with a window that rolls over the channels.

In round t a client with ratio p holds, of an axis of n channels, those with the numbers (t + i) mod n, i < p n, so that
every channel is trained in turn. The stem and each stage have their own n; axes that carry the same channels have the
same n, and therefore the same window.

Mutation "still": the window stays where it is in round 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.reference.heterofl import leading, run_windows
from tests.reference.image_model import Client, Model


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
    window = leading if mutation == "still" else rolling
    return run_windows({**weights, **state}, clients, rounds, ratios, learning_rates, window)


def rolling(round_index: int, width: int, ratio: float) -> list[int]:
    """p n channels from the round's own on, around the end."""
    return [(round_index + i) % width for i in range(int(ratio * width))]
