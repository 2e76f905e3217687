"""Similarity and clustering of blocks: the identities that `methods` rest on."""

from __future__ import annotations

import pytest
import torch

from methods._grouping import centred_gram, linear_cka, spectral_groups


def outputs(seed, samples=64, hidden=32):
    return torch.randn(samples, hidden, generator=torch.Generator().manual_seed(seed))


def test_cka_of_a_representation_with_itself_is_one_whatever_its_scale_rotation_or_shift():
    x = outputs(0)
    rotation = torch.linalg.qr(outputs(1, 32, 32)).Q
    grams = [centred_gram(y) for y in (x, 3.0 * x, x @ rotation, x + 5.0)]
    assert torch.allclose(linear_cka(grams), torch.ones(4, 4, dtype=torch.float64), atol=1e-6)


def test_cka_equals_the_formula_on_centred_features():
    x, y = outputs(0), outputs(1, hidden=16)
    xc, yc = (z.double() - z.double().mean(0) for z in (x, y))
    expected = (yc.T @ xc).norm() ** 2 / ((xc.T @ xc).norm() * (yc.T @ yc).norm())
    assert torch.allclose(linear_cka([centred_gram(x), centred_gram(y)])[0, 1], expected)


def test_a_constant_output_is_similar_to_nothing_and_gives_no_nan():
    similarity = linear_cka([centred_gram(torch.ones(8, 4)), centred_gram(outputs(0, 8, 4))])
    assert bool(similarity.isfinite().all())
    assert similarity[0, 1] == 0


@pytest.mark.parametrize("seed", range(5))
def test_spectral_groups_recover_the_blocks_of_a_block_matrix(seed):
    members = [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    similarity = torch.full((9, 9), 0.05)
    for group in members:
        for i in group:
            similarity[i, group] = 0.9
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    found = spectral_groups(similarity[shuffled][:, shuffled], 3, seed=0)
    assert sorted(sorted(int(shuffled[i]) for i in group) for group in found) == members


@pytest.mark.parametrize("count", range(1, 8))
def test_there_are_exactly_as_many_groups_as_asked_for_none_empty_and_all_blocks_in_one(count):
    similarity = linear_cka([centred_gram(outputs(seed)) for seed in range(7)])
    groups = spectral_groups(similarity, count, seed=0)
    assert len(groups) == count
    assert sorted(node for group in groups for node in group) == list(range(7))


def test_identical_blocks_are_still_divided_into_as_many_groups():
    groups = spectral_groups(torch.ones(6, 6), 4, seed=0)
    assert min(len(group) for group in groups) >= 1
    assert sum(len(group) for group in groups) == 6
    assert len(groups) == 4


def test_the_same_seed_gives_the_same_groups():
    similarity = linear_cka([centred_gram(outputs(seed)) for seed in range(12)])
    assert spectral_groups(similarity, 5, seed=3) == spectral_groups(similarity, 5, seed=3)
