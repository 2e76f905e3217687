"""`testbed logs DEVICE`: what a trainer or an agent wrote."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.commands._options import runs_option

if TYPE_CHECKING:
    from testbed.inventory import Device
    from testbed.store import RunFolder

#: From an offset: {"text", "offset" to go on from}, or {} where there is no such log.
Reader = Callable[[int], Mapping[str, Any]]

_TAIL_BYTES = 20_000
_FOLLOW_SECONDS = 1.0


@click.command("logs")
@click.argument("device")
@click.option("--run", metavar="RUN", help="Of this run [default: the newest that has the device].")
@click.option("--agent", is_flag=True, help="The agent's log instead of the trainer's.")
@click.option("--all", "whole", is_flag=True, help="From the beginning [default: the last 20 kB].")
@click.option("--follow", is_flag=True, help="Go on as more is written, until Ctrl-C.")
@runs_option
def command(device: str, run: str | None, agent: bool, whole: bool, follow: bool, runs_dir: Path) -> None:
    """Print the log of DEVICE's trainer, from the device itself."""
    from testbed.errors import StoreError

    folder, found = _run_of(runs_dir, run, device)
    name = "agent.log" if agent else "trainer.log"
    with ExitStack() as stack:
        read = _reader(stack, folder, found, name)
        piece = read(0 if whole else -_TAIL_BYTES)
        if not piece:
            raise StoreError(f"device {device}: there is no {name} of run {folder.run_id}; was it cleared away?")
        while True:
            click.echo(piece["text"], nl=False)
            if not piece["text"] and not follow:
                return
            if not piece["text"]:
                time.sleep(_FOLLOW_SECONDS)  # a log is looked at, not listened to
            piece = read(piece["offset"])
            if not piece:
                raise StoreError(f"device {device}: {name} of run {folder.run_id} has just been cleared away")


def _run_of(runs_dir: Path, run: str | None, device: str) -> tuple[RunFolder, Device]:
    """The run that is meant, and the device as the run knew it; raises UsageError."""
    from testbed.errors import UsageError
    from testbed.store import RunFolder, list_runs

    names = [run] if run else [row.run for row in reversed(list_runs(runs_dir))]
    for name in names:
        folder = RunFolder.open(runs_dir, name)
        for each in _devices(folder):
            if each.name == device:
                return folder, each
    where = f"run {run}" if run else f"no run in {runs_dir}"
    raise UsageError(f"{where} has {'no ' if run else 'a '}device {device!r}; `testbed runs` lists the runs")


def _devices(folder: RunFolder) -> list[Device]:
    from testbed.inventory import inventory_from_json

    return list(inventory_from_json(folder.record.inventory))


def _reader(stack: ExitStack, folder: RunFolder, device: Device, name: str) -> Reader:
    from testbed.fleet import local_spool, reached
    from testbed.node.landing import read_spool_log

    if device.access is None:
        spool = local_spool(folder.path, device.name)
        return lambda offset: read_spool_log(spool, name, offset)
    remote = stack.enter_context(reached(device))
    return lambda offset: remote.read_log(folder.run_id, name, offset)
