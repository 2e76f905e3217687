"""How long the rest of an experiment takes, as far as that is known while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from testbed.experiments.forecast import Guess, Known, left, total

if TYPE_CHECKING:
    from testbed.experiments.cells import Standing


def left_text(known: Known, ahead: Sequence[Standing]) -> str:
    """What follows a cell's title: for the cells that wait, “, about 23 min left”; nothing where nothing is known."""
    seconds, whole = total([_guess(known, standing) for standing in ahead])
    return f", {'about' if whole else 'at least'} {_rough(seconds)} left" if seconds else ""


def _guess(known: Known, standing: Standing) -> Guess:
    guess = known.seconds(standing.cell)
    if guess.value is None:
        guess = known.mean_seconds()
    return left(guess, len(standing.run.rounds()) if standing.run else 0, standing.cell.config.rounds)


def _rough(seconds: float) -> str:
    """To the minute: more would be said than is known."""
    if seconds < 90:
        return "a minute"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
