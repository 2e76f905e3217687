"""Figures with what they may be off by, from one score per item.

A figure is Σ totals / Σ weights over the items: with weights of 1 a mean, with a text's tokens as its weight the mean
per token.  Its standard error is that of a ratio, √(n/(n−1) · Σ(total − figure·weight)²) / Σ weights (Cochran, Sampling
Techniques, 3rd edition, section 6.4); with weights of 1 it is the sample's deviation over √n, which is what
lm-evaluation-harness prints.  Intervals are at 95 %:

    share        Wilson's (Wilson 1927, JASA 22): it stays within 0 and 1, and is right for 0 of n too
    mean         Student's t on the standard error
    perplexity   the exponential of the mean's interval

They speak of the items: how far the figure would move with other items of the same kind.  They say nothing of other
seeds of the training; those are `testbed.statistics`' business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

SHARE = "share"
MEAN = "mean"
PERPLEXITY = "perplexity"

CONFIDENCE = 0.95
#: Items below which a mean has no interval.
MIN_ITEMS = 3


@dataclass(frozen=True)
class Scores:
    """What one figure is made of: a total for each item, in the order of the items, and its weight (None: 1 each)."""

    totals: Sequence[float]
    weights: Sequence[float] | None = None
    kind: str = SHARE  # SHARE (totals are 0 or 1), MEAN or PERPLEXITY (totals are nats)

    @property
    def every_weight(self) -> Sequence[float]:
        return self.weights if self.weights is not None else [1.0] * len(self.totals)


@dataclass(frozen=True)
class Figure:
    """A figure over `count` items.  None: not enough items to say, or (every field) no finite number."""

    value: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Outcome:
    """What was found of one model: its figures, what they are made of, and counts that a reader must know."""

    figures: Mapping[str, Figure]
    scores: Mapping[str, Scores] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    contents: Mapping[str, Any] = field(default_factory=dict)  # what was asked, where only the asking tells

    @classmethod
    def of(cls, scores: Mapping[str, Scores], notes: Mapping[str, int]) -> Outcome:
        return cls({name: figure(each) for name, each in scores.items()}, scores, notes)


def figure(scores: Scores) -> Figure:
    """The figure, with its standard error and interval."""
    count = len(scores.totals)
    value, error = _ratio(scores.totals, scores.every_weight)
    if not math.isfinite(value):  # of a model that has diverged
        return Figure(None, None, None, None, count)
    if scores.kind == SHARE:
        return Figure(value, error, *wilson(sum(scores.totals), count), count=count)
    low, high = _interval(value, error, count)
    if scores.kind == MEAN:
        return Figure(value, error, low, high, count)
    perplexity = _exp(value)
    scaled = None if error is None else error * perplexity  # the delta method: the exponential's slope is its value
    return Figure(perplexity, scaled, None if low is None else _exp(low), None if high is None else _exp(high), count)


def difference(ours: Scores, theirs: Scores) -> Figure | None:
    """Ours less theirs, item by item on the same items; None of perplexities, which are no means.

    A share's interval is no narrower than one item on either side: equal answers on few items are not certainty.
    """
    if ours.kind == PERPLEXITY or len(ours.totals) != len(theirs.totals):
        return None
    count = len(ours.totals)
    value, error = _ratio([a - b for a, b in zip(ours.totals, theirs.totals, strict=True)], ours.every_weight)
    if not math.isfinite(value):
        return None
    low, high = _interval(value, error, count, 1 / count if ours.kind == SHARE else 0.0)
    if ours.kind == SHARE and low is not None and high is not None:  # two shares are never further apart
        low, high = max(-1.0, low), min(1.0, high)
    return Figure(value, error, low, high, count)


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _ratio(totals: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """Σ totals / Σ weights, and its standard error; None of a single item."""
    count, whole = len(totals), math.fsum(weights)
    value = math.fsum(totals) / whole
    if count < 2:
        return value, None
    squares = math.fsum((total - value * weight) ** 2 for total, weight in zip(totals, weights, strict=True))
    return value, math.sqrt(count / (count - 1) * squares) / whole


def _interval(value: float, error: float | None, count: int, least: float = 0.0) -> tuple[float | None, float | None]:
    if error is None or count < MIN_ITEMS:
        return None, None
    from scipy import stats

    half = max(float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error, least)
    return value - half, value + half


def _exp(nats: float) -> float:
    """The exponential; of more than a float holds, the most that it does, since JSON has no infinity."""
    return math.exp(min(nats, 700.0))
