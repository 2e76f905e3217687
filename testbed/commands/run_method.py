"""`testbed run-method METHOD`: plan, deploy, federate, measure, store."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from testbed.commands._options import learning_options, runs_option
from testbed.method import HOLDINGS
from testbed.run import RunConfig

_DEFAULT = {field.name: field.default for field in fields(RunConfig)}
_BEFORE_RUN = "see `testbed run-method METHOD --dry-run` for what would happen"


def _number(name: str, kind: Any, text: str) -> Callable[[Any], Any]:
    option = f"--{name.replace('_', '-')}"
    return click.option(option, name, type=kind, default=_DEFAULT[name], show_default=True, help=text)


@click.command(name="run-method")
@click.argument("methods", metavar="METHOD…", nargs=-1)
@click.option("--inventory", type=click.Path(path_type=Path), help="Inventory file [default: four emulated devices].")
@click.option("--only", multiple=True, metavar="WORD", help="Only devices of this name, tag or profile (repeatable).")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the method (repeatable).")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; nothing is touched.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the plan as JSON.")
@click.option("--resume", metavar="RUN", help="Go on with a run that was interrupted.")
@runs_option
@learning_options
@click.option(
    "--data-set",
    "data_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="How to read the data: text=COLUMN, label=COLUMN, template=alpaca, … (repeatable).",
)
@click.option(
    "--partition", default="iid", show_default=True, help="Shards: iid, dirichlet:ALPHA, label:CLASSES, natural."
)
@_number("rounds", int, "Rounds.")
@_number("participants", float, "Clients drawn each round: a fraction up to 1, or a count above 1.")
@_number("min_participants", int, "Updates below which a round is not combined.")
@_number("steps", int, "Local steps per client and round.")
@_number("batch_size", int, "Examples per local step.")
@_number("length", int, "Tokens per example at most.")
@_number("learning_rate", float, "First round's learning rate.")
@_number("final_learning_rate", float, "Last round's learning rate.")
@_number("seed", int, "Seed of everything that is random.")
@_number("evaluate_every", int, "Rounds between evaluations of the global model (the last is always evaluated).")
@_number("job_timeout_seconds", float, "Seconds after which a job is stopped.")
@_number("reconnect_seconds", float, "Seconds for which a lost link is looked for again [default: 120 over SSH].")
@click.option(
    "--until",
    multiple=True,
    metavar="NAME=NUMBER",
    help="End before the last round: accuracy=0.6 once reached, or when a budget ran out: seconds=120, joules=300, "
    "'bytes=50 MiB' (repeatable; every round is then evaluated).",
)
@click.option("--schedule", type=click.Choice(["cosine", "constant"]), default="cosine", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option(
    "--holding",
    type=click.Choice(HOLDINGS),
    default=HOLDINGS[0],
    show_default=True,
    help="How frozen weights are held: in private memory, mapped from the file, or one block at a time.",
)
@click.option("--checkpointing", is_flag=True, help="Gradient checkpointing: less memory, more time.")
@click.option("--no-cap", is_flag=True, help="Do not hold trainers to their budget (the run is marked uncapped).")
@click.option("--refit", is_flag=True, help="Give a client that runs out of memory a smaller submodel.")
@click.option("--repeats", type=int, default=1, show_default=True, help="Runs of each method, interleaved at random.")
@_number("warm_up", int, "Jobs of every device before the first round, which count for nothing.")
@_number("idle_seconds", float, "At rest before and after the rounds [default: 60 where a device has a meter].")
@_number("start_below_celsius", float, "No device begins hotter than this.")
@_number("cool_seconds", float, "How long that is waited for.")
@click.option(
    "--disturb",
    multiple=True,
    metavar="KIND=VALUE",
    help="What devices undergo: dropout=0.3, straggler=3@pi-4, 'slow_link=1 Mbit/s,delay=50 ms', "
    "'background_load=1,memory=64 MiB', 'thermal_limit=20 s' (repeatable; docs/disturbances.md).",
)
@click.option(
    "--power-cycle", is_flag=True, help="Switch a device that hangs off and on, where its meter is a switch too."
)
@click.option(
    "--metrics", metavar="[HOST:]PORT", help="Serve live metrics for Prometheus meanwhile; 0 takes a free port."
)
def command(methods: tuple[str, ...], **options: Any) -> None:
    """Run METHOD on the devices of the inventory: plan, cap, train, measure, store.

    `testbed methods` lists the methods and their settings.  Several methods, and repeats, are run one after another, in
    blocks whose order is drawn.
    """
    # Before torch is imported: threads that wait for each other do not keep the trainers' cores busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from testbed import session

    if options["resume"]:
        if methods:
            raise click.UsageError("--resume goes on with the run's own method: leave METHOD out")
        session.resume(options["runs_dir"], options["resume"], options["metrics"])
        return
    if not methods:
        raise click.UsageError(f"which method? `testbed methods` lists them; {_BEFORE_RUN}")
    session.start(methods, **{key: value for key, value in options.items() if key != "resume"})
