"""What takes too long for a scrape is looked at in the background, again and again; a scrape gets the last answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from testbed.errors import TestbedError
from testbed.exporter.figures import Figures

logger = logging.getLogger(__name__)


class Refreshed:
    """Figures that a thread keeps new for as long as the block lasts.  A look that fails leaves the last one standing,
    and `testbed_exporter_refreshed_timestamp_seconds` behind.
    """

    def __init__(self, part: str, look: Callable[[], Figures], every_seconds: float) -> None:
        self.figures = Figures()
        self._part, self._look, self._every = part, look, every_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"look at {part}", daemon=True)

    def refresh(self) -> None:
        """Look once; raises what keeps it from looking."""
        seen = self._look()
        seen.set("testbed_exporter_refreshed_timestamp_seconds", time.time(), part=self._part)
        self.figures.become(seen)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _run(self) -> None:
        while True:
            try:
                self.refresh()
            except (TestbedError, OSError) as error:
                logger.warning("the %s could not be looked at: %s", self._part, error)
            if self._over.wait(self._every):
                return
