"""The fact sheet that a visit leaves: on the controller, and on the device itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from testbed import fact_sheets
from testbed.errors import TestbedError
from testbed.provision.attestation import record
from testbed.provision.board import Identity
from testbed.provision.part import Answer, Part
from testbed.provision.step import LOST_LINK, Note

if TYPE_CHECKING:
    from testbed.provision.visit import Outcome, Visit

_FILE = "facts-{}.json"  # of each device: guests share a folder
#: What is another number at every visit: a sheet that differs in nothing else is not sent again.
_RESTLESS = frozenset({"collected", "clock", "disk_free_bytes", "digest", "sheet_there", "boot", "folder_mode"})


def _parse(answer: Answer) -> dict[str, Any]:
    return {"sheet_there": answer.output.strip() or None}


PART = Part("sheet", _parse, script=f'sed -n \'s/^ "digest": "\\(.*\\)".*/\\1/p\' "$FOLDER/{_FILE.format("$DEVICE")}"')


def sheet_of(outcome: Outcome, attestation: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The facts, and what the visit says about them."""
    facts = {key: value for key, value in (outcome.facts or {}).items() if key != "sheet_there"}
    sheet = {
        **facts,
        "attestation": attestation,
        "status": outcome.status,
        "problems": [f"{problem.step}: {problem.text}" for problem in outcome.problems],
        "notes": [f"{note.step}: {note.text}" for note in outcome.notes],
    }
    return {"digest": _digest(sheet), **sheet}


def keep(visit: Visit, outcome: Outcome) -> Outcome:
    """Store the sheet here, and there where it says something new; a device that cannot keep it is no failure.

    What was found on another board than the one that is meant is nobody's sheet.
    """
    if outcome.facts is None or any(problem.step == Identity.name for problem in outcome.problems):
        return outcome
    stored, accept = fact_sheets.facts_of(visit.device), visit.options.accept_drift
    sheet = sheet_of(outcome, record(stored, outcome.facts, visit.device, outcome.drift, accept=accept))
    fact_sheets.store(outcome.device, sheet)
    lost = any(problem.step == LOST_LINK for problem in outcome.problems)
    if lost or sheet["digest"] == outcome.facts.get("sheet_there"):
        return outcome
    try:
        visit.put(_FILE.format(outcome.device), json.dumps(sheet, indent=1) + "\n")
    except TestbedError as error:
        return replace(outcome, notes=(*outcome.notes, Note("fact sheet", f"not kept on the device: {error}")))
    return outcome


def _digest(sheet: Mapping[str, Any]) -> str:
    lasting = {key: value for key, value in sheet.items() if key not in _RESTLESS and key != "status"}
    lasting["notes"] = [note for note in sheet["notes"] if note.partition(":")[0] not in _RESTLESS]
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()[:16]
