"""Reference: what the server does with the mean (FedAvgM, arXiv:1909.06335; FedAdam, FedYogi, arXiv:2003.00295), and
clipped updates with every client counting alike (DP-FedAvg, arXiv:1710.06963; its noise is not part of it).

Clients train as in federated LoRA. With the pseudo-gradient Δ = mean − x: FedAvgM has m = β₁ m + Δ and adds rate · m;
FedAdam has m = β₁ m + (1 − β₁) Δ, v = β₂ v + (1 − β₂) Δ², FedYogi v − (1 − β₂) Δ² sign(v − Δ²), both from v = τ², and
they add rate · m / (√v + τ).

Mutations: "sign" steps away from the mean; "examples" weighs clipped updates by examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.model import Weights, depth, logits, with_lora
from tests.reference.steps import Client, State, Update, combine, cross_entropy, local_steps


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    learning_rates: Sequence[float],
    scale: float,
    rule: str,
    rate: float = 1.0,
    momentum: float = 0.9,
    decay: float = 0.99,
    floor: float = 1e-3,
    clip: float = 0.0,
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """The LoRA factors and the head after the rounds."""
    linear, blocks = with_lora(scale), range(depth(weights))

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits({**weights, **trained}, ids, blocks, linear), labels)

    now = dict(state)
    first = {name: torch.zeros_like(tensor) for name, tensor in now.items()}
    second = {name: torch.full_like(tensor, floor**2) for name, tensor in now.items()}
    for r in range(rounds):
        updates = [Update(n, local_steps(now, loss, batches[r], learning_rates[r])) for n, batches in clients]
        mean = combine(now, updates) if not clip else clipped_mean(now, updates, clip, mutation)
        for name, value in list(now.items()):
            delta = mean[name] - value
            if rule == "average":
                now[name] = mean[name]
                continue
            if rule == "fedavgm":
                first[name] = momentum * first[name] + delta
                step = first[name]
            else:
                first[name] = momentum * first[name] + (1 - momentum) * delta
                if rule == "fedadam":
                    second[name] = decay * second[name] + (1 - decay) * delta**2
                else:
                    second[name] = second[name] - (1 - decay) * delta**2 * torch.sign(second[name] - delta**2)
                step = first[name] / (torch.sqrt(second[name]) + floor)
            now[name] = value + (-rate if mutation == "sign" else rate) * step
    return now


def clipped_mean(now: State, updates: Sequence[Update], clip: float, mutation: str | None) -> dict[str, Tensor]:
    """x + the mean of Δ_k · min(1, clip / ‖Δ_k‖), the norm over all tensors of a client."""
    weights = [update.examples if mutation == "examples" else 1 for update in updates]
    mean = {name: tensor.clone() for name, tensor in now.items()}
    for weight, update in zip(weights, updates, strict=True):
        norm = math.sqrt(sum(float(((update.tensors[name] - now[name]) ** 2).sum()) for name in now))
        for name in now:
            mean[name] += weight / sum(weights) * min(1.0, clip / norm) * (update.tensors[name] - now[name])
    return mean
