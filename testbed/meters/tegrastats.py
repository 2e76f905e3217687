"""NVIDIA's tegrastats as a meter, for a Jetson whose sensors cannot be read by themselves: prefer `ina3221`.

    meter: tegrastats
    meter:
      tegrastats: {interval_seconds: 0.5}

The program runs beside the job and costs processor time of its own.  Of a line only the present power of each rail is
taken: the figures behind the stroke are its average (and highest) since the program began.

    POM_5V_IN 2532/2698                     JetPack 4, in mW
    VDD_IN 5316mW/5316mW                    JetPack 5 and 6
    VDD_IN 5139mW/5139mW/5139mW             JetPack 7

A line is noticed when it is read, up to an interval after it was written; a reading that finds no new line gives the
last one again, with its time.  Accuracy is that of the INA3221 behind it, at an assumed voltage and shunt (unverified).
Options: https://docs.nvidia.com/jetson/archives/r36.4.3/DeveloperGuide/AT/JetsonLinuxDevelopmentTools/TegrastatsUtility.html
Tried on: lines that were published from Nano, Xavier, Orin Nano and AGX Orin; on no board yet.
"""

from __future__ import annotations

import os
import re
import select
import time
from typing import TYPE_CHECKING

from testbed.errors import MeterError
from testbed.meters import Accuracy, Meter, Reading
from testbed.meters.ina3221 import accuracy, shunt_ohms, total_of

if TYPE_CHECKING:
    from subprocess import Popen

_RAIL = re.compile(r"(?<!\S)(\w+) (\d+)(?:mW(?:/\d+mW)*|/\d+)(?!\S)")
#: How long the first line may take, beyond three intervals.
_PATIENCE_SECONDS = 5.0
#: AGX Orin's GPU and CPU rails carry the input of the module, 20 V; the others 5 V.  Inferred from published readings.
_INPUT_VOLTS, _INPUT_RAILS = 20.0, frozenset({"VDD_GPU_SOC", "VDD_CPU_CV"})
_VOLTS = 5.0
_MOST_BYTES = 1 << 16


class Tegrastats(Meter):
    """Runs `program`, told to print a line every `interval_seconds`."""

    period_seconds: float = 0.2
    point = "module_rail"

    def __init__(self, interval_seconds: float = 0.2, program: str = "tegrastats") -> None:
        if not 0.001 <= interval_seconds <= 60:
            raise ValueError(f"interval_seconds: expected 0.001 to 60 seconds, got {interval_seconds}")
        self._interval_seconds, self._program = interval_seconds, program
        self._child: Popen[bytes] | None = None
        self._pending = b""
        self._newest: Reading | None = None
        self._heard = 0.0  # by the monotonic clock

    def open(self) -> None:
        """Raises MeterError when there is no such program, or its lines tell no rail."""
        self.close()
        self._begin()
        watts = power(self._first_line())
        if not watts:
            self.close()
            raise MeterError(
                f"{self._program} tells no power on this board (perhaps only root is told); choose another meter, or "
                "`meter: none`"
            )
        self.rails = tuple(watts)
        self.total_rails = total_of(self.rails)
        self.accuracy = tuple(self._accuracy(rail) for rail in self.rails)
        self._take(tuple(watts.values()))

    def read(self) -> Reading:
        """The newest line; raises MeterError when it stopped printing, and begins it anew the next time."""
        try:
            return self._read()
        except MeterError:
            self.close()
            raise

    def close(self) -> None:
        child, self._child = self._child, None
        self._pending, self._newest = b"", None
        if child is not None:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()

    def _read(self) -> Reading:
        if self._child is None:
            self._begin()
            line: str | None = self._first_line()
        else:
            line = self._newest_line()
        if line is not None:
            watts = power(line)
            missing = [rail for rail in self.rails if rail not in watts]
            if missing:
                raise MeterError(f"{self._program}: its line lacks {', '.join(missing)}")
            self._take(tuple(watts[rail] for rail in self.rails))
        if self._newest is None or time.monotonic() - self._heard > self._longest_silence():
            raise MeterError(self._silent())
        return self._newest

    def _take(self, watts: tuple[float, ...]) -> None:
        self._newest, self._heard = Reading(watts, unix_seconds=time.time()), time.monotonic()

    def _silent(self) -> str:
        return f"{self._program} has printed nothing for {self._longest_silence():g} s"

    def _longest_silence(self) -> float:
        return 3 * self._interval_seconds + _PATIENCE_SECONDS

    def _accuracy(self, rail: str) -> Accuracy:
        volts = _INPUT_VOLTS if rail in _INPUT_RAILS else _VOLTS
        return accuracy(shunt_ohms(rail), volts, self._interval_seconds)

    def _begin(self) -> None:
        import subprocess

        command = [self._program, "--interval", str(round(self._interval_seconds * 1000))]
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
        except OSError as error:
            raise MeterError(
                f"{self._program} cannot be run: {error.strerror}; this is no Jetson, or it is not on the path: choose "
                "another meter, or `meter: none`"
            ) from None
        os.set_blocking(self._output(), False)

    def _output(self) -> int:
        if self._child is None or self._child.stdout is None:
            raise MeterError(f"{self._program} does not run")
        return self._child.stdout.fileno()

    def _first_line(self) -> str:
        """Waited for."""
        until = time.monotonic() + self._longest_silence()
        poll = select.poll()
        poll.register(self._output(), select.POLLIN)
        while True:
            line = self._newest_line()
            if line is not None:
                return line
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                self.close()
                raise MeterError(self._silent())

    def _newest_line(self) -> str | None:
        """The last whole line that has come, of those that were not read yet."""
        while True:
            try:
                data = os.read(self._output(), _MOST_BYTES)
            except BlockingIOError:
                break
            if not data:
                code = self._child.wait() if self._child is not None else None
                self.close()
                raise MeterError(f"{self._program} has ended (exit code {code})")
            self._pending += data
        lines, _, self._pending = self._pending.rpartition(b"\n")
        return lines.rpartition(b"\n")[2].decode("utf-8", "replace") if lines else None


def power(line: str) -> dict[str, float]:
    """The present power of each rail in watts, of a line of tegrastats; {} when it tells none."""
    return {rail: int(milliwatts) / 1000 for rail, milliwatts in _RAIL.findall(line)}
