"""An inline power sensor behind a kernel driver: INA219, INA226, INA228, INA237, INA238 or INA260 on a board's I²C bus.

    meter: hwmon                                        # the only inline sensor there is
    meter:
      hwmon: {path: /sys/bus/i2c/devices/1-0041}        # this one; hwmon numbers change from boot to boot
      hwmon: {name: ina226, shunt_ohms: 0.1}            # by chip; the driver reckons with another shunt than there is
      hwmon: {label: supply}                            # by the label of a channel or chip

The kernel is told of a sensor on a bus once per boot, by root, or by its device tree:

    echo ina226 0x40 > /sys/bus/i2c/devices/i2c-1/new_device

Its driver then takes the shunt for 10 mΩ unless it is told otherwise, by the device tree or in the chip's file
shunt_resistor (µΩ): with another shunt every reading is wrong by that factor, which `shunt_ohms` mends.

Any other chip of hwmon with power1_input (or in1_input and curr1_input, of one number) does when it is named; a
Jetson's own INA3221 is never taken for an inline sensor unless `name: ina3221` or its path says so.  A chip that counts
energy (INA228) gives its counter too.
Files: https://docs.kernel.org/hwmon/ina2xx.html, ina238.html and sysfs-interface.html.
Tried on: nothing yet.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from testbed.errors import MeterError
from testbed.meters import Accuracy, Reading
from testbed.meters._sysfs import Channel, NumberFile, SysfsMeter, is_connected, text, whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLASS = "sys/class/hwmon"
_INA3221 = "ina3221"
_MOST_CHANNELS = 8
#: What the drivers reckon with unless told otherwise (INA2XX_RSHUNT_DEFAULT, INA238_RSHUNT_DEFAULT).
_SHUNT_OHMS = 0.01
#: Of the shunt on a breakout board; 1 % on Adafruit's INA219, of others unverified.
_SHUNT_TOLERANCE = 0.01
#: Of a chip of which no datasheet was read.
_UNKNOWN_GAIN, _UNKNOWN_SECONDS = 0.05, 0.1


class _Chip(NamedTuple):
    """Maxima of a chip's datasheet, and how long its driver has it average.

    gain                of power, over temperature, without the shunt
    shunt_offset_volts, bus_offset_volts
    shunt_step_volts    the least that two readings of the shunt differ by
    power_step          the same of the power register, in steps of the current (V)
    seconds             conversion of both, times the samples of the driver's default
    shunt_ohms          built in; None: outside
    energy_gain         of its energy counter
    """

    gain: float
    shunt_offset_volts: float
    bus_offset_volts: float
    shunt_step_volts: float
    power_step: float
    seconds: float
    shunt_ohms: float | None = None
    energy_gain: float = 0.0


#: Datasheets: https://www.ti.com/lit/gpn/ina219 (SBOS448G; grade A, gain 8), ina226 (SBOS547B), ina260 (SBOS656C),
#: ina228-q1 (SLYS022A), ina237-q1 (SBOSA27A), ina238-q1 (SLYS026A).  Gains: of both voltages, over temperature (where
#: only a drift is given, 50 ppm/°C over 40 °C), and of power where that is given (228, 237, 238).  Unverified: the gain
#: of INA260 over temperature, and the bus offsets of INA260, INA228 and INA237.
_CHIPS = {
    "ina219": _Chip(math.hypot(0.01, 0.01), 200e-6, 0.0, 10e-6, 20, 1.1e-3),
    "ina220": _Chip(math.hypot(0.01, 0.01), 200e-6, 0.0, 10e-6, 20, 1.1e-3),
    "ina226": _Chip(math.hypot(0.001, 0.001, 0.002, 0.002), 10e-6, 7.5e-3, 2.5e-6, 25, 35.2e-3),
    "ina260": _Chip(math.hypot(0.005, 0.001, 0.002), 10e-6, 7.5e-3, 2.5e-6, 8, 35.2e-3, 0.002),
    "ina228": _Chip(0.005, 1e-6, 5e-3, 312.5e-9, 3.2, 50.5e-3, energy_gain=0.01),
    "ina237": _Chip(0.016, 50e-6, 50e-3, 5e-6, 0.2, 50.5e-3),
    "ina238": _Chip(0.007, 5e-6, 5e-3, 5e-6, 0.2, 50.5e-3),
}
#: Chips that are put into a supply line: taken without being named.
_INLINE = frozenset({*_CHIPS, "ina230", "ina231", "ina700", "ina780", "sq52206", "sy24655"})


class Hwmon(SysfsMeter):
    """One chip of hwmon, chosen by `name`, `path` or `label` where there are several.

    shunt_ohms  the shunt that is really there, where the driver reckons with another
    root        where the board's tree begins, for one that was recorded
    """

    period_seconds: float = 0.02
    point = "dc_input"

    def __init__(
        self,
        name: str | None = None,
        path: str | None = None,
        label: str | None = None,
        shunt_ohms: float | None = None,
        root: str = "/",
    ) -> None:
        super().__init__(root)
        if shunt_ohms is not None and not shunt_ohms > 0:
            raise ValueError(f"shunt_ohms: expected more than 0 Ω, got {shunt_ohms}")
        self._name, self._path, self._label, self._shunt_ohms = name, path, label, shunt_ohms
        self._chip = ""
        self._counted: list[float] = []
        self._before: list[float] = []

    def open(self) -> None:
        """Raises MeterError when no sensor fits, or several do, or a file of it cannot be read."""
        self._counted, self._before = [], []
        super().open()
        self.total_rails = self.rails if len(self.rails) == 1 else ()

    def _find(self) -> list[Channel]:
        folder = self._folder()
        self._chip = text(folder / "name") or ""
        channels = [self._with_shunt(channel) for channel in self._channels_of(folder)]
        self.has_counters = all(channel.energy is not None for channel in channels)
        return channels

    def _folder(self) -> Path:
        """The folder of the one chip that is meant."""
        fitting = [folder for folder in self._candidates() if list(self._channels_of(folder))]
        if not fitting:
            raise MeterError(self._nothing_fits())
        if len(fitting) > 1:
            found = ", ".join(f"{text(folder / 'name')} at {folder}" for folder in fitting)
            raise MeterError(
                f"several sensors fit: {found}; say which by `path`, best one below /sys/bus/i2c/devices: hwmon "
                "numbers change from boot to boot"
            )
        return fitting[0]

    def _candidates(self) -> list[Path]:
        if self._path is not None:
            path = self._root / self._path.lstrip("/")
            below = sorted(path.glob("hwmon/hwmon*"))
            return [folder for folder in (below or [path]) if self._name in (None, text(folder / "name"))]
        wanted = _INLINE if self._name is None else {self._name}
        # A label means its chip, whatever that is called: only a Jetson's own sensor still has to be named.
        any_chip = self._name is None and self._label is not None
        return [
            folder
            for folder in self._all_folders()
            if text(folder / "name") in wanted or (any_chip and text(folder / "name") != _INA3221)
        ]

    def _all_folders(self) -> list[Path]:
        return sorted((self._root / _CLASS).glob("hwmon*"), key=lambda folder: (len(folder.name), folder.name))

    def _channels_of(self, folder: Path) -> Iterator[Channel]:
        for channel in _channels(folder):
            if self._label in (None, channel.rail, text(folder / "label")):
                yield channel

    def _with_shunt(self, channel: Channel) -> Channel:
        """A channel whose power is that of the shunt that is really there."""
        if self._shunt_ohms is None:
            return channel
        if channel.shunt_ohms is None:
            raise MeterError(
                f"{self._chip} does not tell the shunt that its driver reckons with (no shunt_resistor): leave out "
                "shunt_ohms, and tell the driver by the device tree"
            )
        factor = channel.shunt_ohms / self._shunt_ohms
        return channel._replace(
            unit=channel.unit * factor, energy_unit=channel.energy_unit * factor, shunt_ohms=self._shunt_ohms
        )

    def _reading(self, channels: list[Channel]) -> Reading:
        reading = super()._reading(channels)
        return reading._replace(joules=self._joules(channels)) if self.has_counters else reading

    def _joules(self, channels: list[Channel]) -> tuple[float, ...]:
        """The counters, which never go back: what they had before a chip was reset is added."""
        counted = [channel.energy.read() * channel.energy_unit for channel in channels if channel.energy is not None]
        last, self._counted = self._counted or counted, counted
        self._before = self._before or [0.0] * len(counted)
        if any(now < then for now, then in zip(counted, last, strict=True)):
            self._before = [before + then for before, then in zip(self._before, last, strict=True)]
            raise MeterError(f"{self._chip}: its energy counter has begun anew: the chip was reset")
        return tuple(before + now for before, now in zip(self._before, counted, strict=True))

    def _accuracy(self, channel: Channel) -> Accuracy:
        chip = _CHIPS.get(self._chip)
        if chip is None:
            return Accuracy(_UNKNOWN_GAIN, timing_seconds=channel.seconds or _UNKNOWN_SECONDS)
        volts = channel.bus_volts()
        ohms = chip.shunt_ohms or channel.shunt_ohms or _SHUNT_OHMS
        tolerance = 0.0 if chip.shunt_ohms else _SHUNT_TOLERANCE
        gain = max(chip.gain, chip.energy_gain if self.has_counters else 0.0)
        return Accuracy(
            math.hypot(gain, tolerance, chip.bus_offset_volts / volts),
            chip.shunt_offset_volts / ohms * volts,
            chip.shunt_step_volts / ohms * max(volts, chip.power_step),
            channel.seconds or chip.seconds,
        )

    def _nothing_fits(self) -> str:
        there = ", ".join(sorted({text(folder / "name") or folder.name for folder in self._all_folders()})) or "none"
        asked = {"path": self._path, "name": self._name, "label": self._label}
        wanted = ", ".join(f"{key} {value}" for key, value in asked.items() if value is not None)
        return (
            f"there is no {f'power sensor with {wanted}' if wanted else 'inline power sensor'} below "
            f"{self._root / _CLASS} (chips there: {there}): name one with `name`, bind its driver (echo ina226 0x40 > "
            "/sys/bus/i2c/devices/i2c-1/new_device), choose another meter, or `meter: none`"
        )


def _channels(folder: Path) -> Iterator[Channel]:
    """Every channel of a chip whose power is told, or follows from voltage and current of the same number."""
    chip = text(folder / "name")
    interval = whole_number(folder / "update_interval")
    for number in range(1, 1 + (3 if chip == _INA3221 else _MOST_CHANNELS)):
        power, volts = folder / f"power{number}_input", folder / f"in{number}_input"
        current = folder / f"curr{number}_input"
        told = (power,) if power.exists() else (volts, current)
        rail = _rail(folder, str(chip), number)
        if not all(path.exists() for path in told) or not is_connected(rail):
            continue
        energy = folder / f"energy{number}_input"
        micro_ohms = whole_number(folder / "shunt_resistor") or whole_number(folder / f"shunt{number}_resistor")
        yield Channel(
            rail,
            tuple(map(NumberFile, told)),
            1e-6,  # power is in µW, and so is mV times mA
            NumberFile(volts) if volts.exists() else None,
            micro_ohms * 1e-6 if micro_ohms else None,
            (interval or 0) / 1000,
            NumberFile(energy) if energy.exists() else None,
        )


def _rail(folder: Path, chip: str, number: int) -> str:
    """The label of a channel, or of the chip, or the chip's name."""
    for kind in ("power", "in", "curr"):
        label = text(folder / f"{kind}{number}_label")
        if label:
            return label
    name = text(folder / "label") or re.sub(r"\W", "_", chip)
    return name if number == 1 else f"{name}_{number}"
