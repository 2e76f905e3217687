"""What several runs say: intervals over seeds, and pairs on the same seed.

Intervals are Student's t at 95 %, the paired ones on the differences of each pair.  With fewer than `MIN_RUNS` values
there is none: two values give an interval of twelve times their spread, from which nothing can be learned.  An interval
speaks of the seeds (initial state, shards, draws) on one held-out set, not of other data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

#: Values below which there is no interval, and pairs below which there is no verdict.
MIN_RUNS = 3
CONFIDENCE = 0.95

BETTER = "better"
WORSE = "worse"
NO_DIFFERENCE = "no difference shown"
NOT_ENOUGH = "not enough runs to say"


@dataclass(frozen=True)
class Estimate:
    """A mean over runs.  `low` and `high` bound it at the asked confidence; None: not enough runs to say."""

    count: int
    mean: float | None = None
    deviation: float | None = None  # of the sample: n - 1
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Paired:
    """One method against another on the same seeds: the differences, ours less theirs, and what they show."""

    difference: Estimate
    verdict: str  # BETTER, WORSE, NO_DIFFERENCE or NOT_ENOUGH
    comparisons: int = 1  # that share the error of the whole: the interval is Bonferroni's

    @property
    def hidden(self) -> float | None:
        """Of NO_DIFFERENCE: the largest difference that may still be there; None otherwise."""
        difference = self.difference
        if self.verdict != NO_DIFFERENCE or difference.low is None or difference.high is None:
            return None
        return max(abs(difference.low), abs(difference.high))


def estimate(values: Sequence[float], *, confidence: float = CONFIDENCE, resolution: float = 0.0) -> Estimate:
    """The mean of one figure over runs, with Student's t interval.

    `resolution` is the least step that the figure can make (1 / examples for an accuracy): no interval is narrower than
    one of it on either side, so that three equal counts do not pass for certainty.
    """
    known = [value for value in values if math.isfinite(value)]
    if len(known) < MIN_RUNS:
        return Estimate(len(known), mean(known) if known else None, stdev(known) if len(known) > 1 else None)
    middle, deviation = mean(known), stdev(known)
    half = max(_quantile(confidence, len(known) - 1) * deviation / math.sqrt(len(known)), resolution)
    return Estimate(len(known), middle, deviation, middle - half, middle + half)


def paired(
    ours: Mapping[int, float],
    theirs: Mapping[int, float],
    *,
    higher_is_better: bool = True,
    comparisons: int = 1,
    resolution: float = 0.0,
) -> Paired:
    """Compare on the seeds that both have.  Keys are seeds; `comparisons` is how many are made side by side."""
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [round(ours[seed] - theirs[seed], 12) for seed in seeds]  # 0.5025 - 0.5 is no more than 1 / 400
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    found = estimate(differences, confidence=confidence, resolution=resolution)
    return Paired(found, _verdict(found, higher_is_better=higher_is_better), comparisons)


def _verdict(difference: Estimate, *, higher_is_better: bool) -> str:
    if difference.low is None or difference.high is None:
        return NOT_ENOUGH
    if round(difference.low, 12) <= 0 <= round(difference.high, 12):
        return NO_DIFFERENCE
    return BETTER if (difference.low > 0) == higher_is_better else WORSE


def _quantile(confidence: float, degrees: int) -> float:
    """Of Student's t, two-sided."""
    from scipy import stats

    return float(stats.t.ppf((1 + confidence) / 2, degrees))
