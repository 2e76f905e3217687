"""`testbed record DEVICE`: save a real board's facts as a persona for the virtual lab."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.commands._options import one_device

if TYPE_CHECKING:
    from testbed.inventory import Device
    from testbed.record import Recording


@click.command("record")
@click.argument("device")
@click.option("--inventory", metavar="FILE", type=click.Path(path_type=Path), help="The inventory with the device.")
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The folder to make; by default DEVICE-persona.",
)
def command(device: str, inventory: Path | None, output: Path | None) -> None:
    """Save a real board's facts as a persona that a host of the virtual lab can wear.

    Nothing is changed on the board.  Serial numbers, addresses and names are replaced before anything is written.
    """
    from testbed.errors import UsageError

    chosen = one_device(inventory, device)
    if chosen.access is None:
        raise UsageError(f"device {device} is emulated on this machine: there is no board to record")
    _print(_record(chosen, output or Path(f"{device}-persona")))


def _record(device: Device, folder: Path) -> Recording:
    from testbed.devices._board import connect_to
    from testbed.record import record

    may_become = device.access is not None and device.access.become
    with closing(connect_to(device)) as connection:
        return record(connection, folder, profile=device.profile.name, may_become=may_become)


def _print(recording: Recording) -> None:
    removed = ", ".join(f"{count} {kind}" for kind, count in recording.removed.items()) or "nothing"
    click.echo(f"Recorded: {recording.title}, profile {recording.profile}, in {recording.folder}.")
    click.echo(f"Taken out: {removed}.  Look through the folder before you pass it on.")
    if not recording.as_root:
        click.echo("Recorded without sudo: what only root may read is missing.")
    click.echo(f"Wear it: testbed lab up --persona {recording.folder}")
