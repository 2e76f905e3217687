"""`testbed unlock DEVICE`: let go of a device that a run still holds."""

from __future__ import annotations

from pathlib import Path

import click

from testbed.commands._options import one_device


@click.command("unlock")
@click.argument("device")
@click.option("--inventory", metavar="FILE", type=click.Path(path_type=Path), help="The inventory that has the device.")
@click.option("--force", is_flag=True, help="Also where the run's agent is at work: it is ended.")
def command(device: str, inventory: Path | None, force: bool) -> None:
    """Let go of DEVICE, whichever run holds it.

    A run whose agent is at work there keeps it, unless --force is given.
    """
    from testbed.errors import LockedError
    from testbed.fleet import reached
    from testbed.quantities import seconds_text

    with reached(one_device(inventory, device)) as remote:
        holder = remote.survey()["holder"]
        if holder is None:
            click.echo(f"device {device} is free")
            return
        if holder["agent_alive"] and not force:
            raise LockedError(
                f"device {device} is held by run {holder['run']} of {holder['owner']}, and its agent is at work; end "
                f"the run with `testbed stop {holder['run']}` where it was started, or take the device with --force"
            )
        remote.bar()  # before anything else: a controller that loses its agent starts another one within a second
        if holder["agent_alive"]:
            remote.end_agents(holder["run"])
        remote.release(holder["run"])
        if holder["run"] is None:
            click.echo(f"device {device} is free; its lock could not be read")
            return
        age = seconds_text(holder["age_seconds"])
        click.echo(f"device {device} is free; run {holder['run']} of {holder['owner']} held it for {age}")
