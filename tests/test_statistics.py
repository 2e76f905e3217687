"""Intervals over seeds hold what they promise, and say so when there are too few runs."""

from __future__ import annotations

import math
import random

import pytest

from testbed.statistics import BETTER, NO_DIFFERENCE, NOT_ENOUGH, WORSE, Estimate, estimate, paired


def test_an_interval_of_three_is_students():
    found = estimate([0.60, 0.64, 0.68])
    assert found.mean == pytest.approx(0.64)
    assert found.half_width == pytest.approx(4.302653 * 0.04 / math.sqrt(3), rel=1e-6)


def test_two_runs_have_a_mean_and_no_interval():
    assert estimate([1.0, 3.0]) == Estimate(2, 2.0, math.sqrt(2))
    assert estimate([]) == Estimate(0)
    assert estimate([1.0, math.nan, 3.0]).count == 2  # a loss that ran away is no figure


@pytest.mark.parametrize("runs", [3, 5, 10])
def test_95_of_100_intervals_hold_the_truth(runs):
    draw = random.Random(runs)
    held = 0
    for _ in range(2000):
        found = estimate([draw.gauss(0.5, 0.1) for _ in range(runs)])
        held += found.low <= 0.5 <= found.high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_a_pair_needs_three_seeds_that_both_have():
    ours, theirs = {0: 0.6, 1: 0.7, 2: 0.8}, {1: 0.5, 2: 0.6, 3: 0.7}
    assert paired(ours, theirs).verdict == NOT_ENOUGH
    assert paired(ours, theirs).difference.count == 2


def test_pairs_show_what_spreads_hide():
    """Seeds that differ by 0.2 among themselves, methods by 0.02 on each: only the pairs tell them apart."""
    theirs = {0: 0.5, 1: 0.6, 2: 0.7}
    ours = {0: 0.52, 1: 0.621, 2: 0.719}
    assert paired(ours, theirs).verdict == BETTER
    assert paired(theirs, ours).verdict == WORSE
    assert paired(ours, theirs, higher_is_better=False).verdict == WORSE


def test_no_difference_says_how_much_may_be_hidden():
    found = paired({0: 0.5, 1: 0.7, 2: 0.6}, {0: 0.6, 1: 0.6, 2: 0.6})
    assert found.verdict == NO_DIFFERENCE
    assert found.hidden == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert paired({0: 1.0}, {0: 0.0}).hidden is None


def test_more_comparisons_ask_for_more():
    ours, theirs = {0: 0.52, 1: 0.63, 2: 0.73}, {0: 0.5, 1: 0.6, 2: 0.7}
    assert paired(ours, theirs).verdict == BETTER
    assert paired(ours, theirs, comparisons=5).verdict == NO_DIFFERENCE


def test_equal_counts_are_no_certainty():
    """Three pairs one text of 400 apart have no spread: what moves in steps cannot be known better than one."""
    ours, theirs = {0: 0.5025, 1: 0.6025, 2: 0.7025}, {0: 0.5, 1: 0.6, 2: 0.7}
    assert paired(ours, theirs, resolution=1 / 400).verdict == NO_DIFFERENCE
