"""Directions that controller and node draw alike."""

from __future__ import annotations

import hashlib

import pytest
import torch

from testbed.model.perturbation import add_normals, add_signs, normals, signs

#: SHA-256 of 100,003 values, the first of a seed and name: what a second implementation, and every CPU, must give.
KNOWN = {
    signs: "e07befd07e18cdbe",
    normals: "bc9a9234ae920e0d",
}


@pytest.mark.parametrize("draw", [signs, normals], ids=lambda draw: draw.__name__)
def test_the_numbers_are_these_on_every_machine(draw):
    values = draw((100_003,), 7, "model.layers.0.mlp.up_proj.weight")
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] == KNOWN[draw]


@pytest.mark.parametrize("draw", [signs, normals], ids=lambda draw: draw.__name__)
def test_mean_0_variance_1_and_another_name_or_seed_is_another_direction(draw):
    values = draw((600, 1001), 3, "a")
    assert abs(float(values.mean())) < 5e-3
    assert float(values.var()) == pytest.approx(1.0, abs=1e-2)
    for other in (draw((600, 1001), 3, "b"), draw((600, 1001), 4, "a")):
        assert abs(float((values * other).mean())) < 5e-3


def test_signs_are_nothing_else():
    assert sorted(signs((1000,), 0, "a").unique().tolist()) == [-1.0, 1.0]


@pytest.mark.parametrize(("add", "draw"), [(add_signs, signs), (add_normals, normals)])
def test_what_is_added_in_place_is_the_direction_also_over_several_pieces_and_to_leaves(add, draw):
    leaf = torch.zeros(3, 1 << 18).add_(0.5).requires_grad_()
    add(leaf, 0.25, 5, "w")
    torch.testing.assert_close(leaf.detach(), 0.5 + 0.25 * draw(leaf.shape, 5, "w"))
    add(leaf, -0.25, 5, "w")
    torch.testing.assert_close(leaf.detach(), torch.full_like(leaf, 0.5))
