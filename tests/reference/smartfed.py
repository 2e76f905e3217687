"""Reference: SmartFed (arXiv:2512.00902): a router per linear map composes rank-one pieces of a pool of LoRAs.

With experts E_i(x) = B_i (A_i x), one for every rank of every LoRA that adapts the map:
y = W_0 x + Σ_{i in TopK(g)} g_i E_i(x), g = softmax(W_router x) over the whole pool. Our reading: alpha_n / r_n is
folded into B, the gates of the top K are not normalised again; the importance of a map is
Σ |W_router (.) dLoss/dW_router|, and the quotas K are shared out in its proportion.

Mutation "renormalised": the gates of the chosen experts are divided by their sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.reference.model import HEAD, Linear, Weights, depth, logits
from tests.reference.steps import AdamW, Batch, Client, State, Update, clipped, combine, cross_entropy

DECAY = 0.9  # of the importances' moving average over the rounds

Pool = Sequence[tuple[Mapping[str, Tensor], float]]
"""The LoRAs: "<linear>.lora_A.weight" (rank, in) and ".lora_B.weight" (out, rank), and alpha; the rank is A's."""


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    pool: Pool,
    total: int,
    smallest: int,
    largest: int,
    recompute_every: int,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """The routers "<linear>.router.weight" (pool size, in) and the head after the rounds.

    state     the head, and routers that do not start from zero
    total     K_total: active experts per token, over all maps; smallest and largest bound each map's own number
    recompute_every  R_e: rounds after which the quotas follow the importances
    """
    experts = experts_of(pool)
    zeros = {router(name): torch.zeros_like(down) for name, (down, _) in experts.items()}
    current = {HEAD: state[HEAD], **zeros, **state}
    sizes = {name: len(down) for name, (down, _) in experts.items()}
    quotas = dict.fromkeys(experts, total // len(experts))
    average: dict[str, float] = {}
    for round_index in range(rounds):
        linear = mixture(experts, quotas, renormalised=mutation == "renormalised")
        updates, importances = [], []
        for examples, batches in clients:
            tensors, importance = train(weights, current, linear, batches[round_index], learning_rates[round_index])
            updates.append(Update(examples, tensors))
            importances.append((examples, importance))
        current = combine(current, updates)
        average = moving_average(average, importances)
        if (round_index + 1) % recompute_every == 0:
            quotas = quotas_of(average, sizes, total, smallest, largest)
    return current


def router(linear_name: str) -> str:
    return f"{linear_name}.router.weight"


def experts_of(pool: Pool) -> dict[str, tuple[Tensor, Tensor]]:
    """For each adapted map, in the order of names: all rows A_i (pool size, in) and columns B_i (out, pool size)."""
    suffix = ".lora_A.weight"
    names = sorted({name.removesuffix(suffix) for lora, _ in pool for name in lora if name.endswith(suffix)})
    experts = {}
    for name in names:
        down, up = [], []
        for lora, alpha in pool:
            if f"{name}{suffix}" in lora:
                rank = len(lora[f"{name}{suffix}"])
                down.append(lora[f"{name}{suffix}"])
                up.append(alpha / rank * lora[f"{name}.lora_B.weight"])
        experts[name] = torch.cat(down, dim=0), torch.cat(up, dim=1)
    return experts


def mixture(experts: Mapping[str, tuple[Tensor, Tensor]], quotas: Mapping[str, int], *, renormalised: bool) -> Linear:
    """W_0 x plus the gated experts, chosen for every token by itself; of equal gates the first in the pool wins."""

    def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
        plain = x @ weights[f"{name}.weight"].T
        if name not in experts:
            return plain
        down, up = experts[name]
        gates = (x @ weights[router(name)].T).softmax(-1)
        chosen = gates.argsort(dim=-1, descending=True, stable=True)[..., : quotas[name]]
        active = gates * torch.zeros_like(gates).scatter(-1, chosen, 1.0)
        if renormalised:
            active = active / active.sum(-1, keepdim=True)
        return plain + (active * (x @ down.T)) @ up.T

    return linear


def train(
    weights: Weights, start: State, linear: Linear, batches: Sequence[Batch], learning_rate: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One client's round: what it trained, and its importances, from the gradients before they are clipped."""
    tensors, optimizer = dict(start), AdamW(learning_rate)
    importances = {name.removesuffix(".router.weight"): 0.0 for name in start if name != HEAD}
    for ids, labels in batches:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        loss = cross_entropy(logits({**weights, **leaves}, ids, range(depth(weights)), linear), labels)
        found = torch.autograd.grad(loss, list(leaves.values()))
        gradients = dict(zip(leaves, found, strict=True))
        for name in importances:
            product = tensors[router(name)] * gradients[router(name)]
            importances[name] += float(product.abs().sum()) / len(batches)
        tensors = optimizer.step(tensors, clipped(gradients))
    return tensors, importances


def moving_average(
    before: Mapping[str, float], received: Sequence[tuple[int, Mapping[str, float]]]
) -> dict[str, float]:
    """The clients' mean weighted by examples, in a moving average that starts with the first value."""
    everyone = sum(examples for examples, _ in received)
    means = {name: sum(n * values[name] for n, values in received) / everyone for name in received[0][1]}
    return {name: DECAY * before.get(name, mean) + (1 - DECAY) * mean for name, mean in means.items()}


def quotas_of(
    importances: Mapping[str, float], sizes: Mapping[str, int], total: int, smallest: int, largest: int
) -> dict[str, int]:
    """K per map: the rounded share of the total within bounds (a pool's size is one), then one by one to the total.

    One is added where the share exceeds the quota most, or taken where it does least; the first name wins a tie.
    """
    names, whole = sorted(importances), sum(importances.values())
    shares = {n: total * importances[n] / whole if whole else total / len(names) for n in names}
    most = {n: min(largest, sizes[n]) for n in names}
    quotas = {n: max(smallest, min(most[n], round(shares[n]))) for n in names}
    while sum(quotas.values()) < total:
        quotas[max((n for n in names if quotas[n] < most[n]), key=lambda n: shares[n] - quotas[n])] += 1
    while sum(quotas.values()) > total:
        quotas[min((n for n in names if quotas[n] > smallest), key=lambda n: shares[n] - quotas[n])] -= 1
    return quotas
