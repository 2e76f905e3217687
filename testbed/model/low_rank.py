"""Low-rank factors: cut them short, and find the best ones of a sum of products.

Everywhere A is (rank × inputs) and B (outputs × rank), and what they stand for is B A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` rows of A and columns of B."""
    return a[:rank].contiguous(), b[:, :rank].contiguous()


def factors_of(products: Sequence[tuple[float, Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """The best factors (A, B) of at most `rank` for Σ weight · B A over products (weight, A, B), in the type of A.

    The sum is never formed: with the factors stacked, B = Q_b R_b and Aᵀ = Q_a R_a, only R_b R_aᵀ (summed rank
    squared) is decomposed.  Balanced and padded as `dense_factors` does.
    """
    stacked_b = torch.cat([weight * b.double() for weight, _, b in products], dim=1)
    stacked_a = torch.cat([a.double() for _, a, _ in products], dim=0)
    left, small_b = torch.linalg.qr(stacked_b)
    right, small_a = torch.linalg.qr(stacked_a.T)
    u, s, v = torch.linalg.svd(small_b @ small_a.T, full_matrices=False)
    return _balanced(left @ u, s, v @ right.T, rank, products[0][1].dtype)


def dense_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors (A, B) of at most `rank` for a matrix (outputs × inputs), by its singular values.

    B = U √S and A = √S Vᵀ; where the matrix has less rank the last rows and columns are zero.  The sign of every pair
    is the one that makes the largest entry of its column of U positive, so that it does not depend on the library.
    """
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    return _balanced(u, s, v, rank, delta.dtype)


def _balanced(u: Tensor, s: Tensor, v: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    kept = min(rank, len(s))
    largest = u[:, :kept].abs().argmax(dim=0)
    signs = torch.where(u[largest, torch.arange(kept)] < 0, -1.0, 1.0).to(u)
    root = s[:kept].sqrt()
    a = torch.zeros(rank, v.shape[1], dtype=torch.float64)
    b = torch.zeros(u.shape[0], rank, dtype=torch.float64)
    a[:kept] = (root * signs)[:, None] * v[:kept]
    b[:, :kept] = u[:, :kept] * (root * signs)
    return a.to(dtype), b.to(dtype)
