"""`testbed trust NAME`: accept the host key of a device, after a look at it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.errors import UsageError

if TYPE_CHECKING:
    from testbed.ssh.trust import Introduction


@click.command("trust")
@click.argument("name")
@click.option("--inventory", metavar="FILE", type=click.Path(path_type=Path), help="The inventory that NAME is in.")
@click.option("--yes", is_flag=True, help="Accept without asking, for scripts; the keys are shown all the same.")
def command(name: str, inventory: Path | None, yes: bool) -> None:
    """Accept the host keys of a device (its NAME, or a tag for several).

    Shows the fingerprints of the device and of the jump hosts before it, and writes the keys to your known_hosts file.
    """
    from testbed.commands._options import read_inventory
    from testbed.ssh.trust import introductions

    devices = [device for device in read_inventory(inventory, (name,)) if device.access is not None]
    if not devices:
        raise UsageError(f"{name} is the controller's own machine; only a device with `host` has a host key")
    for device in devices:
        assert device.access is not None
        for machine in introductions(device.name, device.access):
            _introduce(device.name, machine, yes)


def _introduce(device: str, machine: Introduction, yes: bool) -> None:
    role = device if machine.target.alias == device else f"{device}: {machine.target.alias}"
    click.echo(f"{role} ({machine.target.where}) shows")
    _list(machine.shown)
    if machine.in_order:
        click.echo("and is known.")
        return
    if machine.stale:
        click.echo("where your files know")
        _list(machine.stale)
        click.echo("Was it installed anew?  If not, another machine may be answering in its place.")
    if not yes:
        _ask(device, machine)
    click.echo(f"Accepted; written to {machine.accept()}.")


def _list(keys: tuple[object, ...]) -> None:
    for key in keys:
        click.echo(f"  {key}")


def _ask(device: str, machine: Introduction) -> None:
    if not sys.stdin.isatty():
        raise UsageError(
            f"nobody is here to say whether these are the keys of {machine.target.where}; compare them and give --yes"
        )
    click.confirm(f"Are these the keys of {device}?", abort=True)
