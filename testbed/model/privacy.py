"""Differential privacy for clients: each update is clipped, and the sum of a round gets noise (DP-FedAvg).

McMahan et al., "Learning Differentially Private Recurrent Language Models" (ICLR 2018, arXiv:1710.06963).  Every client
counts alike, whatever its number of examples; with clip S and noise z, an element that n clients sent becomes

    x + (Σ_k Δ_k min(1, S / ‖Δ_k‖) + z S · normal) / n          Δ_k: client k's change; its norm over all it sent

so that one client's part in a sum is at most S long.  What is promised holds for the state after every round, towards
whoever sees no update: the server itself sees them all.  The noise is drawn from the state it is added to, so that a
run can be repeated: *who knows the run can take it off again*.  It shows what privacy costs, and protects nobody.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from testbed.errors import UsageError
from testbed.model import initial
from testbed.model.combine import regions, state_hash

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from testbed.method import Received


def private_mean(
    current: Mapping[str, Tensor], received: Sequence[Received], clip: float, noise: float
) -> dict[str, Tensor]:
    """The state after a round of clipped updates and noise; what nobody sent keeps its value.

    Sums run in float64, tensor by tensor, in the order of `received`.
    """
    shares = [min(1.0, clip / norm) if (norm := change_norm(current, update)) > 0 else 1.0 for update in received]
    key = state_hash(current, {}) if noise else ""
    return {
        name: _noisy_mean(name, value, list(zip(received, shares, strict=True)), noise * clip, key)
        for name, value in current.items()
    }


def change_norm(current: Mapping[str, Tensor], update: Received) -> float:
    """Euclidean norm of what an update changes, over all tensors that it has."""
    total = 0.0
    for name in update.names:
        part = update.read(name)
        for there, here in regions(part, current[name], f"client {update.client}: {name}"):
            total += float((part.tensor[here].double() - current[name][there].double()).square().sum())
    return math.sqrt(total)


def _noisy_mean(
    name: str, value: Tensor, updates: Sequence[tuple[Received, float]], deviation: float, key: str
) -> Tensor:
    holders = [(update, share) for update, share in updates if name in update.names]
    if not holders:
        return value
    total, count = torch.zeros(value.shape, dtype=torch.float64), torch.zeros(value.shape, dtype=torch.float64)
    for update, share in holders:
        part = update.read(name)
        for there, here in regions(part, value, f"client {update.client}: {name}"):
            total[there] += share * (part.tensor[here].double() - value[there].double())
            count[there] += 1
    if deviation:
        draw = initial.generator(0, f"privacy/{key}/{name}").standard_normal(tuple(value.shape))
        total += deviation * torch.from_numpy(draw).view(value.shape)
    changed = value.double() + total / count.clamp(min=1)
    return torch.where(count > 0, changed, value.double()).to(value.dtype)


def epsilon(noise: float, clients: int, participants: int, rounds: int, delta: float) -> float:
    """ε for that δ, of `rounds` rounds in each of which `participants` of `clients` are drawn without replacement.

    Neighbouring runs differ in the data of one client (replaced by another's), so that a sum differs by at most
    twice the clip.  Rényi accounting by Google's dp-accounting.  Raises UsageError where that is not installed.
    """
    try:
        from dp_accounting import (
            GaussianDpEvent,
            NeighboringRelation,
            SampledWithoutReplacementDpEvent,
            SelfComposedDpEvent,
        )
        from dp_accounting.rdp import RdpAccountant
    except ImportError:
        raise UsageError(
            "a noise above 0 needs the accountant of differential privacy: pip install dp-accounting"
        ) from None
    step = GaussianDpEvent(noise / 2)
    drawn = step if participants >= clients else SampledWithoutReplacementDpEvent(clients, participants, step)
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    accountant.compose(SelfComposedDpEvent(drawn, rounds))
    return float(accountant.get_epsilon(delta))
