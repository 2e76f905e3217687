"""A Shelly plug or relay that measures: read over HTTP by the controller, and a switch.

    meter:
      shelly: {host: plug-1.lan}
      shelly: {host: 192.0.2.7, channel: 1, password_env: SHELLY_PASSWORD}

First generation: `/status` (`meters[].power` in watts) and `/relay/N?turn=on`.  Second and later: the RPC
`Switch.GetStatus` (`apower` in watts, `aenergy.total` in watt-hours) and `Switch.Set`.  `/shelly` tells which it is.
https://shelly-api-docs.shelly.cloud/gen1/, https://shelly-api-docs.shelly.cloud/gen2/ComponentsAndServices/Switch

Accuracy: unverified.  No figure of the vendor is known to us; 5 % is what plugs of the cheap class are tested to
(https://digilogicinfocom.com/blog/smart-plug-energy-monitoring), and they are at their worst at the few watts of a
board.  `testbed calibrate` finds out.  The sensor of the first generation counts pulses, about one a second at 12 W
(https://labparvum.com/shelly-power-plug-s-with-esphome): at 3 W its reading is four seconds old.

The energy counter of the second generation is told to a thousandth of a watt-hour, and used.  That of the first counts
watt-minutes, 60 J: too coarse for a job.

Tried on: stand-ins that answer as the vendor documents; on no plug yet.
"""

from __future__ import annotations

from typing import Any

from testbed.errors import MeterError
from testbed.meters import CONTROLLER, Accuracy, Meter, Reading
from testbed.meters._http import Appliance, number

_JOULES_PER_WATT_HOUR = 3600.0


class ShellyMeter(Meter):
    """`channel` counts from 0; `generation` 1 or 2 (for all later ones) saves the question which it is."""

    where = CONTROLLER
    period_seconds = 1.0
    can_switch = True
    point = "wall_ac"

    def __init__(
        self,
        host: str,
        channel: int = 0,
        generation: int | None = None,
        user: str = "admin",
        password_env: str | None = None,
    ) -> None:
        if generation is not None and generation < 1:
            raise ValueError(f"generation: expected 1, 2, 3 …, got {generation}")
        self._plug = Appliance(f"shelly {host}", host, user, password_env)
        self._channel = channel
        self._stated = self._generation = generation

    def open(self) -> None:
        self._generation = self._stated or self._asked()
        self.rails = self.total_rails = (f"relay:{self._channel}" if self._first else f"switch:{self._channel}",)
        self.accuracy = (Accuracy(0.05, 0.0, 0.01, 4.0) if self._first else Accuracy(0.05, 0.0, 0.1, 1.0),)
        self.has_counters = not self._first and _total(self._status()) is not None
        self.read()

    def read(self) -> Reading:
        status = self._status()
        if self._first:
            return Reading((self._watts(status, "power"),))
        watts = self._watts(status, "apower")
        if not self.has_counters:
            return Reading((watts,))
        total = number(self._plug.who, _total(status), "energy (aenergy.total)")
        return Reading((watts,), (total * _JOULES_PER_WATT_HOUR,))

    def switch(self, *, on: bool) -> None:
        self._generation = self._generation or self._asked()
        if self._first:
            told = self._plug.ask(f"/relay/{self._channel}", {"turn": "on" if on else "off"})
            now = _field(told, "ison")
        else:
            self._plug.ask("/rpc/Switch.Set", {"id": str(self._channel), "on": "true" if on else "false"})
            now = _field(self._switch_status(), "output")
        if now is not on:
            raise MeterError(f"{self._plug.who}: it was told to switch {'on' if on else 'off'}, and did not")

    @property
    def _first(self) -> bool:
        return self._generation == 1

    def _asked(self) -> int:
        told = self._plug.ask("/shelly")
        generation = _field(told, "gen")
        if isinstance(generation, int):
            return generation
        if _field(told, "type") is not None:
            return 1
        raise MeterError(f"{self._plug.who}: what answers there is no Shelly: {str(told)[:80]}")

    def _status(self) -> Any:
        if not self._first:
            return self._switch_status()
        meters = _field(self._plug.ask("/status"), "meters")
        if not isinstance(meters, list) or self._channel >= len(meters):
            count = len(meters) if isinstance(meters, list) else 0
            raise MeterError(
                f"{self._plug.who}: it has no meter of channel {self._channel}, but {count}, which count from 0"
            )
        if _field(meters[self._channel], "is_valid") is False:
            raise MeterError(f"{self._plug.who}: it says itself that its reading is not valid now")
        return meters[self._channel]

    def _switch_status(self) -> Any:
        return self._plug.ask("/rpc/Switch.GetStatus", {"id": str(self._channel)})

    def _watts(self, status: Any, key: str) -> float:
        if _field(status, key) is None:
            raise MeterError(
                f"{self._plug.who}: it tells no power of channel {self._channel}: this model measures none, or another "
                f"channel"
            )
        return number(self._plug.who, status[key], f"power ({key})")


def _field(told: Any, key: str) -> Any:
    return told.get(key) if isinstance(told, dict) else None


def _total(status: Any) -> Any:
    return _field(_field(status, "aenergy"), "total")
