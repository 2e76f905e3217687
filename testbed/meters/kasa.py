"""A TP-Link Kasa plug that needs no account (HS110, KP115, HS300, …): read by the controller, and a switch.

    meter:
      kasa: {host: 192.0.2.9}
      kasa: {host: 192.0.2.9, outlet: 2}        # of a strip, counted from 0

Through python-kasa, which is installed with `pip install python-kasa` (GPL-3.0-or-later), by the protocol of
TCP port 9999.  A Kasa plug that asks for an account is read with the meter `tapo`.

Accuracy: unverified.  No figure of the vendor is known to us; 5 % is what plugs of the cheap class are tested to
(https://digilogicinfocom.com/blog/smart-plug-energy-monitoring).  `testbed calibrate` finds out.

Its energy counter goes back to 0 when it restarts, and is not used.

Tried on: python-kasa 0.12.0 against a stand-in that speaks the protocol and answers as an HS110; on no plug yet.
"""

from __future__ import annotations

from typing import Any

from testbed.meters._kasa import TIMEOUT_SECONDS, KasaPlug


class KasaMeter(KasaPlug):
    """`port` where it is not 9999, as behind a port that is forwarded."""

    def __init__(self, host: str, outlet: int | None = None, port: int | None = None) -> None:
        super().__init__(f"kasa {host}", outlet)
        self._host, self._port = host, port

    async def connect(self, kasa: Any) -> Any:
        config = kasa.DeviceConfig(host=self._host, port_override=self._port, timeout=TIMEOUT_SECONDS)
        return await kasa.Device.connect(config=config)
