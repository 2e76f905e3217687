"""The rails of a Jetson as jtop.service tells them (jetson-stats), for boards where that is what a lab relies on.

    meter: jtop
    meter:
      jtop: {python: /usr/bin/python3}      # one that has jetson-stats, instead of the node's own

It needs the service (sudo pip install jetson-stats), a user in the group `jtop`, and the client of the same major and
minor version: in the node's environment (pip install jetson-stats), or in the Python of the system, where the
service has it from.  jetson-stats is under the AGPL and no part of the testbed.  `ina3221` reads the same sensors
without any of this, far more often and with less disturbance: the service reads everything of the board at every
pass, which was seen to cost about 1 W on a Nano (https://github.com/rbonghi/jetson_stats/issues/73), and it was seen
to die under load (issues 485, 510).

What is taken is `power` of each rail, in milliwatts.  `avg` is not used: it is (power + avg before) // 2, so neither a
mean over any time nor a whole number of anything.  The total is a rail only where the board has one (`VDD_IN`,
`POM_5V_IN`, `VIN`); elsewhere jtop adds up all rails, which counts those twice that feed others, and is left out.
A sample has no time of its own, but the uptime that it was gathered at: that is the time of the reading.

The client runs beside the agent, in a process of its own (_jtop_client.py), which asks again when the service is gone.
The first client of the service sets its interval, for all: 0.5 s here (below 0.2 s it becomes unstable, issue 414), and
a longer one of another client is refused, because it would be found as gaps.

Tried on: no board yet; against the service of jetson-stats 7.2.2 itself, on a tree of files that was reconstructed.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import MeterError
from testbed.meters import Accuracy, Meter, Reading

if TYPE_CHECKING:
    import subprocess

_CLIENT = Path(__file__).with_name("_jtop_client.py")
_SYSTEM_PYTHON = "/usr/bin/python3"
#: An assumption: jtop does not tell what sensor, shunt and offset are behind a rail.
_GAIN = 0.05
#: A client starts, connects and gets its first sample in so long, on a slow board too.
_FIRST_SECONDS = 20.0
#: The client says after 3 s that the service is silent; if it does not even do that, it is itself in trouble.
_STALE_SECONDS = 6.0
_READ_BYTES = 1 << 16


class JtopMeter(Meter):
    """What jtop.service says; `python` is the one to run the client with."""

    period_seconds = 0.5

    def __init__(self, python: str | None = None) -> None:
        self._pythons = (python,) if python else tuple(dict.fromkeys((sys.executable, _SYSTEM_PYTHON)))
        self._process: subprocess.Popen[bytes] | None = None
        self._python = ""  # the one that has the client
        self._rest = b""
        self._said: dict[str, Any] = {}
        self._gathered = 0.0  # when the last sample was, in seconds since 1970

    def open(self) -> None:
        """Start the client and wait for its first sample; raises MeterError with what is missing."""
        try:
            said = self._first()
            self._describe(said)
        except MeterError:
            self.close()
            raise

    def read(self) -> Reading:
        """The last sample, at its time; raises MeterError while the service is gone or silent."""
        if self._process is None:
            raise MeterError("the meter jtop is not open")
        if not self._listen():
            self._start(self._python)
            raise MeterError("the client of jtop.service has ended; it was started again")
        if "error" in self._said:
            raise MeterError(_in_words(self._said["error"]))
        if not self._said or _age(self._said) > _STALE_SECONDS:
            raise MeterError("nothing is heard of jtop.service; see: journalctl -u jtop")
        watts = _watts(self._said)
        if missing := [rail for rail in self.rails if rail not in watts]:
            raise MeterError(f"jtop.service tells nothing of the rail {missing[0]} now")
        return Reading(tuple(watts[rail] for rail in self.rails), unix_seconds=self._gathered)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None and process.stdout is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _first(self) -> dict[str, Any]:
        """A fresh sample, by the first Python that has the client."""
        lacking = ""
        for python in self._pythons:
            self._python = python
            self._start(python)
            said = self._wait(time.monotonic() + _FIRST_SECONDS)
            if "error" in said:
                raise MeterError(_in_words(said["error"]))
            if "lacks" not in said:
                return said
            lacking = said["lacks"]
            self.close()
        raise MeterError(
            f"the client of jtop.service is not installed for {' or '.join(self._pythons)} ({lacking}); "
            f"pip install jetson-stats there, or name a Python that has jetson-stats: python: /usr/bin/python3"
        )

    def _describe(self, said: dict[str, Any]) -> None:
        if not (watts := _watts(said)):
            raise MeterError("jtop.service knows no power sensor on this board")
        if said["interval"] > self.period_seconds:
            raise MeterError(
                f"jtop.service samples every {said['interval']:g} s, as another client of it wishes that was there "
                f"first; end that one (a jtop in a terminal, say), or measure with ina3221"
            )
        total = said["power"]["tot"].get("name")
        self.rails = tuple(sorted(watts, key=lambda rail: (rail != total, rail)))
        self.total_rails = (total,) if total else ()
        # A pass of the service is stamped at its beginning, and power is read somewhere in it.
        self.accuracy = (Accuracy(_GAIN, timing_seconds=said["interval"]),) * len(self.rails)

    def _start(self, python: str) -> None:
        import subprocess  # not small, and wanted by few

        self.close()
        self._rest, self._said = b"", {}
        try:
            self._process = subprocess.Popen(
                [python, "-I", str(_CLIENT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise MeterError(f"the client of jtop.service cannot be started by {python}: {error.strerror}") from None
        os.set_blocking(self._output, False)

    def _wait(self, until: float) -> dict[str, Any]:
        """What the client says first that counts: why it cannot, or a sample of now (the service keeps an old one)."""
        while (left := until - time.monotonic()) > 0:
            select.select([self._output], [], [], left)
            alive = self._listen()
            if "error" in self._said or "lacks" in self._said:
                return self._said
            if self._said and _age(self._said) <= _STALE_SECONDS:
                return self._said
            if not alive:
                raise MeterError(f"the client of jtop.service ended at once; try it: {self._python} -I {_CLIENT}")
        raise MeterError(f"jtop.service has sent nothing within {_FIRST_SECONDS:g} s; see: journalctl -u jtop")

    def _listen(self) -> bool:
        """Take in what the client has said, the last of which holds; False when it has ended."""
        while True:
            try:
                data = os.read(self._output, _READ_BYTES)
            except BlockingIOError:
                return True
            if not data:
                return False
            *lines, self._rest = (self._rest + data).split(b"\n")
            if lines:
                self._said = json.loads(lines[-1])
                if "uptime" in self._said:
                    self._gathered = time.time() - _age(self._said)

    @property
    def _output(self) -> int:
        if self._process is None or self._process.stdout is None:
            raise MeterError("the meter jtop is not open")
        return self._process.stdout.fileno()


def _watts(said: dict[str, Any]) -> dict[str, float]:
    """Rail → power, the total among them where the board measures it."""
    power = said["power"] or {}
    rails = {name: rail for name, rail in power.get("rail", {}).items() if rail.get("online", True)}
    total = power.get("tot", {})
    if "name" in total:
        rails[total["name"]] = total
    return {name: rail["power"] / 1000 for name, rail in rails.items()}


def _age(said: dict[str, Any]) -> float:
    """Seconds since that was gathered: /proc/uptime is this clock."""
    return float(time.clock_gettime(time.CLOCK_BOOTTIME) - said["uptime"])


def _in_words(error: str) -> str:
    """What the client of jetson-stats says, for our user."""
    import re

    if versions := re.search(r"service: \[(.*?)\] and client: \[(.*?)\]", error):
        service, client = versions.groups()
        fitting = ".".join(service.split(".")[:2])
        return (
            f"jtop.service is of version {service} and its client of {client}, which must agree in major and minor; "
            f'install the service\'s here (pip install "jetson-stats=={fitting}.*"), or name the Python that it has '
            f"itself (python: {_SYSTEM_PYTHON})"
        )
    if "not active" in error:
        return "jtop.service does not run on this machine: sudo systemctl start jtop (sudo jtop --install-service)"
    if "can't access" in error:
        return "the agent's user may not use jtop.service: sudo usermod -aG jtop USER, and log in again"
    if "Lost connection" in error:
        return "jtop.service has ended; it is asked again as soon as it runs (journalctl -u jtop)"
    return f"jtop.service: {' '.join(error.split())}"
