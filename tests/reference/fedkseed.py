"""Reference: FedKSeed (methods.md 7.3): full-parameter zeroth order with K fixed perturbation seeds.

The model is w = w₀ − Σ_s a_s z_s, z_s the fixed direction of seed s over all parameters. A client rebuilds it and in
each local step picks a seed s and takes

    g = (L(w + ε z_s) − L(w − ε z_s)) / 2ε,    w ← w − η g z_s,

and the server adds Σ_k (n_k / Σ n) Σ_steps η g to a_s. Which seed: s = ⌊K u⌋ for u uniform in [0, 1) from
Random("<run seed>/<round>/<client>/<step>"); in the Pro variant the first s at which Σ_{i ≤ s} |a_i| exceeds
u · Σ_i |a_i|, while any a is not zero.

Mutation "sign": the model is rebuilt as w₀ + Σ_s a_s z_s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor

from tests.reference.model import Weights, depth, logits
from tests.reference.steps import Batch, Client, cross_entropy

Direction = Callable[[int, str, tuple[int, ...]], Tensor]
"""(seed s, a parameter's name, its shape) -> z_s there."""


def run(
    weights: Weights,
    coefficients: Tensor,
    clients: Sequence[Client],
    rounds: int,
    *,
    direction: Direction,
    epsilon: float,
    rates: Sequence[float],
    seed: int,
    pro: bool = False,
    mutation: str | None = None,
) -> Tensor:
    """a (K,) after the rounds; `weights` are w₀, the new head included, and `rates` the η of each round."""
    a = coefficients.clone()
    total = sum(examples for examples, _ in clients)
    for r in range(rounds):
        added = torch.zeros_like(a)
        for index, (examples, batches) in enumerate(clients):
            keys = [f"{seed}/{r}/{index}/{step}" for step in range(len(batches[r]))]
            drawn = [chosen(a, Random(key).random(), pro=pro) for key in keys]
            w = rebuilt(weights, a, direction, mutation)
            for s, step in zip(drawn, steps(w, drawn, batches[r], direction, epsilon, rates[r]), strict=True):
                added[s] += examples / total * step
        a = a + added
    return a


def chosen(a: Tensor, u: float, *, pro: bool) -> int:
    """The seed that a uniform number u stands for."""
    if not pro or not bool(a.any()):
        return int(u * len(a))
    sums = a.double().abs().cumsum(0)
    return int((sums <= u * sums[-1]).sum())


def rebuilt(weights: Weights, a: Tensor, direction: Direction, mutation: str | None = None) -> dict[str, Tensor]:
    """w₀ − Σ_s a_s z_s."""
    sign = 1.0 if mutation == "sign" else -1.0
    found = {name: tensor.clone() for name, tensor in weights.items()}
    for s in range(len(a)):
        if a[s] != 0:
            for name, w in found.items():
                found[name] = w + sign * a[s] * direction(s, name, tuple(w.shape))
    return found


def steps(
    w: dict[str, Tensor],
    drawn: Sequence[int],
    batches: Sequence[Batch],
    direction: Direction,
    epsilon: float,
    rate: float,
) -> list[float]:
    """η g of every local step."""
    taken = []
    for s, (ids, labels) in zip(drawn, batches, strict=True):
        z = {name: direction(s, name, tuple(tensor.shape)).double() for name, tensor in w.items()}
        above, below = (
            cross_entropy(logits({n: w[n] + e * z[n] for n in w}, ids, range(depth(w))), labels)
            for e in (epsilon, -epsilon)
        )
        taken.append(rate * float(above - below) / (2 * epsilon))
        w = {name: w[name] - taken[-1] * z[name] for name in w}
    return taken
