"""What is found on a device: gathered by one script in one round trip, as plain JSON.

What could not be found out is None.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from testbed.errors import DeviceError
from testbed.provision import (
    attestation,
    board,
    boot_script,
    clock,
    disk,
    memory_cgroup,
    meters,
    own_folder,
    power,
    sheet,
    swap,
)  # fmt: skip
from testbed.provision.part import Part, facts_of, script_of, stamps_of

if TYPE_CHECKING:
    from testbed.connection import Connection
    from testbed.inventory import Device

_PATIENCE_SECONDS = 60.0

#: Of every device alike: what a board has not costs it nothing.
FACTS_SCRIPT_PARTS: tuple[Part, ...] = (
    board.PART,
    boot_script.PART,
    memory_cgroup.PART,
    swap.PART,
    power.PART,
    clock.PART,
    meters.PART,
    disk.PART,
    own_folder.PART,
    attestation.PART,
    sheet.PART,
)


def gather(connection: Connection, device: Device, parts: Sequence[Part] = FACTS_SCRIPT_PARTS) -> dict[str, Any]:
    """The facts of a device now; raises DeviceError when it cannot be reached or answers nothing."""
    script = script_of(parts, device.folder, device.python, device.name)
    sent = time.time()
    ran = connection.attempt(["sh", "-c", script], _PATIENCE_SECONDS)
    received = time.time()
    if "\x1eended" not in ran.output:
        raise DeviceError(f"{device.name}: its facts cannot be gathered: {ran.errors.strip() or 'it said nothing'}")
    host = device.access.host if device.access is not None else None
    facts = {"device": device.name, "host": host, "collected": received, **facts_of(parts, ran.output)}
    offset = clock.offset(sent, received, stamps_of(ran.output))
    facts["clock"] = {**facts.get("clock", {}), **clock.closer(connection, offset)}
    return facts
