"""An NVIDIA Jetson, reached over SSH.

    devices:
      orin-1:
        kind: jetson
        profile: jetson_orin_nano_8gb
        host: orin-1.lab            # a name that ssh knows
        budget: {memory: "4 GiB"}
        power_mode: "15W"           # by name, as `nvpmodel -q` tells it; left as it is without

Tried on: the virtual lab's faces of an Orin Nano, a Xavier NX and a Nano; on no board yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.devices._board import node as node  # noqa: PLC0414 -- a kind's module offers it under this name
from testbed.provision.board import Desktop, Identity
from testbed.provision.boot_script import BootHook
from testbed.provision.clock import Chrony
from testbed.provision.disk import DiskSpace
from testbed.provision.memory_cgroup import Delegation, MemoryCgroup
from testbed.provision.meters import GroupForMeter, OverCurrent, Rails
from testbed.provision.power import Clocks, Fan, PowerMode
from testbed.provision.swap import SwapOff

if TYPE_CHECKING:
    from testbed.inventory import Device
    from testbed.provision.step import Step


def steps(device: Device) -> tuple[Step, ...]:
    """What makes a Jetson ready: clocks after the power mode, which decides what they may be."""
    return (
        Identity(),
        DiskSpace(),
        Desktop(),
        BootHook(),
        MemoryCgroup(),
        Delegation(),
        SwapOff(),
        PowerMode(),
        Clocks(),
        Fan(),
        Chrony(),
        Rails(),
        GroupForMeter("jtop", "jtop"),
        OverCurrent(),
    )
