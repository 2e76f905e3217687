"""Reference: FwdLLM (methods.md 7.3): forward gradients on LoRA and head, no back-propagation.

A client leaves its weights as they are. For every mini-batch and perturbation it takes, of some normal directions v,
the one with the largest cosine with the last global gradient (the first one while there is none), and

    jvp = (L(w + h v) − L(w − h v)) / 2h,    g += jvp · v;

it sends g divided by the number of its perturbations. The server has two halves of all updates since its last step,
those at even and those at odd places; ḡ₁ and ḡ₂ are their means by examples, ḡ that of all. Where
‖ḡ₁ − ḡ₂‖² > limit · ‖ḡ₁ + ḡ₂‖² it keeps them, does not step, and asks for twice the perturbations the next time, up to
`patience` times in a row; else w ← w − η_t ḡ. η_t rises over the first T_w of T rounds, (t + 1) / T_w, and then falls,
(T − t) / (T − T_w).

Mutation "one_sided": jvp = (L(w + h v) − L(w)) / 2h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.reference.model import Weights, depth, logits, with_lora
from tests.reference.steps import Batch, Client, State, cross_entropy

Direction = Callable[[int, int, int, int, str, tuple[int, ...]], Tensor]
"""(round, client, local step, the direction's number in it, a tensor's name, its shape) -> v there."""
Draws = Callable[[int, int], State]
"""(local step, the direction's number in it) -> v."""


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    direction: Direction,
    scale: float,
    h: float,
    candidates: int,
    perturbations: int,
    rate: float,
    warmup_rounds: int,
    variance_limit: float,
    patience: int,
    mutation: str | None = None,
) -> tuple[dict[str, Tensor], list[bool]]:
    """LoRA and head after the rounds, and whether the server stepped in each; scale is alpha / rank."""
    w = dict(state)
    last: State | None = None
    updates: list[tuple[int, State]] = []
    asked, stepped = 0, []
    linear = with_lora(scale)

    def loss(trained: State, ids: Tensor, labels: Tensor) -> float:
        return float(cross_entropy(logits({**weights, **trained}, ids, range(depth(weights)), linear), labels))

    for t in range(rounds):
        for index, (examples, batches) in enumerate(clients):
            draws = draws_of(direction, t, index, w)
            count = perturbations * 2**asked
            g = gradient(w, loss, batches[t], draws, last, h, candidates=candidates, count=count, mutation=mutation)
            updates.append((examples, g))
        if len(updates) >= 2 and asked < patience and variance(updates) > variance_limit:
            asked += 1
            stepped.append(False)
            continue
        last = mean(updates)
        eta = rate * ((t + 1) / warmup_rounds if t < warmup_rounds else (rounds - t) / (rounds - warmup_rounds))
        w = {name: w[name] - eta * last[name] for name in w}
        updates, asked = [], 0
        stepped.append(True)
    return w, stepped


def draws_of(direction: Direction, t: int, client: int, w: State) -> Draws:
    """A client's directions in round t, over all that is trained."""

    def draws(step: int, number: int) -> State:
        return {name: direction(t, client, step, number, name, tuple(x.shape)).double() for name, x in w.items()}

    return draws


def gradient(
    w: State,
    loss: Callable[[State, Tensor, Tensor], float],
    batches: Sequence[Batch],
    draws: Draws,
    last: State | None,
    h: float,
    *,
    candidates: int,
    count: int,
    mutation: str | None,
) -> dict[str, Tensor]:
    """One client's forward gradient, of `count` perturbations a step."""
    g = {name: torch.zeros_like(tensor) for name, tensor in w.items()}
    for step, (ids, labels) in enumerate(batches):
        for place in range(count):
            every = [draws(step, place * candidates + number) for number in range(candidates)]
            v = every[0] if last is None else max(every, key=lambda one: cosine(one, last))
            above = loss({n: w[n] + h * v[n] for n in w}, ids, labels)
            below = loss(w if mutation == "one_sided" else {n: w[n] - h * v[n] for n in w}, ids, labels)
            g = {n: g[n] + (above - below) / (2 * h) * v[n] for n in w}
    return {name: tensor / (len(batches) * count) for name, tensor in g.items()}


def mean(updates: Sequence[tuple[int, State]]) -> dict[str, Tensor]:
    """Weighted by examples."""
    total = sum(examples for examples, _ in updates)
    return {name: sum(n / total * g[name] for n, g in updates) for name in updates[0][1]}  # type: ignore[misc]


def variance(updates: Sequence[tuple[int, State]]) -> float:
    """‖ḡ₁ − ḡ₂‖² / ‖ḡ₁ + ḡ₂‖² of the updates at even and at odd places."""
    even, odd = mean(updates[::2]), mean(updates[1::2])
    difference = sum(float(((even[name] - odd[name]) ** 2).sum()) for name in even)
    return difference / sum(float(((even[name] + odd[name]) ** 2).sum()) for name in even)


def cosine(a: State, b: State) -> float:
    """Over all tensors together."""
    dot = sum(float((a[name] * b[name]).sum()) for name in a)
    return dot / (norm(a) * norm(b))


def norm(a: State) -> float:
    return sum(float((tensor**2).sum()) for tensor in a.values()) ** 0.5
