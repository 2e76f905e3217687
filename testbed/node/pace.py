"""A slow link: what is sent passes at its rate, and after a silence only when its delay is over.

Each end of a channel holds back what it sends itself, so that both directions take their time, and whoever sends sees
how long it takes.  Standard library only.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Sent at a time: so many seconds of the link.
_PIECE_SECONDS = 0.05
#: Of a byte, by which a sum of fractions may fall short.
_ROUNDING = 1e-3


class Pace:
    """A token bucket that is empty whenever something begins to be sent: N bytes never take less than N / rate.

    due     when something can be sent again, on the monotonic clock
    """

    def __init__(
        self, bytes_per_second: float, delay_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = bytes_per_second
        self._delay = delay_seconds
        self._clock = clock
        self._piece = max(1, int(bytes_per_second * _PIECE_SECONDS))
        self._tokens = 0.0
        self._filled = 0.0  # until when the bucket has been filled
        self._begun: float | None = None
        self._bytes = 0
        self._seconds = 0.0
        self.due = 0.0

    @classmethod
    def of(cls, declared: Mapping[str, Any]) -> Pace | None:
        """The pace of a job by what it shall undergo; None where its link is as it is."""
        link = declared.get("slow_link")
        return None if link is None else cls(float(link["bytes_per_second"]), float(link["delay_seconds"]))

    def begin(self) -> None:
        """Something waits to be sent, after a silence: what follows at once has no delay of its own."""
        if self._begun is not None:
            return
        self._begun = self._clock()
        self._tokens, self._filled = 0.0, self._begun + self._delay
        self.due = self._filled

    def end(self) -> None:
        """Nothing waits any more."""
        if self._begun is not None:
            self._seconds += self._clock() - self._begun
        self._begun = None

    def grant(self, wanted: int) -> int:
        """How many of the wanted bytes may pass now; with 0, `due` says when to ask again."""
        now = self._clock()
        if now > self._filled:
            # Twice a piece: who comes late may make up for it, and nobody saves up.
            self._tokens = min(self._tokens + (now - self._filled) * self._rate, max(2.0 * self._piece, self._tokens))
            self._filled = now
        needed = min(wanted, self._piece)
        whole = int(self._tokens + _ROUNDING)
        if whole >= needed:
            return min(wanted, whole)
        self.due = self._filled + (needed - self._tokens) / self._rate
        return 0

    def took(self, count: int) -> None:
        """So many bytes have passed."""
        self._tokens -= count
        self._bytes += count

    def told(self, direction: str) -> dict[str, float]:
        """What has passed so far in this direction ("up", "down"), and how long something was on its way."""
        going_on = self._clock() - self._begun if self._begun is not None else 0.0
        return {f"{direction}_bytes": self._bytes, f"{direction}_seconds": round(self._seconds + going_on, 4)}
