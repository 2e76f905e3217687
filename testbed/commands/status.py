"""`testbed status`: which runs are under way, and how the devices stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.commands._options import inventory_options, json_option, read_inventory, runs_option, typable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from testbed.fleet import Told
    from testbed.inventory import Device
    from testbed.run_index import RunRow


@click.command("status")
@inventory_options
@runs_option
@json_option
def command(inventory: Path | None, only: tuple[str, ...], runs_dir: Path, as_json: bool) -> int:
    """Show the runs that are not finished, and for every device whether it answers, who holds it and what lies there.

    Exit code 1 when a device does not answer.
    """
    from testbed.fleet import Remote, ask_all

    devices = read_inventory(inventory, only)
    runs = _unfinished(runs_dir)
    told = {each.device.name: each for each in ask_all(devices, Remote.survey)}
    if as_json:
        click.echo(json.dumps({"runs": runs, "devices": [_as_json(device, told) for device in devices]}, indent=2))
    else:
        _print(runs, devices, told, runs_dir)
        for each in told.values():
            if each.error is not None:
                click.echo(typable(str(each.error), inventory), err=True)
    return int(any(each.error is not None for each in told.values()))


def _unfinished(runs_dir: Path) -> list[dict[str, Any]]:
    from testbed.run_record import FINISHED, RUNNING
    from testbed.store import RunFolder, list_runs

    rows = [row for row in list_runs(runs_dir) if row.state != FINISHED]
    return [
        {"run": row.run, "state": row.state, "rounds": _rounds(row), "controller": _pid(RunFolder(runs_dir / row.run))}
        if row.state == RUNNING
        else {"run": row.run, "state": row.state, "rounds": _rounds(row), "controller": None}
        for row in rows
    ]


def _rounds(row: RunRow) -> str:
    return str(row.rounds_done) if row.rounds is None else f"{row.rounds_done}/{row.rounds}"


def _pid(folder: Any) -> int | None:
    pid: int | None = folder.status.pid
    return pid


def _as_json(device: Device, told: Mapping[str, Told]) -> dict[str, Any]:
    base = {"device": device.name, "kind": device.kind, "host": device.access.host if device.access else None}
    each = told.get(device.name)
    if each is None:
        return {**base, "answers": None, "error": None}
    error = str(each.error) if each.error else None
    return {**base, "answers": each.error is None, "error": error, **(each.answer or {})}


def _print(runs: list[dict[str, Any]], devices: Iterable[Device], told: Mapping[str, Told], runs_dir: Path) -> None:
    from testbed.commands._table import show, table

    if runs:
        cells = [(run["run"], run["state"], run["rounds"], str(run["controller"] or "")) for run in runs]
        show(table(("run", "state", "rounds", "process"), cells, numbers={"rounds", "process"}))
        click.echo()
    else:
        click.echo(f"every run in {runs_dir} is finished\n")
    show(table(("device", "kind", "where", "state", "free disk"), [_row(each, told) for each in devices]))


def _row(device: Device, told: Mapping[str, Told]) -> tuple[str, ...]:
    from testbed.quantities import bytes_text

    if device.access is None:
        return (device.name, device.kind, "this machine", "emulated", "")
    each = told[device.name]
    if each.error is not None:
        return (device.name, device.kind, device.access.host, "does not answer", "")
    return (device.name, device.kind, device.access.host, _state(each.answer), bytes_text(each.answer["free_bytes"]))


def _state(found: Mapping[str, Any]) -> str:
    """Who holds it and what lies there, in words."""
    from testbed.quantities import bytes_text, seconds_text

    holder, left = found["holder"], [run for run in found["runs"] if not run["agent_alive"]]
    parts = [f"an agent of run {run['run']} is at work" for run in found["runs"] if run["agent_alive"]]
    if holder is not None:
        stale = " (stale)" if holder["stale"] else ""
        parts.append(f"held by {holder['run']} of {holder['owner']} for {seconds_text(holder['age_seconds'])}{stale}")
    else:
        parts.append("free" if found["environment"] else "free, without an environment of its own")
    if left:
        parts.append(f"spools of {len(left)} runs, {bytes_text(sum(run['bytes'] for run in left))}")
    return "; ".join(parts)
