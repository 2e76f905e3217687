"""The command `testbed`: parses, calls one function, prints its noun.

Exit codes: 0 all went well; 1 a device or a job failed, or a file is wrong; 2 the command was used wrongly;
130 interrupted; 143 terminated, after what was being made was tidied away.  Every other command than those here is a
file of testbed/commands.
"""

from __future__ import annotations

import errno
import importlib
import itertools
import json
import os
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import testbed.commands
from testbed.commands._options import inventory_options, json_option, read_inventory, typable
from testbed.errors import TestbedError, UsageError
from testbed.spelling import did_you_mean

if TYPE_CHECKING:
    from testbed.inventory import Device, Inventory

FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose commands are also the files of testbed/commands, each imported when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = pkgutil.iter_modules(testbed.commands.__path__)
        lazy = {module.name.replace("_", "-") for module in found if not module.name.startswith("_")}
        return sorted({*super().list_commands(ctx), *lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in self.list_commands(ctx):
            return own
        module = importlib.import_module(f"testbed.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            raise UsageError(f'there is no command "{args[0]}"; {did_you_mean(args[0], self.list_commands(ctx))}')
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edge-testbed", prog_name="testbed")
def testbed_command() -> None:
    """Federated fine-tuning of language models on real and emulated edge devices, measured."""


@testbed_command.command("inventory")
@inventory_options
@json_option
@click.option("--facts", is_flag=True, help="Show what the last `testbed provision` found on each device.")
def inventory_command(inventory: Path | None, only: tuple[str, ...], as_json: bool, facts: bool) -> None:
    """List the devices of an inventory, with their budgets."""
    devices = read_inventory(inventory, only)
    if facts:
        from testbed.commands._facts import show_facts

        show_facts(devices, as_json=as_json)
    elif as_json:
        _print_json([_device_data(device) for device in devices])
    else:
        _print_devices(devices)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; whatever a user can be told is one message on stderr and an exit code, never a traceback."""
    try:
        code = testbed_command.main(args=args, prog_name="testbed", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except TestbedError as error:
        given = sys.argv[1:] if args is None else args
        told = typable(f"testbed: {error}", _given("--inventory", given), _given("--folder", given))
        click.echo(told, err=True)
        return WRONG_USE if isinstance(error, UsageError) else FAILED
    except (click.Abort, KeyboardInterrupt):
        click.echo("testbed: interrupted", err=True)
        return INTERRUPTED
    except OSError as error:
        if error.errno == errno.EPIPE:
            _close_stdout()
        else:
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"testbed: {where}{error.strerror or error}", err=True)
        return FAILED
    return code if isinstance(code, int) else 0


def _given(option: str, args: Sequence[str]) -> str | None:
    """What an option was given, wherever it stands."""
    following = dict(itertools.pairwise(args))
    joined = (word.partition("=")[2] for word in args if word.startswith(f"{option}="))
    return following.get(option) or next(joined, None)


def _close_stdout() -> None:
    """The reader has gone (`testbed … | head`): leave the interpreter nothing to flush and complain about."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def _device_data(device: Device) -> dict[str, Any]:
    return {**asdict(device), "tags": sorted(device.tags)}


def _print_devices(devices: Inventory) -> None:
    from testbed.commands._table import show, table
    from testbed.config import format_bytes

    rows = [
        (
            device.name,
            device.kind,
            device.profile.name,
            format_bytes(device.profile.memory_bytes),
            format_bytes(device.budget.memory_bytes),
            str(device.clients),
            " ".join(sorted(device.tags)),
        )
        for device in devices
    ]
    headings = ("device", "kind", "profile", "memory", "budget", "clients", "tags")
    show(table(headings, rows, numbers={"memory", "budget", "clients"}))
