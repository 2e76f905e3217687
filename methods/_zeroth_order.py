"""What methods share that do without back-propagation: the slope of the loss along a direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from testbed.errors import TestbedError

if TYPE_CHECKING:
    from testbed.model.submodel import Built
    from testbed.task import Batch


def slope(built: Built, batch: Batch, move: Callable[[float], None], h: float) -> tuple[float, float]:
    """(L(w + h v) − L(w − h v)) / 2h, and the two losses' mean; the model is left at w − h v.

    `move` adds that many times v to the model's weights, in place.  Raises TestbedError for a loss that is no number.
    """
    import torch

    losses = []
    for moved in (h, -2 * h):
        move(moved)
        with torch.no_grad():
            losses.append(built.loss(batch).item())
    if not all(map(math.isfinite, losses)):
        raise TestbedError("a loss is not a number; a smaller learning rate may help")
    return (losses[0] - losses[1]) / (2 * h), sum(losses) / 2
