"""A node that is reached over SSH: what boards, and emulated devices on other hosts, have in common.

Below `folder` of the device (default: .local/share/edge-testbed below the login user's home):

    content/<sha256>         base-model blocks, shards and wheels: sent once, shared by all runs
    code/<sha256>/           our packages, unpacked from the wheel of that hash
    env/                     the virtual environment that provisioning made
    runs/<run>/spool/        of the agent
    lock.json                which run holds the device
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from testbed.devices._agent_node import AgentNode, Patience, Place
from testbed.devices._machine import OtherMachine
from testbed.errors import DeviceError

if TYPE_CHECKING:
    from testbed.connection import Connection
    from testbed.devices import NodeSettings
    from testbed.inventory import Device

#: A link that was lost is looked for so long: a board that restarts is back by then.
_PATIENCE = Patience(orphan_seconds=1800.0, reconnect_seconds=120.0, silence_seconds=6.0)
_NO_CODE = "0" * 64


def node(device: Device, settings: NodeSettings) -> AgentNode:
    """A board: the whole machine is the device, and one run at a time has it."""
    return remote_node(device, settings, board=True)


def remote_node(device: Device, settings: NodeSettings, *, board: bool) -> AgentNode:
    """The node of a device that has an access; without `board` it shares its machine with others."""
    where = place(device, settings, board=board)
    on = other_machine(device, where.code, settings.facts.get(device.name) if board else None)
    host = device.access.host if device.access is not None else ""
    return AgentNode(device, settings, on, where, _PATIENCE, machine=f"board {device.name}" if board else host)


def other_machine(device: Device, code: str, facts: Mapping[str, Any] | None) -> OtherMachine:
    """The machine of a device that has an access; `facts`: of the board that it was when it was made ready, if any."""
    if device.access is None:
        raise _no_host(device)
    model = ((facts or {}).get("board") or {}).get("model")
    return OtherMachine(device.name, partial(connect_to, device), python(device), code, model)


def connect_to(device: Device) -> Connection:
    """Log in at a device's machine; raises DeviceError, or one of its kinds."""
    from testbed import ssh  # and paramiko with it

    if device.access is None:
        raise _no_host(device)
    return ssh.connect(device.name, device.access)


def _no_host(device: Device) -> DeviceError:
    return DeviceError(f"device {device.name}: it is no emulated device, and the inventory has no host for it")


def place(device: Device, settings: NodeSettings, *, board: bool) -> Place:
    """Where things are on a device."""
    root = folder(device)
    run = f"{root}/runs/{settings.run}" + ("" if board else f"/{device.name}")
    wheel = settings.wheel.sha256 if settings.wheel is not None else _NO_CODE
    return Place(
        spool=f"{run}/spool",
        content=f"{root}/content",
        code=f"{root}/code/{wheel}",
        python=python(device),
        lock=f"{root}/lock.json",
        shared=not board,
        remote=True,
    )


def folder(device: Device) -> str:
    """The testbed's folder on the device, "~/…" where it is below the login user's home."""
    return device.folder if device.folder.startswith(("/", "~/")) else f"~/{device.folder}"


def python(device: Device) -> str:
    """The interpreter that agent and trainer are run with."""
    return device.python or f"{folder(device)}/env/bin/python"
