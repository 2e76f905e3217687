"""Disk space where the testbed's folder is, or will be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from testbed.byte_text import format_bytes
from testbed.provision.part import Answer, Part
from testbed.provision.step import Facts, Problem

if TYPE_CHECKING:
    from testbed.inventory import Device

#: The environment takes about 1.2 GB and its wheels 0.3 GB while they are unpacked; then base models and spools.
_BEFORE_ENVIRONMENT_BYTES = 3 << 30
_AFTER_ENVIRONMENT_BYTES = 1 << 30
_SCRIPT = """\
at=$FOLDER
while [ ! -d "$at" ]; do at=${at%/*}; at=${at:-/}; done
df -Pk "$at"
"""


def _parse(answer: Answer) -> dict[str, Any]:
    """The last line of POSIX df: file system, KiB, used, available, share, where it is mounted."""
    words = (answer.output.strip().splitlines() or [""])[-1].split()
    known = len(words) >= 6 and words[3].isdigit()
    return {"disk_free_bytes": int(words[3]) * 1024 if known else None, "disk": words[5] if known else None}


PART = Part("disk", _parse, script=_SCRIPT)


class DiskSpace:
    """Room for the environment, a base model and a run."""

    name = "disk"

    def check(self, facts: Facts, device: Device) -> Problem | None:
        free = facts["disk_free_bytes"]
        to_be_built = "environment" in facts and not (device.python or facts["environment"].get("record"))
        needed = _BEFORE_ENVIRONMENT_BYTES if to_be_built else _AFTER_ENVIRONMENT_BYTES
        if free is None or free >= needed:
            return None
        text = f"{format_bytes(free)} free on {facts['disk']}, {format_bytes(needed)} needed"
        return Problem(self.name, f"{text}; free some, or name another place with `folder:` in the inventory")
