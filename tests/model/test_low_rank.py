"""Factors cut short, and the best ones of a sum of products."""

from __future__ import annotations

import torch

from testbed.model.low_rank import dense_factors, factors_of, truncated


def products(*ranks, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        (1.0 / len(ranks), torch.randn(rank, 12, generator=draw), torch.randn(9, rank, generator=draw))
        for rank in ranks
    ]


def summed(found):
    return sum(weight * b @ a for weight, a, b in found)


def test_enough_rank_gives_the_sum_itself_and_less_the_best_there_is():
    found = products(2, 3)
    a, b = factors_of(found, 5)
    torch.testing.assert_close(b @ a, summed(found))
    short_a, short_b = factors_of(found, 2)
    u, s, v = torch.linalg.svd(summed(found))
    torch.testing.assert_close(short_b @ short_a, u[:, :2] @ torch.diag(s[:2]) @ v[:2])


def test_the_sum_need_not_be_formed_for_the_same_factors_sign_for_sign():
    found = products(2, 3)
    for stacked, dense in zip(factors_of(found, 4), dense_factors(summed(found), 4), strict=True):
        torch.testing.assert_close(stacked, dense, atol=1e-5, rtol=1e-4)


def test_factors_are_cut_by_their_size_and_filled_up_with_zeros():
    found = products(2)
    a, b = factors_of(found, 4)
    assert (a.shape, b.shape) == ((4, 12), (9, 4))
    torch.testing.assert_close(b @ a, summed(found))
    assert float(b[:, 2:].abs().max()) < 1e-3
    cut_a, cut_b = truncated(a, b, 1)
    assert (cut_a.shape, cut_b.shape) == ((1, 12), (9, 1))
    best_a, best_b = factors_of(found, 1)
    torch.testing.assert_close(cut_b @ cut_a, best_b @ best_a)
