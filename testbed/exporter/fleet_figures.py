"""The devices of an inventory as they answer now, as series."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from testbed.exporter.figures import Figures
from testbed.fleet import Remote, ask_all

if TYPE_CHECKING:
    from testbed.fleet import Told
    from testbed.inventory import Device, Inventory


def look_at(devices: Inventory) -> Figures:
    """Ask every device on another machine; one that is emulated on this machine has nobody to ask.

    Takes as long as the slowest device: never call it inside a scrape.
    """
    return fleet_figures(devices, ask_all(devices, Remote.survey))


def fleet_figures(devices: Iterable[Device], answers: Iterable[Told]) -> Figures:
    """The devices, and what those said that were asked (`testbed.fleet.Remote.survey`)."""
    figures = Figures()
    for device in devices:
        _known(figures, device)
    for told in answers:
        _answered(figures, told)
    return figures


def _known(figures: Figures, device: Device) -> None:
    figures.set("testbed_device_info", 1, device=device.name, kind=device.kind, profile=device.profile.name)
    figures.set("testbed_device_budget_bytes", device.budget.memory_bytes, device=device.name)


def _answered(figures: Figures, told: Told) -> None:
    name = told.device.name
    figures.set("testbed_device_up", told.error is None, device=name)
    if told.error is None:
        figures.set("testbed_device_held", told.answer["holder"] is not None, device=name)
        figures.set("testbed_device_disk_free_bytes", told.answer["free_bytes"], device=name)
        figures.set("testbed_device_last_contact_timestamp_seconds", time.time(), device=name)
