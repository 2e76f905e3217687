"""Options that several commands share."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from testbed.task import TASKS

if TYPE_CHECKING:
    from testbed.inventory import Device, Inventory

Command = TypeVar("Command", bound=Callable[..., Any])
#: Commands that look devices up, as messages name them.
_NAMED = re.compile(r"\btestbed (calibrate|clean|deploy|meter|power|provision|record|status|trust|unlock)\b")
#: Commands for a virtual lab, likewise.
_OF_LAB = re.compile(r"\btestbed lab (cut|down|freeze|mend|reboot|shape|start|status|stop|thaw|up)\b")


def inventory_options(command: Command) -> Command:
    """`--inventory FILE` and `--only WORD`, for `read_inventory`."""
    only = click.option(
        "--only", metavar="WORD", multiple=True, help="Only devices of this name, tag or profile; may be repeated."
    )
    inventory = click.option(
        "--inventory",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="The inventory; by default four emulated devices.",
    )
    return inventory(only(command))


def learning_options(command: Command) -> Command:
    """`--model`, `--task` and `--data` (as `data_name`): None where they are left to the method and its task."""
    model = click.option(
        "--model",
        help="Folder of a Hugging Face model, or one that comes along: quickstart for texts; resnet or vit for images, "
        "trained from scratch  [default: quickstart, for images resnet].",
    )
    task = click.option("--task", type=click.Choice(TASKS), help="What is learned  [default: the method's own task].")
    data = click.option(
        "--data",
        "data_name",
        help="Texts: docstrings, a .jsonl, .csv or .parquet file, or hf:OWNER/NAME on the Hugging Face hub.  Images: "
        "digits, or a folder with one folder of images for each class  [default: docstrings, for images digits].",
    )
    return model(task(data(command)))


def json_option(command: Command) -> Command:
    """`--json`, as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(command)


def runs_option(command: Command) -> Command:
    """`--runs DIR`, as the argument `runs_dir`."""
    return click.option(
        "--runs",
        "runs_dir",
        metavar="DIR",
        type=click.Path(path_type=Path),
        default=Path("runs"),
        show_default=True,
        help="The folder that holds the runs.",
    )(command)


def typable(text: str, inventory: Path | str | None, folder: str | None = None) -> str:
    """A message whose commands can be typed as they stand: with the inventory or lab that this command was given."""
    return _with(_OF_LAB, "--folder", folder, _with(_NAMED, "--inventory", inventory, text))


def _with(commands: re.Pattern[str], option: str, given: Path | str | None, text: str) -> str:
    return text if given is None else commands.sub(lambda found: f"{found[0]} {option} {shlex.quote(str(given))}", text)


def read_inventory(inventory: Path | None, only: Sequence[str]) -> Inventory:
    """What the two options select; raises ConfigError, and UsageError for a word that fits no device."""
    from testbed.config import default_inventory, load_inventory

    return load_inventory(inventory or default_inventory()).select(only)


def one_device(inventory: Path | None, name: str) -> Device:
    """The device of that very name; raises UsageError for a tag or a profile, naming the devices it selects."""
    from testbed.errors import UsageError

    devices = read_inventory(inventory, [name]).devices
    found = next((device for device in devices if device.name == name), None)
    if found is None:
        raise UsageError(f'"{name}" is no device; it selects {", ".join(device.name for device in devices)}')
    return found
