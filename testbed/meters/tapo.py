"""A TP-Link Tapo plug that measures (P110, P115, …), or a Kasa plug with an account; it is a switch, too.

    meter:
      tapo: {host: 192.0.2.10, user_env: TAPO_USER, password_env: TAPO_PASSWORD}

Through python-kasa, which is installed with `pip install python-kasa` (GPL-3.0-or-later).  The controller
reads it.  The account is that of the vendor's app; its name and password are in environment variables, never in the
file.  The plug is found by a question to UDP ports 9999 and 20002, which a firewall between must let through.

Accuracy: unverified, as for `kasa`.  It tells the energy of a day and a month, no counter that only grows.

Tried on: nothing yet.
"""

from __future__ import annotations

import os
from typing import Any

from testbed.errors import MeterError
from testbed.meters._kasa import TIMEOUT_SECONDS, KasaPlug


class TapoMeter(KasaPlug):
    """`user_env` and `password_env` name the environment variables that hold the account."""

    def __init__(self, host: str, user_env: str, password_env: str, outlet: int | None = None) -> None:
        super().__init__(f"tapo {host}", outlet)
        self._host, self._variables = host, (user_env, password_env)

    async def connect(self, kasa: Any) -> Any:
        for variable in self._variables:
            if not os.environ.get(variable):
                raise MeterError(
                    f"{self._who}: its account is to be in the environment variable {variable}, which is not set"
                )
        user, password = (os.environ[variable] for variable in self._variables)
        credentials = kasa.Credentials(user, password)
        return await kasa.Discover.discover_single(
            self._host, credentials=credentials, timeout=TIMEOUT_SECONDS, discovery_timeout=TIMEOUT_SECONDS
        )
