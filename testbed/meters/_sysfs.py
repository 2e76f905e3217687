"""Meters whose figures stand in small files of the kernel: opened once, read again and again.

Opening such a file costs several times what reading it does.  After a reading that failed everything is looked for
anew, because the numbers in the paths may be others once a driver was bound again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from testbed.errors import MeterError
from testbed.meters import Accuracy, Meter, Reading

_MAX_BYTES = 64
#: What a sensor's voltage is taken for where nothing tells it: that of most boards' inputs.
_ASSUMED_VOLTS = 5.0
#: Below this the errors of a voltage are no longer told as a share of it.
_LOWEST_VOLTS = 1.0


class NumberFile:
    """A file with one whole number in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def read(self) -> int:
        """The number now; raises MeterError, and opens the file anew the next time."""
        try:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._fd, _MAX_BYTES, 0)
            return int(data)
        except OSError as error:
            self.close()
            raise MeterError(refusal(self.path, error)) from None
        except ValueError:
            self.close()
            raise MeterError(f"{self.path}: expected a whole number, got {data!r}") from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class Channel(NamedTuple):
    """A rail, and the files that tell its power: the product of `factors` times `unit` is in watts.

    volts       its voltage in mV, where that can be read
    shunt_ohms  None: not told
    seconds     how old a reading may be
    energy      its energy counter, and what one of its counts is in joules
    """

    rail: str
    factors: tuple[NumberFile, ...]
    unit: float
    volts: NumberFile | None = None
    shunt_ohms: float | None = None
    seconds: float = 0.0
    energy: NumberFile | None = None
    energy_unit: float = 1e-6

    def watts(self) -> float:
        power = self.unit
        for factor in self.factors:
            power *= factor.read()
        return power

    def bus_volts(self) -> float:
        """The voltage now, for what depends on it: the errors of a reading."""
        if self.volts is None:
            return _ASSUMED_VOLTS
        return max(self.volts.read() / 1000, _LOWEST_VOLTS)

    def close(self) -> None:
        for file in (*self.factors, self.volts, self.energy):
            if file is not None:
                file.close()


class SysfsMeter(Meter):
    """Base of the meters that read channels; a subclass finds them, and knows their errors."""

    def __init__(self, root: str = "/") -> None:
        self._root = Path(root)
        self._channels: list[Channel] = []

    def open(self) -> None:
        """Raises MeterError when there is no such sensor, no rail, or no right to read it."""
        self.close()
        self._channels = self._find()
        try:
            self.rails = tuple(channel.rail for channel in self._channels)
            self.accuracy = tuple(self._accuracy(channel) for channel in self._channels)
            self.read()
        except MeterError:
            self.close()
            raise

    def read(self) -> Reading:
        """Raises MeterError when a file cannot be read; the next reading looks for the sensor anew."""
        try:
            return self._reading(self._channels or self._found_again())
        except MeterError:
            self.close()
            raise

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._channels = []

    def _reading(self, channels: list[Channel]) -> Reading:
        return Reading(tuple([channel.watts() for channel in channels]))

    def _find(self) -> list[Channel]:
        """At least one channel; raises MeterError."""
        raise NotImplementedError

    def _accuracy(self, channel: Channel) -> Accuracy:
        """Of one rail, at the voltage that it has now."""
        raise NotImplementedError

    def _found_again(self) -> list[Channel]:
        channels = self._find()
        rails = tuple(channel.rail for channel in channels)
        if rails != self.rails:
            raise MeterError(
                f"the sensor now has the rails {', '.join(rails)}; it had {', '.join(self.rails)} when it was opened: "
                "begin the run anew"
            )
        self._channels = channels
        return channels


def text(path: Path) -> str | None:
    """What stands in a small file, without the space around it; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def whole_number(path: Path) -> int | None:
    """The number in a small file; None where there is none."""
    told = text(path)
    return int(told) if told is not None and told.isdigit() else None


def is_connected(label: str | None) -> bool:
    """Whether a channel's label is a rail's: NC stands for "not connected", (null) for a label that is missing."""
    return bool(label) and label != "(null)" and str(label).rstrip("_0123456789").upper() != "NC"


def refusal(path: Path | str, error: OSError) -> str:
    """What to say of a file that cannot be read."""
    if isinstance(error, PermissionError):
        return f"{path}: {user()} may not read it; `testbed provision` gives that right"
    return f"{path} cannot be read: {error.strerror}"


def user() -> str:
    """The name of whom this process acts for."""
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"
