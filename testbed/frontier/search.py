"""Two searches along an axis: for the largest value that a prediction admits, and for which value to try next.

Values are in ascending order.  Both searches take it that what holds a value holds every smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil

#: Trials of one device along one axis, at most.
MOST_TRIALS = 6
#: Of the budget: how far from the first trial the second one is, and how much farther each further one.
_FIRST_STRIDE = 0.015
_WIDER = 3.0


def largest(values: Sequence[int], holds: Callable[[int], bool], start: int) -> int | None:
    """The largest value that holds, found by doubling from `start` and bisection; None where not even the first does.

    What it gives holds, and the next value does not: that much is true whatever `holds` does elsewhere.
    """
    low, high = -1, len(values)  # indices: everything up to low holds, nothing from high on
    index = min(max(0, _index_of(values, start)), len(values) - 1)
    while low < index < high:
        if holds(values[index]):
            low, index = index, min(2 * index + 1, len(values) - 1) if high == len(values) else (index + high) // 2
        else:
            high = index
            index = (low + high) // 2 if low >= 0 else (index - 1) // 2
    return values[low] if low >= 0 else None


def _index_of(values: Sequence[int], value: int) -> int:
    return next((index for index, known in enumerate(values) if known >= value), len(values) - 1)


def next_trial(
    values: Sequence[int], survived: Mapping[int, bool], within: Callable[[float], int | None]
) -> int | None:
    """Which value to try next, or None when the frontier is known exactly or `MOST_TRIALS` were made.

    `survived`: what the trials so far have shown.  `within(share)`: the largest value that is predicted to stay within
    that share of the budget (None: none), which is where the first trial is, and how the strides are measured.
    """
    if len(survived) >= MOST_TRIALS:
        return None
    if not survived:
        return _or_first(values, within(1.0))
    low, high = bracket(values, survived)
    if high - low <= 1:
        return None
    if high == len(values):
        reach = within(1 + _stride(sum(survived.values())))
        return max(values[low + 1], _or_first(values, reach))
    if low < 0:
        reach = within(1 - _stride(len(survived)))
        return min(values[high - 1], _or_first(values, reach))
    return values[(low + high) // 2]


def bracket(values: Sequence[int], survived: Mapping[int, bool]) -> tuple[int, int]:
    """Indices of the largest value that survived and the smallest that did not; -1 and len(values) where none did."""
    high = min((values.index(value) for value, held in survived.items() if not held), default=len(values))
    below = [index for value, held in survived.items() if held and (index := values.index(value)) < high]
    return max(below, default=-1), high


def _stride(tried: int) -> float:
    """Of the budget: farther each time, and the whole of it at the last."""
    return 1.0 if tried >= ceil(MOST_TRIALS * 2 / 3) else _FIRST_STRIDE * _WIDER ** (tried - 1)


def _or_first(values: Sequence[int], value: int | None) -> int:
    return values[0] if value is None else value
