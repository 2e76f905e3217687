"""Fact sheets: what provisioning found on each device, kept on the controller as FOLDER/facts/DEVICE.json.

Keys are told in `testbed.provision.facts`; beside them, `problems` and `notes` of the last visit in words.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.durable import disk_errors_in_words, write_json

if TYPE_CHECKING:
    from testbed.inventory import Device

VARIABLE = "TESTBED_DATA"
#: The status and the steps of a visit after which its facts about Python do not count.
_INTERRUPTED = "interrupted"
_OF_PYTHON = frozenset({"python", "code", "environment", "proof", "link"})
#: Plain JSON.
FactSheet = Mapping[str, Any]


def data_home() -> Path:
    """$TESTBED_DATA, or edge-testbed in the user's data folder (XDG_DATA_HOME, ~/.local/share)."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "edge-testbed"


def stored_facts(device: str) -> FactSheet | None:
    """The last fact sheet of a device; None when it was never provisioned from here."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(_path(device).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


def facts_of(device: Device) -> FactSheet | None:
    """The fact sheet of a device of an inventory; None when it is of another machine that has the same name."""
    sheet = stored_facts(device.name)
    known = sheet is not None and device.access is not None and sheet.get("host") == device.access.host
    return sheet if known else None


def outdated(sheet: FactSheet) -> str | None:
    """Why what a sheet says of a device's Python may not hold there any more; None when nothing says so.

    A visit that failed over Python, or never ended, may have left another environment than the one it looked at.
    """
    if sheet.get("status") == _INTERRUPTED:
        return "the last visit was interrupted"
    told = [text for text in sheet.get("problems") or () if text.partition(":")[0] in _OF_PYTHON]
    return told[0] if told else None


def store(device: str, sheet: FactSheet) -> None:
    """Replace a device's fact sheet; raises StoreError when it cannot be written."""
    path = _path(device)
    with disk_errors_in_words(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, sheet)


def _path(device: str) -> Path:
    return data_home() / "facts" / f"{device}.json"
