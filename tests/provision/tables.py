"""Cases as tables: the facts of a board, what differs in a case, and what the steps say of it, command by command."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from testbed.config import load_profile
from testbed.inventory import Access, Budget, Device, HardwareProfile
from testbed.package_data import data_folder
from testbed.provision.batch import text_of
from testbed.provision.runner import board_steps
from testbed.provision.step import Change, Finding, Note, Problem
from testbed.provision.visit import Options

HERE = Path(__file__).parent
#: A machine of no known make.
BOX = HardwareProfile("box", "A box", memory_bytes=2 << 30, usable_memory_bytes=1900 << 20, cores=4)


@cache
def read(name: str) -> Any:
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


def laid_over(below: Any, above: Any) -> Any:
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        return {**below, **{key: laid_over(below.get(key), value) for key, value in above.items()}}
    return above


def facts_of(board: str, differs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    facts = laid_over(read("boards/_base.yaml"), read(f"boards/{board}.yaml")["facts"])
    return laid_over(facts, differs or {})


def device_of(board: str, **settings: Any) -> Device:
    about = read(f"boards/{board}.yaml")
    profile = BOX
    if about["profile"] is not None:
        profile = load_profile(data_folder("inventory") / "profiles" / f"{about['profile']}.yaml")
    budget = Budget(1 << 30, settings.pop("cores", None))
    return Device("it", about["kind"], profile, budget, access=Access("board.lab"), **settings)


def findings(board: str, differs: Mapping[str, Any] | None, device: Device) -> dict[str, Any]:
    """What every step of the board's kind says, as the tables tell it; a step that is content is not there."""
    facts = facts_of(board, differs)
    found = {step.name: step.check(facts, device) for step in board_steps(device, Options())}
    return {name: as_told(finding) for name, finding in found.items() if finding is not None}


def as_told(finding: Finding) -> dict[str, Any]:
    if isinstance(finding, Change):
        told: dict[str, Any] = {"found": finding.found, "wanted": finding.wanted}
        told["commands"] = [text_of(command) for command in finding.commands]
        flags = {"needs_reboot": finding.needs_reboot, "needs_login": finding.needs_login}
        return told | {name: True for name, flag in flags.items() if flag}
    kind = "fatal" if isinstance(finding, Problem) and finding.fatal else "problem"
    return {"note" if isinstance(finding, Note) else kind: finding.text}
