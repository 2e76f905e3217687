"""How far a node's monotonic clock is from the controller's, from the round trips of questions that it answers."""

from __future__ import annotations

import time

#: By how much two quartz clocks may drift apart: 100 parts in a million, twice what boards' crystals are sold with.
_DRIFT = 1e-4


class ClockOffset:
    """The best estimate so far: of several questions that whose uncertainty is the smallest by now."""

    def __init__(self) -> None:
        self._asked: float | None = None
        self._offset: float | None = None
        self._half_width = 0.0
        self._at = 0.0

    def ask(self) -> None:
        """A question is on its way that the node answers with its clock."""
        self._asked = time.monotonic()

    def answered(self, clock: float) -> None:
        """The node's clock was this at some time between the question and now."""
        now, asked, self._asked = time.monotonic(), self._asked, None
        if asked is None:
            return
        half_width = (now - asked) / 2
        if self._offset is None or half_width <= self.half_width_seconds:
            self._offset, self._half_width, self._at = (now + asked) / 2 - clock, half_width, now

    def forget(self) -> None:
        """The node was restarted: its clock is another one."""
        self._asked = self._offset = None

    @property
    def half_width_seconds(self) -> float:
        """How well it is known; it grows while nobody asks."""
        return self._half_width + _DRIFT * (time.monotonic() - self._at)

    def to_unix(self, clock: float) -> float | None:
        """A time of the node's clock as the controller's wall clock has it now; None before the first answer."""
        if self._offset is None:
            return None
        return clock + self._offset + (time.time() - time.monotonic())
