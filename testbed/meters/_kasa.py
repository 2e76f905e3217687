"""What Kasa and Tapo plugs have in common: the library python-kasa, whose coroutines are driven from here.

python-kasa is GPL-3.0-or-later, so it is not among the testbed's dependencies: whoever wants it installs the extra.
https://python-kasa.readthedocs.io/
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from testbed.errors import MeterError
from testbed.meters import CONTROLLER, Accuracy, Meter, Reading

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Coroutine

#: For one question to a plug.
TIMEOUT_SECONDS = 5
#: Beside the library's own error: of the system, and of an answer in which something is missing.
_UNEXPECTED = (OSError, ValueError, KeyError, TypeError, AttributeError)


class KasaPlug(Meter):
    """One plug, or one outlet of a strip.  A subclass says how it is connected to."""

    where = CONTROLLER
    period_seconds = 1.0
    can_switch = True
    point = "wall_ac"

    def __init__(self, who: str, outlet: int | None) -> None:
        self._who, self._outlet = who, outlet
        self._loop: AbstractEventLoop | None = None
        self._plug: Any = None
        self._failure: type[Exception] = MeterError
        self._one = threading.Lock()  # it is switched from another thread than it is read by

    async def connect(self, kasa: Any) -> Any:
        """The device, with what it tells of itself; may raise whatever python-kasa raises."""
        raise NotImplementedError

    def open(self) -> None:
        try:
            self.read()
        except MeterError:
            self.close()
            raise
        outlet = self._outlet
        self.rails = self.total_rails = ("plug" if outlet is None else f"outlet {outlet}",)
        # Unverified: see the module of each.
        self.accuracy = (Accuracy(0.05, 0.0, 0.001, 1.0),)

    def read(self) -> Reading:
        self._reach()
        return self._read()

    def switch(self, *, on: bool) -> None:
        self._reach()
        part = self._part()
        self._done(part.turn_on() if on else part.turn_off())
        self._done(self._plug.update())
        if bool(self._part().is_on) is not on:
            raise MeterError(f"{self._who}: it was told to switch {'on' if on else 'off'}, and did not")

    def close(self) -> None:
        with self._one:
            loop, self._loop = self._loop, None
            if loop is not None:
                self._hang_up(loop)
                loop.close()

    def _reach(self) -> None:
        if self._plug is not None:
            return
        try:
            import asyncio
            import importlib

            kasa = importlib.import_module("kasa")
        except ImportError:
            raise MeterError(
                f"{self._who}: it is read with python-kasa, which is not installed (its licence is GPL-3.0-or-later); "
                f"install it with: pip install python-kasa"
            ) from None
        self._failure = kasa.KasaException
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        self._plug = self._done(self.connect(kasa))
        if self._plug is None:
            raise MeterError(f"{self._who}: nothing answers there; is it on, and its address right?")

    def _read(self) -> Reading:
        self._done(self._plug.update())
        energy = self._part().modules.get("Energy")
        if energy is None:
            raise MeterError(f"{self._who}: this model switches, and measures no power")
        watts = energy.current_consumption
        if watts is None:
            raise MeterError(f"{self._who}: it tells no power now")
        return Reading((float(watts),))

    def _part(self) -> Any:
        if self._outlet is None:
            return self._plug
        outlets = list(self._plug.children)
        if self._outlet >= len(outlets):
            raise MeterError(f"{self._who}: it has no outlet {self._outlet}, but {len(outlets)}, which count from 0")
        return outlets[self._outlet]

    def _done(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The outcome of a coroutine; a plug that failed is connected to anew at the next reading."""
        with self._one:
            if self._loop is None:
                work.close()
                raise MeterError(f"{self._who}: it is closed")
            try:
                return self._loop.run_until_complete(work)
            except (self._failure, *_UNEXPECTED) as error:
                self._hang_up(self._loop)
                raise MeterError(f"{self._who}: {str(error) or type(error).__name__}") from None

    def _hang_up(self, loop: AbstractEventLoop) -> None:
        plug, self._plug = self._plug, None
        if plug is not None:
            with contextlib.suppress(self._failure, *_UNEXPECTED):
                loop.run_until_complete(plug.disconnect())
