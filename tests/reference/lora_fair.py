"""Reference: LoRA-FAIR (arXiv:2411.14961): the mean of B is corrected by what means of the factors lose.

With p_k = n_k / Σ n, Ā = Σ p_k A_k, B̄ = Σ p_k B_k and ΔW = Σ p_k B_k A_k, the correction is the ridge regression
ΔB = argmin ‖ΔW − (B̄ + ΔB) Ā‖² + ridge ‖ΔB‖² = (ΔW − B̄ Ā) Āᵀ (Ā Āᵀ + ridge I)⁻¹; the next round begins with
(Ā, B̄ + ΔB).

Mutation "sign": B̄ − ΔB.
"""

from __future__ import annotations

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
    scale: float,
    ridge: float,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """LoRA and head after the rounds; scale is alpha / rank."""
    linear, blocks = with_lora(scale), range(depth(weights))

    def loss(trained: State, ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits({**weights, **trained}, ids, blocks, linear), labels)

    now = dict(state)
    total = sum(examples for examples, _ in clients)
    for r in range(rounds):
        updates = [Update(n, local_steps(now, loss, batches[r], learning_rates[r])) for n, batches in clients]
        now = combine(now, updates)
        for a_name in [name for name in now if name.endswith(".lora_A.weight")]:
            b_name = a_name.replace("lora_A", "lora_B")
            a, b = now[a_name], now[b_name]
            ideal = torch.zeros(len(b), a.shape[1], dtype=torch.float64)
            for update in updates:
                ideal = ideal + update.examples / total * update.tensors[b_name] @ update.tensors[a_name]
            gram = a @ a.T + ridge * torch.eye(len(a), dtype=torch.float64)
            correction = (ideal - b @ a) @ a.T @ torch.linalg.inv(gram)
            now[b_name] = b - correction if mutation == "sign" else b + correction
    return now
