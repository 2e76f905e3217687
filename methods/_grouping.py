"""Which blocks do the same thing: linear CKA of their outputs, and spectral clustering of the similarities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RESTARTS = 10
_ITERATIONS = 50


def centred_gram(outputs: Tensor) -> Tensor:
    """H X Xᵀ H of a block's outputs X (samples × hidden): (samples × samples), float64.

    All that linear CKA needs of X, and much smaller than X where the hidden size exceeds the number of samples.
    """
    x = outputs.double()
    x = x - x.mean(dim=0, keepdim=True)
    return x @ x.T


def linear_cka(grams: Sequence[Tensor]) -> Tensor:
    """CKA(i, j) = HSIC(i, j) / √(HSIC(i, i) · HSIC(j, j)) of centred Gram matrices: (blocks × blocks) in [0, 1].

    Linear HSIC, ‖YᵀX‖²_F = ⟨XXᵀ, YYᵀ⟩ (Kornblith et al., arXiv:1905.00414, eq. 3).
    """
    import torch

    flat = torch.stack([gram.flatten() for gram in grams])
    hsic = flat @ flat.T
    scale = hsic.diagonal().clamp_min(torch.finfo(hsic.dtype).tiny).sqrt()
    return (hsic / torch.outer(scale, scale)).clamp(0.0, 1.0)


def spectral_groups(similarity: Tensor, count: int, seed: int) -> list[list[int]]:
    """Partition the nodes of a complete graph into `count` non-empty groups, each sorted, ordered by first member.

    L = D - W (unnormalised Laplacian), rows of the eigenvectors of the `count` smallest eigenvalues, k-means.
    W must be non-negative, or L is not positive semi-definite.
    """
    import torch

    nodes = similarity.shape[0]
    if count >= nodes:
        return [[node] for node in range(nodes)]
    weights = similarity.double().clamp_min(0.0)
    laplacian = torch.diag(weights.sum(dim=1)) - weights
    embedding = torch.linalg.eigh(laplacian).eigenvectors[:, :count]
    labels = _k_means(embedding, count, seed)
    groups = [[node for node in range(nodes) if labels[node] == label] for label in range(count)]
    return sorted(groups, key=min)


def _k_means(points: Tensor, count: int, seed: int) -> list[int]:
    """Labels of the best of several seeded k-means++ starts; no cluster is left empty."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(points, _plus_plus(points, count, generator)) for _ in range(_RESTARTS)]
    best = min(runs, key=lambda run: run[1])
    labels: list[int] = best[0].tolist()
    return labels


def _plus_plus(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Initial centres, each drawn with probability proportional to its squared distance from those before."""
    import torch

    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    for _ in range(count - 1):
        distance = torch.cdist(points, points[chosen]).square().amin(dim=1)
        distance[chosen] = 0.0
        if distance.sum() == 0:  # identical points: any that is left
            distance = torch.ones(len(points), dtype=points.dtype)
            distance[chosen] = 0.0
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return points[chosen]


def _lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Labels and total squared distance after Lloyd's iterations."""
    import torch

    count = len(centres)
    labels = torch.full((len(points),), -1)
    for _ in range(_ITERATIONS):
        distance = torch.cdist(points, centres).square()
        new = _without_empty(distance.argmin(dim=1), distance, count)
        if torch.equal(new, labels):
            break
        labels = new
        centres = torch.stack([points[labels == label].mean(dim=0) for label in range(count)])
    return labels, float((points - centres[labels]).square().sum())


def _without_empty(labels: Tensor, distance: Tensor, count: int) -> Tensor:
    """Give every empty cluster the point that lies farthest from its own centre (of a cluster of several)."""
    labels = labels.clone()
    for label in range(count):
        if not bool((labels == label).any()):
            own = distance.gather(1, labels[:, None]).squeeze(1).clone()
            alone = (labels[:, None] == labels[None, :]).sum(dim=1) == 1
            own[alone] = -1.0
            labels[int(own.argmax())] = label
    return labels
