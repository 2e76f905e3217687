"""Fact sheets on the terminal, for `testbed inventory --facts`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from testbed.fact_sheets import FactSheet, facts_of
from testbed.quantities import DASH, bytes_text, seconds_text

if TYPE_CHECKING:
    from testbed.inventory import Device, Inventory


def show_facts(devices: Inventory, *, as_json: bool) -> None:
    """Every device's sheet; one that was never provisioned has none."""
    sheets = {device.name: facts_of(device) for device in devices}
    if as_json:
        click.echo(json.dumps(sheets, indent=2, ensure_ascii=False))
        return
    for device in devices:
        for line in lines_of(device, sheets[device.name]):
            click.echo(line)


def lines_of(device: Device, sheet: FactSheet | None) -> list[str]:
    """A device and its sheet in words; what was not measured has a dash."""
    if sheet is None:
        way_out = " (emulated on this machine)" if device.access is None else ": testbed provision finds them out"
        return [f"{device.name}: no facts{way_out}"]
    age = seconds_text(max(0.0, time.time() - sheet["collected"]))
    rows = {**_board(sheet), **_settings(sheet), **_environment(sheet)}
    lines = [f"{device.name}: {sheet.get('status', DASH)}, {age} ago"]
    lines += [f"  {name:<15}{text}" for name, text in rows.items()]
    lines += [f"  attestation    {text}" for text in _attestation(sheet.get("attestation"))]
    lines += [f"  problem        {text}" for text in sheet.get("problems", ())]
    lines += [f"  note           {text}" for text in sheet.get("notes", ())]
    return lines


def _board(sheet: FactSheet) -> dict[str, str]:
    board = sheet["board"]
    l4t = f"L4T {board['l4t']}" if board["l4t"] else None
    return {
        "board": board["model"] or DASH,
        "system": _joined(board["os"], l4t, board["kernel"], board["machine"], _glibc(board["glibc"])),
        "memory": f"{bytes_text(board['memory_bytes'])}, swap {_swap(sheet['swap'])}",
        "disk": f"{bytes_text(sheet['disk_free_bytes'])} free",
    }


def _settings(sheet: FactSheet) -> dict[str, str]:
    cgroup, clock = sheet["memory_cgroup"], sheet["clock"]
    delegated = "delegated to the user" if cgroup["delegated"] else "not delegated to the user"
    locked = {True: "clocks held", False: "clocks free"}.get(sheet["clocks_locked"])
    fan = None if sheet["fan"] is None else f"fan {100 * sheet['fan'] / 255:.0f} %"
    return {
        "memory cgroup": f"{cgroup['version']}, {delegated}" if cgroup["version"] else "none",
        "power": _joined(sheet["power_mode"], _governor(sheet["governor"]), locked, fan),
        "clock": _clock(clock),
        "power rails": _joined(*sheet["meters"]["rails"]),
    }


def _attestation(told: Mapping[str, Any] | None) -> list[str]:
    """The board's image, how much of what it promises holds, what does not, and what was changed by hand since."""
    if told is None:
        return []
    assertions = told["assertions"]
    lines = [f"{told['image']}: {sum(each['holds'] is True for each in assertions)} of {len(assertions)} hold"]
    lines += [
        f"{each['name']}: {each['found'] or 'not known'}, expected {each['expected']}"
        for each in assertions
        if each["holds"] is not True
    ]
    return lines + [f"drifted: {each['what']}: {each['was']} → {each['now']}" for each in told["drift"]]


def _environment(sheet: FactSheet) -> dict[str, str]:
    python, environment = sheet.get("python") or {}, sheet.get("environment") or {}
    torch = environment.get("torch")
    baseline = sheet.get("baseline") or {}
    rows = {
        "python": _joined(python.get("version"), python.get("path")),
        "torch": _joined(torch, "CUDA" if environment.get("cuda_available") else "CPU") if torch else DASH,
        "empty trainer": _baseline(baseline),
    }
    return {**rows, "CUDA charged": _charged(sheet)} if sheet["board"]["l4t"] else rows


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part) or DASH


def _swap(swap: Mapping[str, Any]) -> str:
    return bytes_text(swap["bytes"]) if swap["devices"] else "off"


def _governor(governor: str | None) -> str | None:
    return governor and f"governor {governor}"


def _clock(clock: Mapping[str, Any]) -> str:
    kept = "synchronised" if clock["synchronised"] else "not synchronised"
    if clock["offset_seconds"] is None:
        return kept
    return (
        f"{kept}, {1000 * clock['offset_seconds']:+.1f} ± {1000 * clock['uncertainty_seconds']:.1f} ms to this machine"
    )


def _glibc(version: str | None) -> str | None:
    return version and f"glibc {version}"


def _charged(sheet: FactSheet) -> str:
    """Whether a cap holds the GPU's memory too, and what that was seen by."""
    probe = sheet.get("charge")
    if not probe:
        return "not measured"
    answer = {True: "yes", False: "no"}.get(probe["charged"], "could not be told")
    return f"{answer} ({probe['why']})"


def _baseline(baseline: Mapping[str, Any]) -> str:
    if not baseline:
        return DASH
    own = baseline["bytes"] + baseline["first_step_bytes"]
    return f"{bytes_text(own)}, and {bytes_text(baseline['library_bytes'])} of libraries"
