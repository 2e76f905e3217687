"""`testbed make-adapters`: a pool of LoRA adapters, for methods that compose ready ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION


@click.command("make-adapters")
@click.option("--model", default="quickstart", show_default=True, help="Folder of a Hugging Face model.")
@click.option("--data", "data_name", default="docstrings", show_default=True, help="As run-method has it.")
@click.option("--data-set", "data_options", multiple=True, metavar="NAME=VALUE", help="As run-method has it.")
@click.option(
    "--task",
    type=click.Choice([SEQUENCE_CLASSIFICATION, CAUSAL_LM]),
    default=SEQUENCE_CLASSIFICATION,
    show_default=True,
)
@click.option("--slices", default=4, show_default=True, help="Adapters, each trained on a slice of the data.")
@click.option("--rank", default=4, show_default=True, help="Rank of every adapter.")
@click.option("--targets", default="q_proj,v_proj", show_default=True, help="Names of the maps that are adapted.")
@click.option("--steps", default=100, show_default=True, help="Training steps for every adapter.")
@click.option("--length", default=64, show_default=True, help="Tokens per text at most.")
@click.option("--learning-rate", default=5e-3, show_default=True, help="Of the first step; it falls linearly.")
@click.option("--seed", default=0, show_default=True, help="Seed of everything that is random.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("adapters"),
    show_default=True,
    help="The folder that gets the adapters.",
)
def command(data_name: str, data_options: tuple[str, ...], targets: str, output: Path, **options: Any) -> None:
    """Train a pool of LoRA adapters on slices of a data set, as PEFT folders.

    Classes are divided among the slices; the texts are those that run-method leaves to no client, where there are
    enough.  Interrupted, it keeps the adapters that are whole, and the same command goes on with the others.  Use
    them with: testbed run-method METHOD --set pool=DIR
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: other work may need the cores
    from rich.console import Console
    from rich.progress import Progress

    from testbed.adapter_training import Recipe, make_pool
    from testbed.options import data_settings

    notes = Console(stderr=True)
    data = data_settings(data_name, data_options)
    recipe = Recipe(data=data, targets=tuple(targets.split(",")), **options)
    try:
        with Progress(console=notes) as bars:
            bar = bars.add_task("reading the texts", total=recipe.steps)
            folders = make_pool(
                recipe,
                output,
                lambda text: bars.console.print(text, style="dim", markup=False),
                lambda name, step, loss: bars.update(bar, completed=step, description=f"{name}, loss {loss:.3f}"),
            )
    except KeyboardInterrupt:
        notes.print(f"{output} keeps the adapters that are whole; the same command goes on", markup=False)
        raise
    click.echo(f"{len(folders)} adapters are in {output}; its README.md says how they were made")
