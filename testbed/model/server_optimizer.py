"""What the server does with the mean of the clients' models: take it, or step towards it with a memory of its own.

The difference between the mean and the present model is a pseudo-gradient Δ.  By element:

    fedavgm   m ← momentum · m + Δ                                       x ← x + rate · m
    fedadam   m ← momentum · m + (1 − momentum) Δ
              v ← decay · v + (1 − decay) Δ²                              x ← x + rate · m / (√v + floor)
    fedyogi   v ← v − (1 − decay) Δ² sign(v − Δ²)                         the rest as fedadam

FedAvgM: Hsu et al., arXiv:1909.06335.  FedAdam, FedYogi: Reddi et al., "Adaptive Federated Optimization" (ICLR 2021,
arXiv:2003.00295), algorithm 2, whose v begins at floor² and whose m is not corrected for its start at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

AVERAGE, FEDAVGM, FEDADAM, FEDYOGI = "average", "fedavgm", "fedadam", "fedyogi"
_MOMENTUM, _SECOND = "momentum.", "second."
#: Statistics of batch normalisation, not parameters: a step along them could make a variance negative.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class ServerOptimizer:
    """One of the rules above, with its constants."""

    kind: str
    rate: float
    momentum: float
    decay: float
    floor: float

    def step(
        self,
        current: Mapping[str, Tensor],
        mean: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        moved: Collection[str],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The next tensors and moments; what is not in `moved` (no client sent it) stays, and so do its moments."""
        tensors, kept = dict(mean), dict(moments)
        for name in moved:
            if name.endswith(_STATISTICS) or not current[name].is_floating_point():
                continue
            value = current[name].double()
            delta = mean[name].double() - value
            first = self.momentum * moments[_MOMENTUM + name].double() if _MOMENTUM + name in moments else 0.0
            momentum = first + (delta if self.kind == FEDAVGM else (1 - self.momentum) * delta)
            step = momentum
            if self.kind != FEDAVGM:
                second = self._second(moments.get(_SECOND + name), delta)
                kept[_SECOND + name] = second.to(current[name].dtype)
                step = momentum / (second.sqrt() + self.floor)
            kept[_MOMENTUM + name] = momentum.to(current[name].dtype)
            tensors[name] = (value + self.rate * step).to(current[name].dtype)
        return tensors, kept

    def _second(self, before: Tensor | None, delta: Tensor) -> Tensor:
        square = delta * delta
        second = torch.full_like(delta, self.floor**2) if before is None else before.double()
        if self.kind == FEDADAM:
            return self.decay * second + (1 - self.decay) * square
        return second - (1 - self.decay) * square * torch.sign(second - square)
