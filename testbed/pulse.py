"""Whether the other end of a channel lives: when it was heard last, and whether it was asked since."""

from __future__ import annotations

import time

#: Silence after which it is asked; what a dead link takes to be noticed is this and the silence after the question.
PING_SECONDS = 2.5


class Pulse:
    """Of one channel; times are of the monotonic clock."""

    def __init__(self, silence_seconds: float) -> None:
        self._silence_seconds = silence_seconds
        self._heard_at = time.monotonic()
        self._asked_at: float | None = None

    def heard(self) -> None:
        """Something came, or was taken."""
        self._heard_at, self._asked_at = time.monotonic(), None

    def asked(self) -> None:
        """From here on an answer is waited for."""
        self._asked_at = time.monotonic()

    @property
    def awaiting(self) -> bool:
        return self._asked_at is not None

    @property
    def due(self) -> float:
        """When to ask, or when not to wait for the answer any longer."""
        return self._heard_at + PING_SECONDS if self._asked_at is None else self._asked_at + self._silence_seconds

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self._heard_at
