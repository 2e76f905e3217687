"""Switches a device off and on, by the first of its meters that is a switch, too."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from testbed.errors import MeterError, UsageError
from testbed.meters import CONTROLLER, make, meter_class, names

if TYPE_CHECKING:
    from testbed.inventory import Device, MeterChoice

#: For which a device is off, so that its supply's capacitors are empty.
OFF_SECONDS = 5.0


def power_switch(device: Device) -> MeterChoice | None:
    """The first of the device's meters that can switch it; None where none can."""
    return next((choice for choice in device.meters if _switches(choice.name)), None)


def switch(device: Device, *, on: bool) -> str:
    """Switch a device on or off; the name of the meter that did.  Raises UsageError where none can, and MeterError."""
    choice = power_switch(device)
    if choice is None:
        raise UsageError(_no_switch(device))
    meter = make(choice.name, choice.settings)
    try:
        meter.switch(on=on)
    except MeterError as error:
        raise MeterError(f"device {device.name}: {error}") from None
    finally:
        meter.close()
    return choice.name


def power_cycle(device: Device, off_seconds: float = OFF_SECONDS) -> None:
    """Switch a device off and on again; raises UsageError where no meter can switch it, and MeterError."""
    switch(device, on=False)
    time.sleep(off_seconds)
    try:
        switch(device, on=True)
    except MeterError as error:
        raise MeterError(f"{error}; the device is off: switch it on with: testbed power on {device.name}") from None


def _switches(name: str) -> bool:
    kind = meter_class(name)
    return kind.can_switch and kind.where == CONTROLLER


def _no_switch(device: Device) -> str:
    able = ", ".join(name for name in names() if _switches(name))
    has = f"its meters ({', '.join(choice.name for choice in device.meters)})" if device.meters else "no meter of it"
    found = f"{has} cannot switch" if device.meters else "it has no meter"
    return f"device {device.name}: {found}; plug it into one that can, and name that in the inventory (meter: {able})"
