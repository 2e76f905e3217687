"""Reference: DevFT (arXiv:2508.00041): LoRA on a shallow model of fused blocks that grows from stage to stage.

DGLG groups blocks of similar weights, DBLF fuses each group around its first block, and what the fused block has learnt
goes back to all of its group. The shift of the similarity to W = (cos + 1) / 2, the order of the fused blocks by anchor
and the fusion of A and B apart are our reading.

Mutation "sign": the differences are subtracted from the anchor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tests.reference.model import Weights, depth, logits, with_lora
from tests.reference.steps import Client, State, Update, combine, cross_entropy, local_steps

Groups = Sequence[Sequence[int]]


def parts(tensors: State, block: int) -> list[str]:
    """The names of a block's tensors without the block's prefix, sorted."""
    prefix = f"model.layers.{block}."
    return sorted(name.removeprefix(prefix) for name in tensors if name.startswith(prefix))


def similarity(weights: Weights, state: State) -> Tensor:
    """W (blocks, blocks): (cos + 1) / 2 of all weights of two blocks, the newest LoRA factors among them."""
    held = {**weights, **state}
    blocks = range(depth(weights))
    flat = torch.stack([
        torch.cat([held[f"model.layers.{block}.{part}"].flatten() for part in parts(held, block)]) for block in blocks
    ])  # fmt: skip
    unit = flat / flat.norm(dim=1, keepdim=True)
    return (unit @ unit.T + 1.0) / 2.0


def partitions(blocks: Sequence[int], count: int) -> Iterator[list[list[int]]]:
    """Every way to part the blocks into `count` non-empty groups."""
    if not blocks:
        yield from [[]] if count == 0 else []
        return
    first, rest = blocks[0], blocks[1:]
    for groups in partitions(rest, count - 1) if count else []:
        yield [[first], *groups]
    for groups in partitions(rest, count):
        for i in range(count):
            yield [*groups[:i], [first, *groups[i]], *groups[i + 1 :]]


def grouped(w: Tensor, count: int) -> list[list[int]]:
    """The groups that k-means seeks: least squared distance to the groups' means, of all partitions.

    Points are the rows of the eigenvectors of D − W's `count` smallest eigenvalues. Groups are ordered by first member.
    """
    points = torch.linalg.eigh(torch.diag(w.sum(1)) - w).eigenvectors[:, :count]

    def spread(groups: list[list[int]]) -> float:
        return sum(float((points[group] - points[group].mean(0)).square().sum()) for group in groups)

    return sorted(sorted(group) for group in min(partitions(range(len(w)), count), key=spread))


def fused(tensors: State, groups: Groups, beta: float) -> dict[str, Tensor]:
    """Each group's θ_anchor + β Σ_j (θ_j − θ_anchor) under its anchor's names; what is of no block as it is."""
    result = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.")}
    for group in groups:
        anchor = min(group)
        for part in parts(tensors, anchor):
            theta = [tensors[f"model.layers.{block}.{part}"] for block in group]
            own = tensors[f"model.layers.{anchor}.{part}"]
            result[f"model.layers.{anchor}.{part}"] = own + beta * sum(other - own for other in theta)
    return result


def written_back(state: State, trained: State, groups: Groups) -> dict[str, Tensor]:
    """The state with each anchor's trained factors in every block of its group, and the trained head."""
    result = {name: trained.get(name, tensor) for name, tensor in state.items()}
    for group in groups:
        for block in group:
            for part in parts(trained, min(group)):
                result[f"model.layers.{block}.{part}"] = trained[f"model.layers.{min(group)}.{part}"]
    return result


def run(
    weights: Weights,
    state: State,
    clients: Sequence[Client],
    rounds_by_stage: Sequence[int],
    *,
    groups_by_stage: Sequence[Groups],
    beta: float,
    scale: float,
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[str, Tensor]:
    """All blocks' LoRA factors and the head after the stages; `learning_rates` one a round, scale alpha / rank."""
    beta = -beta if mutation == "sign" else beta
    now, r = dict(state), 0
    for groups, rounds in zip(groups_by_stage, rounds_by_stage, strict=True):
        blocks = sorted(min(group) for group in groups)
        base, small = fused(weights, groups, beta), fused(now, groups, beta)

        def loss(
            trained: State, ids: Tensor, labels: Tensor, base: Weights = base, blocks: Sequence[int] = blocks
        ) -> Tensor:
            return cross_entropy(logits({**base, **trained}, ids, blocks, with_lora(scale)), labels)

        for _ in range(rounds):
            small = combine(small, [
                Update(examples, local_steps(small, loss, batches[r], learning_rates[r]))
                for examples, batches in clients
            ])  # fmt: skip
            now, r = written_back(now, small, groups), r + 1
    return now
