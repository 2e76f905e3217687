"""`testbed frontier METHOD…`: the largest submodel, batch and length that each device can hold."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.commands._options import inventory_options, json_option, learning_options, read_inventory, runs_option
from testbed.frontier.record import AXES
from testbed.method import HOLDINGS
from testbed.run import RunConfig

if TYPE_CHECKING:
    from rich.console import Console

    from testbed.frontier.record import Frontier
    from testbed.inventory import Inventory

_DEFAULT = {field.name: field.default for field in fields(RunConfig)}
_UNDECIDED = 1


@click.command("frontier")
@click.argument("methods", metavar="METHOD…", nargs=-1, required=True)
@inventory_options
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the method (repeatable).")
@click.option("--vary", "axes", multiple=True, type=click.Choice(AXES), help="Only this axis (repeatable).")
@click.option("--confirm", is_flag=True, help="Look for the frontier with real jobs under the real cap, too.")
@click.option("--fresh", is_flag=True, help="Make every trial again, also those that are known.")
@learning_options
@click.option("--data-set", "data_options", multiple=True, metavar="NAME=VALUE", help="As run-method has it.")
@click.option(
    "--batch-size", default=_DEFAULT["batch_size"], show_default=True, help="Examples per step, where not varied."
)
@click.option("--length", default=_DEFAULT["length"], show_default=True, help="Tokens per example, where not varied.")
@click.option(
    "--rounds", default=_DEFAULT["rounds"], show_default=True, help="Of the run: methods with stages go by them."
)
@click.option("--seed", default=_DEFAULT["seed"], show_default=True, help="Seed of everything that is random.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--holding", type=click.Choice(HOLDINGS), default=HOLDINGS[0], show_default=True)
@click.option("--checkpointing", is_flag=True, help="Gradient checkpointing: less memory, more time.")
@click.option("--steps", default=8, show_default=True, help="Local steps of each job, for its memory to settle.")
@click.option(
    "--job-timeout-seconds",
    default=_DEFAULT["job_timeout_seconds"],
    show_default=True,
    help="A job that takes longer counts as too large.",
)
@runs_option
@json_option
def command(
    methods: tuple[str, ...], inventory: Path | None, only: tuple[str, ...], as_json: bool, **options: Any
) -> int:
    """Find what each device can hold with METHOD: the largest submodel, the largest batch, the largest length.

    One axis is varied, the others stand at the options' values.  The footprint predicts the frontier in seconds; with
    --confirm real jobs bisect around the prediction, each under the device's cap, up to six for each device and axis.
    What is found is kept in RUNS/frontiers: the same command goes on where it was interrupted.
    """
    # Before torch is imported: threads that wait for each other do not keep the trainers' cores busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    notes = Console(stderr=True)
    devices = read_inventory(inventory, only)
    found = []
    for method in methods:
        found.append(_found(method, devices, notes, **options))
        if not as_json:
            _show(found[-1], options["runs_dir"])
    if as_json:
        plain = [frontier.to_json() for frontier in found]
        click.echo(json.dumps(plain if len(plain) > 1 else plain[0], indent=2, ensure_ascii=False))
    undecided = any(not trial.decided for each in found for point in each.points for trial in point.trials)
    return _UNDECIDED if undecided else 0


def _found(method: str, devices: Inventory, notes: Console, **options: Any) -> Frontier:
    from testbed.frontier.finding import Search, find_frontier
    from testbed.frontier.table import trial_text

    config = _config(method, **options)
    search = Search(
        axes=options["axes"] or AXES,
        confirm=options["confirm"],
        fresh=options["fresh"],
        steps=options["steps"],
        say=lambda text: notes.print(text, style="dim", markup=False, highlight=False, soft_wrap=True),
        tried=lambda point: notes.print(trial_text(point), markup=False, highlight=False, soft_wrap=True),
    )
    try:
        return find_frontier(config, devices, options["runs_dir"], search)
    except KeyboardInterrupt:
        notes.print("what was measured is kept; the same command goes on", highlight=False)
        raise


def _config(
    method: str,
    *,
    settings: tuple[str, ...],
    data_name: str | None,
    data_options: tuple[str, ...],
    **options: Any,
) -> RunConfig:
    """The run whose frontier is looked for."""
    from testbed.options import data_settings, pairs
    from testbed.plugins import make_method

    known = {name: value for name, value in options.items() if name in _DEFAULT}
    made = make_method(method, pairs("--set", settings))
    return RunConfig(method=method, settings=asdict(made), data=data_settings(data_name, data_options), **known)


def _show(frontier: Frontier, runs_dir: Path) -> None:
    from testbed.commands._table import show
    from testbed.frontier.record import path_of
    from testbed.frontier.table import frontier_notes, frontier_table

    show(frontier_table(frontier))
    for note in frontier_notes(frontier):
        click.echo(note)
    click.echo(f"it is in {path_of(runs_dir, frontier.id)}")
