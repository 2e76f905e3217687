"""The power management chip of a Raspberry Pi 5: voltage and current of its twelve rails, told by the firmware.

    meter: rpi_pmic

`pmic_read_adc` is asked through the firmware's mailbox (/dev/vcio, root's and the group video's), as vcgencmd of
https://github.com/raspberrypi/utils does it, and by the program vcgencmd where there is no such file.  Newer kernels
also have a mailbox for questions alone: `rpi_pmic: {device: /dev/vcio_gencmd}`.  A rail is one that has a voltage and a
current of its name; EXT5V and BATT have no current.

The rails' sum is what the chip gives out, not what the board takes in: its own loss, and whatever hangs on the 5 V
(USB, HATs, NVMe), is in none of them.  Raspberry Pi 4 and older measure no current.

No figure of accuracy is published: the one here is an assumption, and wide.  `testbed calibrate` against a meter of the
supply puts a measured one in its place; published fits (https://github.com/jfikar/RPi5-power: 1.15 times the sum plus
0.6 W) differ from each other by a few per cent.
Tried on: a reconstructed answer; the mailbox on no board yet.
"""

from __future__ import annotations

import os
import re
import struct

from testbed.errors import MeterError
from testbed.meters import Accuracy, Meter, Reading
from testbed.meters._sysfs import user

_COMMAND = "pmic_read_adc"
#: Of every rail; unverified.
_ACCURACY = Accuracy(gain=0.05)
_LINE = re.compile(
    r"^\s*(?P<rail>\w+)_(?P<kind>[AV])\s+(?:current|volt)\(\d+\)=(?P<value>-?\d+(?:\.\d+)?)(?P=kind)\s*$"
)
_WAY_OUT = "choose another meter, or `meter: none`"

# The mailbox: vcgencmd/vcgencmd.c (raspberrypi/utils), drivers/char/broadcom/vcio.c (raspberrypi/linux).
_GET_GENCMD_RESULT = 0x00030080
_TEXT_BYTES = 1024
#: Size of all, code · tag, size of its value, length, error, text · end tag.
_MESSAGE = struct.Struct(f"=6I{_TEXT_BYTES}sI")
_READ_WRITE, _MAGIC = 3, 100
#: _IOWR(100, 0, char *)
_IOCTL_MBOX_PROPERTY = _READ_WRITE << 30 | struct.calcsize("P") << 16 | _MAGIC << 8


class RaspberryPiPmic(Meter):
    """`device` is the mailbox, `program` what is asked where there is none."""

    period_seconds: float = 0.1
    point = "soc_pmic"

    def __init__(self, device: str = "/dev/vcio", program: str = "vcgencmd") -> None:
        self._device, self._program = device, program
        self._fd = -1

    def open(self) -> None:
        """Raises MeterError on a board without this chip, and for a user who may not ask it."""
        self.close()
        try:
            watts = rails(self._answer())
        except MeterError:
            self.close()
            raise
        self.rails = self.total_rails = tuple(watts)
        self.accuracy = (_ACCURACY,) * len(watts)

    def read(self) -> Reading:
        """Raises MeterError when the firmware gives no answer, or leaves out a rail."""
        try:
            watts = rails(self._answer())
        except MeterError:
            self.close()
            raise
        missing = [rail for rail in self.rails if rail not in watts]
        if missing:
            raise MeterError(f"{_COMMAND}: the answer lacks {', '.join(missing)}")
        return Reading(tuple(watts[rail] for rail in self.rails))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _answer(self) -> str:
        if self._fd < 0:
            try:
                self._fd = os.open(self._device, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return self._answer_of_program()
            except PermissionError:
                raise MeterError(self._forbidden()) from None
            except OSError as error:
                raise MeterError(f"{self._device} cannot be opened: {error.strerror}; {_WAY_OUT}") from None
        return self._answer_of_mailbox()

    def _answer_of_mailbox(self) -> str:
        import fcntl

        message = question(_COMMAND)
        try:
            fcntl.ioctl(self._fd, _IOCTL_MBOX_PROPERTY, message, True)
        except OSError as error:
            raise MeterError(f"{self._device}: the firmware gives no answer: {error.strerror}") from None
        return answer(message)

    def _answer_of_program(self) -> str:
        import subprocess

        try:
            done = subprocess.run(
                [self._program, _COMMAND], capture_output=True, text=True, errors="replace", timeout=5, check=False
            )
        except FileNotFoundError:
            raise MeterError(
                f"there is neither {self._device} nor the program {self._program}: this is no Raspberry Pi 5; "
                f"{_WAY_OUT}"
            ) from None
        except (OSError, subprocess.SubprocessError) as error:
            raise MeterError(f"{self._program} {_COMMAND} gives no answer: {error}") from None
        if "open device file" in done.stdout:
            raise MeterError(self._forbidden())
        if done.returncode != 0:
            raise MeterError(_refused(done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}"))
        return done.stdout

    def _forbidden(self) -> str:
        return (
            f"{self._device}: {user()} may not ask the firmware: it takes the group video; `testbed provision` sees to "
            "it, and counts from the next login"
        )


def rails(told: str) -> dict[str, float]:
    """The power of each rail in watts, of an answer to pmic_read_adc; raises MeterError when it names none.

    A voltage and a current belong together by their names; the numbers in brackets differ.
    """
    found: dict[str, dict[str, float]] = {"A": {}, "V": {}}
    for match in filter(None, map(_LINE.match, told.splitlines())):
        found[match["kind"]][match["rail"]] = float(match["value"])
    volts = found["V"]
    watts = {rail: amperes * volts[rail] for rail, amperes in found["A"].items() if rail in volts}
    if not watts:
        raise MeterError(_refused(told.strip()[:200] or "nothing"))
    return watts


def question(command: str) -> bytearray:
    """What the mailbox is given; the answer comes in its place."""
    return bytearray(_MESSAGE.pack(_MESSAGE.size, 0, _GET_GENCMD_RESULT, _TEXT_BYTES, 0, 0, command.encode("ascii"), 0))


def answer(message: bytearray) -> str:
    """The text of an answer; raises MeterError when it is an error."""
    *_, error, raw, _ = _MESSAGE.unpack(message)
    said = bytes(raw).partition(b"\0")[0].decode("utf-8", "replace")
    if error:
        raise MeterError(_refused(said.strip() or f"error {error}"))
    return said


def _refused(said: str) -> str:
    if "not registered" in said:
        return f"this board's firmware has no {_COMMAND}: only Raspberry Pi 5 measures currents; {_WAY_OUT}"
    return f"{_COMMAND}: expected voltages and currents, got {said}; {_WAY_OUT}"
