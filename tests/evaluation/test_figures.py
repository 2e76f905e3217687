"""Intervals against published ones and against resampling."""

from __future__ import annotations

from random import Random
from statistics import quantiles

import pytest

from testbed.evaluation.figures import MEAN, PERPLEXITY, Scores, difference, figure, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_intervals_of_newcombe_1998(right, count, low, high):
    assert wilson(right, count) == pytest.approx((low, high), abs=6e-5)


def test_the_interval_of_a_mean_per_token_is_what_resampling_the_texts_gives():
    draw = Random(0)
    weights = [float(draw.randrange(5, 200)) for _ in range(300)]
    totals = [weight * draw.gauss(3, 0.5) for weight in weights]
    found = figure(Scores(totals, weights, MEAN))
    means = []
    for _ in range(2000):
        chosen = [draw.randrange(300) for _ in range(300)]
        means.append(sum(totals[i] for i in chosen) / sum(weights[i] for i in chosen))
    cuts = quantiles(means, n=40)
    width = found.high - found.low
    assert found.low == pytest.approx(cuts[0], abs=0.1 * width)
    assert found.high == pytest.approx(cuts[-1], abs=0.1 * width)


def test_a_perplexity_has_the_interval_of_its_exponent():
    nats, tokens = [10.0, 30.0, 24.0, 9.0], [5.0, 11.0, 10.0, 4.0]
    mean, perplexity = figure(Scores(nats, tokens, MEAN)), figure(Scores(nats, tokens, PERPLEXITY))
    assert perplexity.value == pytest.approx(2.718281828459045**mean.value)
    assert perplexity.low < perplexity.value < perplexity.high
    assert perplexity.low == pytest.approx(2.718281828459045**mean.low)


def test_equal_answers_on_few_items_are_not_certainty():
    same = Scores([1.0, 0.0, 1.0, 1.0])
    found = difference(same, same)
    assert (found.value, found.low, found.high) == (0.0, -0.25, 0.25)


def test_two_items_have_a_mean_and_no_interval():
    found = figure(Scores([1.0, 2.0], kind=MEAN))
    assert (found.value, found.low, found.high) == (1.5, None, None)


def test_a_model_that_has_diverged_has_no_figure():
    found = figure(Scores([1.0, float("nan"), 2.0], kind=MEAN))
    assert (found.value, found.low, found.count) == (None, None, 3)


def test_two_shares_are_never_further_apart_than_one():
    found = difference(Scores([1.0, 1.0, 0.0]), Scores([0.0, 0.0, 1.0]))
    assert (found.low, found.high) == (-1.0, 1.0)
    assert difference(Scores([5.0, -3.0, 4.0], kind=MEAN), Scores([0.0] * 3, kind=MEAN)).high > 1
