"""The INA3221 sensors that a Jetson has on its module: three rails each, read from the kernel's files.

    meter: ina3221

JetPack 5 to 7 (driver ina3221, below hwmon): voltage times current; JetPack 4 (driver ina3221x, below iio): power.
Rails keep the board's own names, in the order of chips and channels.  Channels that are not connected, disabled or
without a name are left out, and so is the sum of shunts, which is no rail.  The sum of the rails is not the board's
power: `total_rails` is the one rail that carries the whole input, and () where there is none (AGX Orin).

Files: https://docs.kernel.org/hwmon/ina3221.html; JetPack 4: drivers/staging/iio/meter/ina3221.c of NVIDIA's 4.9.
A file is read with as many registers as it needs, no more: the driver waits for a conversion at each.
Tried on: reconstructed trees of Nano, Xavier NX, Orin Nano, Orin NX and AGX Orin; on no board yet.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from testbed.errors import MeterError
from testbed.meters import Accuracy
from testbed.meters._sysfs import Channel, NumberFile, SysfsMeter, is_connected, text, whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_DEVICES = "sys/bus/i2c/devices"
_CHIPS = ("ina3221", "ina3221x")
#: A rail that carries the whole input of the module, on boards that have one.
_INPUTS = ("VDD_IN", "POM_5V_IN", "VIN")

# Maxima of https://www.ti.com/lit/gpn/ina3221 (SBOS576, electrical characteristics).
_GAIN_OF_SHUNT, _GAIN_OF_BUS = 0.0025, 0.0025
_DRIFT = 50e-6 * 40  # of either gain: 50 ppm/°C, 40 °C away from 25 °C
_SHUNT_OFFSET_VOLTS, _BUS_OFFSET_VOLTS = 80e-6, 16e-3
_SHUNT_STEP_VOLTS = 40e-6
#: Of the shunt resistors; unverified: no document of a module says it.
_SHUNT_TOLERANCE = 0.01
#: 5 mΩ on Orin NX and Nano, 2 mΩ on AGX Orin: mainline tegra234-p3767.dtsi and tegra234-p3701.dtsi; others unverified.
_SHUNT_OHMS = 0.005
_AGX_ORIN_SHUNT_OHMS = 0.002
_AGX_ORIN_RAILS = frozenset({"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"})
#: JetPack 4's driver averages 64 conversions of 2.2 ms of each channel; its sysfs does not tell, nor what a device tree
#: may have put in its place (unverified on a board).
_IIO_SECONDS = 64 * 3 * 2.2e-3


class Ina3221(SysfsMeter):
    """All INA3221 of a board; `root` is where its tree begins, for one that was recorded."""

    period_seconds: float = 0.02
    point = "module_rail"

    def open(self) -> None:
        """Raises MeterError when there is no INA3221, none of its channels is a rail, or a file cannot be read."""
        super().open()
        self.total_rails = total_of(self.rails)

    def _find(self) -> list[Channel]:
        devices = self._root / _DEVICES
        chips = [chip for chip in sorted(devices.glob("*-*"), key=_address) if text(chip / "name") in _CHIPS]
        if not chips:
            raise MeterError(
                f"there is no INA3221 below {devices}: this board has none, or its driver is not loaded; choose "
                "another meter, or `meter: none`"
            )
        channels: dict[str, Channel] = {}
        for chip in chips:
            for channel in (*_hwmon_channels(chip), *_iio_channels(chip)):
                rail = channel.rail if channel.rail not in channels else f"{channel.rail}@{chip.name}"
                channels[rail] = channel._replace(rail=rail)
        if not channels:
            names = ", ".join(str(chip) for chip in chips)
            raise MeterError(f"{names}: no channel has the name of a rail; choose another meter, or `meter: none`")
        return list(channels.values())

    def _accuracy(self, channel: Channel) -> Accuracy:
        return accuracy(channel.shunt_ohms or shunt_ohms(channel.rail), channel.bus_volts(), channel.seconds)


def accuracy(ohms: float, volts: float, seconds: float) -> Accuracy:
    """Of a rail with that shunt at that voltage; what is independent adds up as squares."""
    drifts = (_DRIFT, _DRIFT)
    gain = math.hypot(_GAIN_OF_SHUNT, _GAIN_OF_BUS, *drifts, _SHUNT_TOLERANCE, _BUS_OFFSET_VOLTS / volts)
    return Accuracy(gain, _SHUNT_OFFSET_VOLTS / ohms * volts, _SHUNT_STEP_VOLTS / ohms * volts, seconds)


def total_of(rails: Sequence[str]) -> tuple[str, ...]:
    """The one rail that carries the whole input; () where none does."""
    return tuple(rail for rail in _INPUTS if rail in rails)[:1]


def shunt_ohms(rail: str) -> float:
    """The shunt of a rail where the board does not tell it."""
    return _AGX_ORIN_SHUNT_OHMS if rail in _AGX_ORIN_RAILS else _SHUNT_OHMS


def _address(chip: Path) -> tuple[int, int]:
    """Bus and address of a folder such as 1-0040."""
    bus, _, address = chip.name.partition("-")
    try:
        return int(bus), int(address, 16)
    except ValueError:
        return -1, -1  # not a chip's: i2c-ABCD0001:00 and the like


def _hwmon_channels(chip: Path) -> Iterator[Channel]:
    for folder in sorted(chip.glob("hwmon/hwmon*")):
        interval = whole_number(folder / "update_interval")
        for number in (1, 2, 3):  # 4 to 6 are the shunts' voltages, 7 is their sum
            label = text(folder / f"in{number}_label")
            if is_connected(label) and text(folder / f"in{number}_enable") != "0":
                volts = NumberFile(folder / f"in{number}_input")
                micro_ohms = whole_number(folder / f"shunt{number}_resistor")
                yield Channel(
                    str(label),
                    (volts, NumberFile(folder / f"curr{number}_input")),
                    1e-6,
                    volts,
                    micro_ohms * 1e-6 if micro_ohms else None,
                    (interval or 0) / 1000,
                )


def _iio_channels(chip: Path) -> Iterator[Channel]:
    for folder in sorted(chip.glob("iio:device*")):
        for number in (0, 1, 2):
            label = text(folder / f"rail_name_{number}")
            if is_connected(label):
                power = NumberFile(folder / f"in_power{number}_input")
                volts = NumberFile(folder / f"in_voltage{number}_input")
                current = NumberFile(folder / f"in_current{number}_input")
                told = (volts, current) if not power.path.exists() else (power,)
                unit = 1e-6 if len(told) == 2 else 1e-3
                voltage = volts if volts.path.exists() else None
                yield Channel(str(label), told, unit, voltage, seconds=_IIO_SECONDS)
