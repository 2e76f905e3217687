"""`testbed power on|off|cycle DEVICE`: switch a device by its plug."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.commands._options import one_device, typable

if TYPE_CHECKING:
    from testbed.inventory import Device

_ON, _OFF, _CYCLE = "on", "off", "cycle"


@click.command("power")
@click.argument("what", type=click.Choice((_ON, _OFF, _CYCLE)), metavar="on|off|cycle")
@click.argument("device")
@click.option("--inventory", metavar="FILE", type=click.Path(path_type=Path), help="The inventory that has the device.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    help="With cycle: for how long it is off.",
)
@click.option("--yes", is_flag=True, help="Switch it off although a run holds it, without being asked.")
def command(what: str, device: str, inventory: Path | None, seconds: float, yes: bool) -> int:
    """Switch DEVICE on or off, or off and on again, by the first of its meters that is a switch.

    It is the plug that is pulled: shut a board down first where it still answers, because an SD card may suffer.
    """
    from testbed import switching
    from testbed.errors import UsageError

    found = one_device(inventory, device)
    if switching.power_switch(found) is None:
        switching.switch(found, on=True)  # says what is missing
    if what != _ON and not yes and (why := _held(found, inventory)) is not None:
        if not sys.stdin.isatty():
            raise UsageError(f"{why}; switch it off all the same with --yes")
        if not click.confirm(f"{why}; switch it off?"):
            click.echo(f"device {device} stays on")
            return 1
    if what == _CYCLE:
        switching.power_cycle(found, seconds)
        click.echo(f"device {device} was off for {seconds:g} s, and is on")
    else:
        by = switching.switch(found, on=what == _ON)
        click.echo(f"device {device} is {what} ({by})")
    return 0


def _held(device: Device, inventory: Path | None) -> str | None:
    """Why it should not be switched off without a question; None where nothing speaks against it."""
    from testbed.errors import TestbedError
    from testbed.fleet import reached

    if device.access is None:
        return None
    try:
        with reached(device) as remote:
            holder = remote.survey()["holder"]
    except TestbedError as error:  # what hangs is what one wants to switch off
        click.echo(typable(f"whether a run holds it cannot be asked: {error}", inventory), err=True)
        return None
    if holder is None or holder["stale"]:
        return None
    return f"device {device.name} is held by run {holder['run']} of {holder['owner']}"
