"""`testbed deploy METHOD`: what a run would send to its devices, told or sent beforehand."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.commands import run_method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.deploy import Cargo

#: Of `run-method`, whose other options mean the same here: one line can be used for both.
_NOT_HERE = frozenset({"methods", "repeats", "metrics", "dry_run", "as_json", "resume", "runs_dir"})


@click.command("deploy")
@click.argument("method", required=False)
@click.option("--dry-run", is_flag=True, help="Say what would travel, and send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def command(method: str | None, *, dry_run: bool, as_json: bool, **options: Any) -> int:
    """Send beforehand what a run of METHOD needs on its devices: our code, blocks of the base model, shards.

    The options are those of run-method.  Everything is known by its hash: what a device has is not sent again, by a
    later run either.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if method is None:
        raise click.UsageError("which method? `testbed methods` lists them")
    from testbed import session
    from testbed.deploy import Deployment, needed

    prepared = session.settled(method, **options)
    deployment = Deployment(
        session.devices_of(prepared),
        needed(prepared),
        prepared.shards,
        prepared.store.path,
        session.node_settings(prepared, f"deploy-{os.getpid()}", Path("unused")),
    )
    cargoes = deployment.survey() if dry_run else deployment.send()
    if as_json:
        click.echo(json.dumps([{**asdict(cargo), "bytes": cargo.bytes} for cargo in cargoes], indent=2))
    else:
        _print(cargoes, "would travel" if dry_run else "sent")
    return 1 if any(cargo.error for cargo in cargoes) else 0


command.params[1:1] = [param for param in run_method.command.params if param.name not in _NOT_HERE]


def _print(cargoes: Sequence[Cargo], heading: str) -> None:
    from testbed.commands._table import show, table
    from testbed.quantities import bytes_text

    if not cargoes:
        click.echo("All devices are emulated on this machine: nothing travels.")
        return
    rows = [
        (cargo.device, *map(bytes_text, (cargo.code_bytes, cargo.model_bytes, cargo.shard_bytes, cargo.bytes)))
        for cargo in cargoes
        if cargo.error is None
    ]
    if rows:
        show(table(("device", "code", "model", "shards", heading), rows, numbers={"code", "model", "shards", heading}))
    for cargo in cargoes:
        if cargo.error is not None:
            click.echo(f"{cargo.device}: {cargo.error}", err=True)
