"""An emulated device: a trainer in a memory cgroup of the budget's size, on the controller's own machine or a server.

    devices:
      small-board:
        kind: emulated
        profile: raspberry_pi_4b_2gb
        budget: {memory: "440 MiB"}
      on-a-server:
        kind: emulated
        profile: jetson_orin_nano_8gb
        budget: {memory: "3 GiB"}
        host: server-1

Tried on: Debian 12, x86-64, cgroup v1 as root.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import testbed
from testbed.devices._agent_node import AgentNode, Patience, Place
from testbed.devices._board import remote_node
from testbed.devices._machine import ThisMachine

if TYPE_CHECKING:
    from testbed.devices import NodeSettings
    from testbed.inventory import Device

#: Between two processes of one machine there is no link to lose: an agent that is silent for long hangs.
_PATIENCE = Patience(orphan_seconds=5.0, reconnect_seconds=0.0, silence_seconds=55.0)


def node(device: Device, settings: NodeSettings) -> AgentNode:
    """On the controller's own machine, unless the inventory names a host."""
    if device.access is not None:
        return remote_node(device, settings, board=False)
    folder = settings.folder.absolute() / device.name  # the trainer works in a folder of its own
    place = Place(
        spool=str(folder / "spool"),
        content=str(folder / "content"),
        code=str(Path(testbed.__file__).resolve().parent.parent),
        python=settings.python,
    )
    return AgentNode(device, settings, ThisMachine(), place, _PATIENCE, machine="")
