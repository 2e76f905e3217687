"""`testbed stop RUN`: end a run, its agents included."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.commands._options import runs_option

if TYPE_CHECKING:
    from testbed.store import RunFolder

#: A controller that was told to stop first lets its agents remove what they have made.
_PATIENCE_SECONDS = 90.0
#: An agent that was told to stop ends its trainer first; after that it is killed.
_AGENT_SECONDS = 20.0


@click.command("stop")
@click.argument("run")
@runs_option
def command(run: str, runs_dir: Path) -> int:
    """End RUN as Ctrl-C would: the agents stop, the devices are let go of, and `run-method --resume` can go on.

    Where the controller is gone already, its agents are ended on the devices.
    """
    from testbed.store import RunFolder

    folder = RunFolder.open(runs_dir, run)
    if folder.status.alive:
        _end_controller(folder)
        click.echo(f"run {folder.run_id}: {folder.status.state}; go on: testbed run-method --resume {folder.run_id}")
        return 0
    click.echo(f"run {folder.run_id} is {folder.status.state}: no controller is running it here")
    return _end_agents(folder)


def _end_controller(folder: RunFolder) -> None:
    from testbed.errors import StoreError

    pid, deadline = folder.status.pid, time.monotonic() + _PATIENCE_SECONDS
    if pid is not None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGTERM)
    while folder.status.alive:
        if time.monotonic() > deadline:
            raise StoreError(
                f"run {folder.run_id}: its controller (process {pid}) has not ended {_PATIENCE_SECONDS:.0f} s after it "
                f"was asked to; kill it, then run this again to end its agents"
            )
        time.sleep(0.1)  # somebody else's process cannot be waited for


def _end_agents(folder: RunFolder) -> int:
    """End what a controller left behind; 1 when a device could not be asked."""
    from testbed.fleet import Remote, ask_all, local_spool
    from testbed.inventory import inventory_from_json
    from testbed.node import host

    devices = inventory_from_json(folder.record.inventory)
    for device in devices:
        spool = str(local_spool(folder.path, device.name))
        if device.access is None and host.alive(spool):
            host.leave(spool, _AGENT_SECONDS)
            click.echo(f"device {device.name}: its agent was ended")

    def end(remote: Remote) -> list[str]:
        return remote.end_agents(folder.run_id)

    told = ask_all(devices, end)
    for each in told:
        ended = "its agent was ended" if each.answer else "no agent of the run was there"
        click.echo(
            f"device {each.device.name}: {ended}" if each.error is None else str(each.error), err=bool(each.error)
        )
    return int(any(each.error is not None for each in told))
