"""`testbed provision`: make the devices ready, over SSH."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.commands._options import inventory_options, json_option, read_inventory, typable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.inventory import Device
    from testbed.provision.runner import Provisioning, Watcher
    from testbed.provision.visit import Outcome

_FAILED = 1
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("provision")
@inventory_options
@click.option("--check", is_flag=True, help="Change nothing; tell what would be changed.")
@click.option("--reboot", is_flag=True, help="Reboot a device where a change needs it, and wait until it is back.")
@click.option("--keep-swap", is_flag=True, help="Leave swap and zram as they are; they are recorded.")
@click.option("--accept-drift", is_flag=True, help="What was changed by hand on a board is right from now on.")
@click.option("--jobs", type=click.IntRange(1), default=16, show_default=True, help="Devices at a time.")
@click.option("-v", "--verbose", is_flag=True, help="Tell the exact commands.")
@json_option
@click.option("--no-environment", is_flag=True, help="The board only: leave Python and its packages as they are.")
@click.option("--air-gapped", is_flag=True, help="Devices download nothing: wheels go through this machine.")
@click.option(
    "--wheelhouse",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder with all wheels: nothing is downloaded at all.",
)
@click.option("--python-archive", type=_FILE, help="A standalone CPython for devices whose own is too old.")
@click.option(
    "--rootfs-archive",
    type=_FILE,
    help="A Debian arm64 root file system for devices whose glibc is too old (JetPack 4); untried on any board.",
)
@click.option("--lock", type=_FILE, help="Versions of the packages [default: those that come with the testbed].")
def command(inventory: Path | None, only: tuple[str, ...], **options: Any) -> int:
    """Make devices ready: board, memory cgroup, swap, clocks, time, Python and packages.

    Each step looks first and changes what is not as it should be; a second run changes nothing.  What was found is
    kept as the device's fact sheet (`testbed inventory --facts`).  Exits with 1 when a device failed, or still has to
    be rebooted.
    """
    everything = read_inventory(inventory, ())
    devices = [device for device in everything.select(only) if device.access is not None]
    if not devices:
        click.echo("nothing to make ready: these devices are emulated on this machine", err=True)
        return 0
    provisioning, watching = _prepare(devices, everything.devices, options)
    with watching:
        outcomes = provisioning.run()
    _tell(outcomes, inventory, options)
    return _FAILED if any(outcome.failed for outcome in outcomes) else 0


def _prepare(
    devices: Sequence[Device], others: tuple[Device, ...], options: dict[str, Any]
) -> tuple[Provisioning, AbstractContextManager[Any]]:
    from testbed.provision.environment import EnvironmentOptions
    from testbed.provision.runner import Provisioning, board_steps
    from testbed.provision.visit import Options
    from testbed.provision.wheels import check_lock

    if options["lock"] is not None:
        check_lock(options["lock"])
    chosen = Options(options["check"], options["reboot"], options["keep_swap"], options["accept_drift"])
    names = ("air_gapped", "wheelhouse", "python_archive", "rootfs_archive", "lock")
    environment = EnvironmentOptions(**{name: options[name] for name in names}, others=others)
    watcher, watching = _watcher([device.name for device in devices], as_json=options["as_json"])
    if options["no_environment"]:
        boards: dict[str, Any] = {"steps": lambda device: board_steps(device, chosen)}
    else:
        boards = {}
    jobs = options["jobs"]
    return Provisioning(devices, chosen, environment=environment, jobs=jobs, watcher=watcher, **boards), watching


def _watcher(names: Sequence[str], *, as_json: bool) -> tuple[Watcher, AbstractContextManager[Any]]:
    """A live table where standard error is a terminal, plain lines elsewhere; standard output is for the result."""
    from rich.console import Console

    from testbed.provision.view import LiveTable, PlainLines

    console = Console(file=sys.stderr)
    if console.is_terminal and not console.is_dumb_terminal and not as_json:
        live = LiveTable(console, names)
        return live, live
    lines = PlainLines(lambda line: click.echo(line, err=True))
    return lines, lines


def _tell(outcomes: Sequence[Outcome], inventory: Path | None, options: dict[str, Any]) -> None:
    import json

    from testbed.provision.view import outcome_data, told

    if options["as_json"]:
        click.echo(json.dumps([outcome_data(outcome) for outcome in outcomes], indent=2, ensure_ascii=False))
        return
    for line in told(outcomes, verbose=options["verbose"]):
        click.echo(typable(line, inventory))
