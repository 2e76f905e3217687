"""A Raspberry Pi, reached over SSH.

    devices:
      pi-1:
        kind: raspberry_pi
        profile: raspberry_pi_5_8gb
        host: pi-1.lab              # a name that ssh knows
        user: ada
        budget: {memory: "2 GiB"}

Tried on: the virtual lab's faces of a Raspberry Pi 5 and a Raspberry Pi 4; on no board yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.devices._board import node as node  # noqa: PLC0414 -- a kind's module offers it under this name
from testbed.provision.board import Desktop, Identity
from testbed.provision.boot_script import BootHook
from testbed.provision.clock import Chrony
from testbed.provision.disk import DiskSpace
from testbed.provision.memory_cgroup import Delegation, MemoryCgroup
from testbed.provision.meters import GroupForMeter, Throttling
from testbed.provision.power import Governor
from testbed.provision.swap import SwapOff

if TYPE_CHECKING:
    from testbed.inventory import Device
    from testbed.provision.step import Step


def steps(device: Device) -> tuple[Step, ...]:
    """What makes a Raspberry Pi ready."""
    return (
        Identity(),
        DiskSpace(),
        Desktop(),
        BootHook(),
        MemoryCgroup(),
        Delegation(),
        SwapOff(),
        Governor(),
        Chrony(),
        GroupForMeter("vcgencmd", "video"),
        Throttling(),
    )
