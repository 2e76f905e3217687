"""A job without a trainer: the node cools down first, where that is asked for, and then does nothing, measured.

What a board draws at rest is what its net energy is counted from; that it begins cool makes two runs comparable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from testbed.node.task import unmetered

if TYPE_CHECKING:
    from collections.abc import Mapping

COOL, IDLE_WINDOW = "cool", "idle_window"
_LOOK_SECONDS = 0.5


class Rest:
    """What is asked for: `seconds` of rest; `below_celsius` first, where that is told, but `cool_seconds` at most."""

    def __init__(self, wishes: Mapping[str, Any], now: float) -> None:
        self._seconds = float(wishes.get("seconds") or 0.0)
        self._below: float | None = wishes.get("below_celsius")
        self._give_up = now + float(wishes.get("cool_seconds") or 0.0)
        self._begun = now
        self._window: float | None = None  # when the window began
        self.too_hot = False

    @property
    def phase(self) -> str:
        return COOL if self._window is None else IDLE_WINDOW

    def due(self, now: float) -> float:
        """When to look again."""
        return now + _LOOK_SECONDS if self._window is None else self._window + self._seconds

    def is_cool(self, celsius: float | None, now: float) -> bool:
        """Whether the window may begin; a node whose temperature nobody can tell is not waited for."""
        if self._below is None or celsius is None or celsius < self._below:
            return True
        self.too_hot = now >= self._give_up
        return self.too_hot

    def begin_window(self, now: float) -> None:
        self._window = now

    def is_over(self, now: float) -> bool:
        return self._window is not None and now >= self._window + self._seconds

    def phases(self, now: float) -> list[dict[str, Any]]:
        """What has passed, as phases of a result."""
        window = now if self._window is None else self._window
        past = [unmetered(COOL, window - self._begun, self._begun)] if self._below is not None else []
        return [*past, unmetered(IDLE_WINDOW, now - window, window)]
