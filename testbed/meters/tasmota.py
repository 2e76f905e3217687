"""A plug with the firmware Tasmota: read over HTTP by the controller, and a switch.

    meter:
      tasmota: {host: plug-2.lan}
      tasmota: {host: 192.0.2.8, channel: 2, password_env: TASMOTA_PASSWORD}

Asked with `cm?cmnd=Status 8`, or `Status 10` where the firmware has no `Status 8`; `ENERGY.Power` is in watts.
https://tasmota.github.io/docs/Commands/

By default Tasmota tells whole watts, which is a quarter of what a Raspberry Pi draws: `WattRes 2` in the plug's console
makes it hundredths.  How fine they are is seen by their decimals.

Accuracy: unverified.  A plug must be calibrated with a known load first
(https://tasmota.github.io/docs/Power-Monitoring-Calibration/); after that 5 %, the cheap class
(https://digilogicinfocom.com/blog/smart-plug-energy-monitoring), is an assumption.  `testbed calibrate` finds out.

Its energy counter (`Total`, thousandths of a kilowatt-hour: 3600 J) is too coarse for a job and is not used.

Tried on: stand-ins that answer as public captures do; on no plug yet.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from testbed.errors import MeterError
from testbed.meters import CONTROLLER, Accuracy, Meter, Reading
from testbed.meters._http import Appliance


class TasmotaMeter(Meter):
    """`channel` counts from 1, as Tasmota's own Power1, Power2 do."""

    where = CONTROLLER
    period_seconds = 1.0
    can_switch = True
    point = "wall_ac"

    def __init__(self, host: str, channel: int = 1, user: str = "admin", password_env: str | None = None) -> None:
        if channel < 1:
            raise ValueError(f"channel: expected 1, 2, 3 …, got {channel}")
        self._plug = Appliance(f"tasmota {host}", host, user, password_env)
        self._user, self._channel = user, channel
        self._status = "Status 8"

    def open(self) -> None:
        self._status = "Status 8"
        if self._energy() is None:
            self._status = "Status 10"
        power = self._power()
        self.rails = self.total_rails = (f"ENERGY {self._channel}",)
        self.accuracy = (Accuracy(0.05, 0.0, _step(power), 1.0),)

    def read(self) -> Reading:
        return Reading((float(self._power()),))

    def switch(self, *, on: bool) -> None:
        word = "ON" if on else "OFF"
        told = self._asked(f"Power{'' if self._channel == 1 else self._channel} {word}")
        state = next((value for key, value in told.items() if key.startswith("POWER")), None)
        if state != word:
            raise MeterError(f"{self._plug.who}: it was told to switch {word}, and answers {str(told)[:80]}")

    def _power(self) -> Decimal:
        energy = self._energy()
        power = energy.get("Power") if energy is not None else None
        if isinstance(power, list):  # of each relay
            power = power[self._channel - 1] if self._channel <= len(power) else None
        elif self._channel > 1:
            power = None
        if isinstance(power, bool) or not isinstance(power, (int, Decimal)):
            raise MeterError(
                f"{self._plug.who}: it tells no power of channel {self._channel}: this plug measures none, or another "
                f"channel, which count from 1"
            )
        return Decimal(power)

    def _energy(self) -> dict[str, Any] | None:
        sensors = self._asked(self._status).get("StatusSNS")
        found = sensors.get("ENERGY") if isinstance(sensors, dict) else None
        return found if isinstance(found, dict) else None

    def _asked(self, command: str) -> dict[str, Any]:
        password = self._plug.password
        login = {} if password is None else {"user": self._user, "password": password}
        told = self._plug.ask("/cm", {**login, "cmnd": command}, parse_float=Decimal)
        if not isinstance(told, dict):
            raise MeterError(f"{self._plug.who}: what answers there is no Tasmota: {str(told)[:80]}")
        if "WARNING" in told:  # it asks for a password with a 200
            wrong = (
                "does not take the one that it was given" if login else "name it in the inventory: password_env: NAME"
            )
            raise MeterError(f"{self._plug.who}: it asks for a password ({told['WARNING']}); {wrong}")
        return told


def _step(power: Decimal) -> float:
    """The last decimal that it tells; whole watts without one."""
    exponent = power.as_tuple().exponent
    return 10.0 ** min(0, exponent) if isinstance(exponent, int) else 1.0
