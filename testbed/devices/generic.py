"""Any other machine with Linux and an SSH server, which the testbed has to itself.

    devices:
      box-1:
        kind: generic
        profile: my_box             # profiles/my_box.yaml beside the inventory
        host: box-1.lab             # a name that ssh knows
        budget: {memory: "4 GiB"}

Tried on: Debian 12, x86-64: hosts of the virtual lab (cgroup v1), a virtual machine with systemd (cgroup v2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.devices._board import node as node  # noqa: PLC0414 -- a kind's module offers it under this name
from testbed.provision.board import Desktop, Identity
from testbed.provision.boot_script import BootHook
from testbed.provision.clock import Chrony
from testbed.provision.disk import DiskSpace
from testbed.provision.memory_cgroup import Delegation, MemoryCgroup
from testbed.provision.power import Governor
from testbed.provision.swap import SwapOff

if TYPE_CHECKING:
    from testbed.inventory import Device
    from testbed.provision.step import Step


def steps(device: Device) -> tuple[Step, ...]:
    """What makes a machine ready that is nobody else's."""
    return (
        Identity(),
        DiskSpace(),
        Desktop(),
        BootHook(),
        MemoryCgroup(),
        Delegation(),
        SwapOff(),
        Governor(),
        Chrony(needed=False),
    )
