"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from testbed.inventory import Inventory

Command = TypeVar("Command", bound=Callable[..., Any])


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


def json_option(command: Command) -> Command:
    """`--json`, as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(command)


def read_inventory(inventory: Path | None, only: Sequence[str]) -> Inventory:
    """What the two options select; raises ConfigError, and UsageError for a word that fits no device."""
    from testbed.config import default_inventory, load_inventory

    return load_inventory(inventory or default_inventory()).select(only)
