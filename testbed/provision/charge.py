"""Whether a Jetson charges CUDA memory to the cgroup of who takes it: measured once per kernel and torch, and kept.

A probe that could not tell is kept too, with its reason, and made again at the next visit.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from testbed.devices import _board
from testbed.errors import DeviceError
from testbed.provision import environment_build
from testbed.provision.part import Answer, Part
from testbed.provision.step import Change, Facts, Note

if TYPE_CHECKING:
    from testbed.connection import Connection
    from testbed.inventory import Device
    from testbed.provision.step import Say

_FILE = "charge-{}.json"
_SECONDS = 300.0
#: On cgroup v2 without root, the probe needs a scope of the user's manager, as an agent does.
_BOOTSTRAP = """\
import json, os, sys
sys.path.insert(0, os.path.expanduser(sys.argv[1]))
from testbed.node import charge_probe, limits
scope = limits.scope_command() if len(sys.argv) == 2 else ()
if scope:
    os.execvp(scope[0], [*scope, sys.executable, "-I", "-c", sys.orig_argv[-2], sys.argv[1], "scoped"])
charge_probe.main()
"""


def _parse(answer: Answer) -> dict[str, Any]:
    try:
        record = json.loads(answer.output or "{}")
    except ValueError:
        record = {}
    return {"cuda_charged_to_cgroup": record.get("charged"), "charge": record or None}


CHARGE_PART = Part("charge", _parse, script=f'cat "$FOLDER/{_FILE.format("$DEVICE")}"')


class ChargeProbe:
    """The probe, where there is a CUDA that shares the board's memory; of one visit, in which it is made once."""

    name = "CUDA in cgroup"

    def __init__(self) -> None:
        self._made = False

    def check(self, facts: Facts, device: Device) -> Change | Note | None:
        environment = facts.get("environment") or {}
        if device.kind != "jetson" or device.accelerator != "cuda" or not environment.get("cuda_available"):
            return None
        board = facts["board"]
        key = {"kernel": board["kernel"], "l4t": board["l4t"], "torch": environment.get("torch")}
        record = facts.get("charge") or {}
        known = record.get("key") == key
        if known and record["charged"] is not None:
            return None
        if known and self._made:
            return Note(self.name, f"it could not be told, and is tried again at the next visit: {record['why']}")
        parent = facts["memory_cgroup"]["parent"]

        def act(connection: Connection, say: Say) -> None:
            say("taking GPU memory in a group of its own")
            found = probe(connection, device, parent)
            told = json.dumps({"key": key, **found})
            script = 'cat >"$1.new" && mv "$1.new" "$1"'
            path = f"{_board.folder(device)}/{_FILE.format(device.name)}"
            connection.run(["sh", "-c", script, "sh", path], data=told.encode())
            self._made = True

        found = f"could not be told: {record['why']}" if known else "not measured"
        return Change(self.name, found, "measured", action=act)


def probe(connection: Connection, device: Device, parent: str | None) -> dict[str, Any]:
    """Run the probe on the device; raises DeviceError when it says nothing."""
    code = f"{_board.folder(device)}/code/{environment_build.our_code().sha256}"
    command = [_board.python(device), "-I", "-c", _BOOTSTRAP, code]
    ran = connection.attempt(command, _SECONDS, data=json.dumps({"parent": parent}).encode())
    try:
        found = json.loads(ran.output.splitlines()[-1])
    except (ValueError, IndexError):
        said = (ran.errors.strip().splitlines() or ["it said nothing"])[-1]
        raise DeviceError(f"{connection.name}: the probe of CUDA memory ended with {ran.exit_code}: {said}") from None
    return {"charged": found["charged"], "why": found["why"]}
