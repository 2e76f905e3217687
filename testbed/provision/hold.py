"""The device held for a visit that changes something there, as a run holds it: by the same lock, and without Python.

`testbed.node.landing` has the lock of runs; here it is taken by a script of POSIX sh, because a new board has nothing
else.  A run is refused by it, and so is another visit.  A visit that has ended without letting go (its link broke, its
process was killed) leaves its lock behind: the next one of the same user and host takes it over.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from testbed.devices import _board
from testbed.devices._agent_node import PROVISION, locked_text
from testbed.errors import DiskError, LockedError
from testbed.process_identity import ProcessIdentity, login_name
from testbed.provision.environment_builder import BUILDER_LOCK
from testbed.provision.part import Answer

if TYPE_CHECKING:
    from testbed.connection import Connection
    from testbed.inventory import Device

#: More than a visit may do without a word: sending wheels over a thin link, installing torch on an SD card.
_STALE_SECONDS = 6 * 3600.0
#: Clock ticks of /proc/PID/stat; on every Linux that Python and torch have wheels for.
_TICKS_PER_SECOND = 100
#: Of this process: the visits that hold a device now.
_at_work: set[str] = set()

# Whoever changes a lock holds lock.barred (`flock` is part of every system but the smallest, where two that take over
# or let go in the same instant are not kept apart).
_ALONE = 'cd "$1" || exit\nexec 9>>lock.barred; flock 9 2>/dev/null\nours() { grep -qsF -e "$1" lock.json; }\n'

# $1 folder, $2 the claim, which lacks its end, $3 our visit, $4 the visit whose lock is taken over, $5 the interpreter.
# Says who else holds the device, or works there; the lock is ours when nobody does.  Before that is known it is not,
# for no moment: the run whose agents are at work would be refused by it.
_TAKE = f"""\
umask 077; mkdir -p "$1" || exit
{_ALONE}
field() {{ shift "$1"; echo "$1"; }}
read -r uptime idle </proc/uptime
read -r boot </proc/sys/kernel/random/boot_id
read -r first </proc/1/stat
first=$(field 20 ${{first##*)}} 2>/dev/null)
boot=$boot/${{first:-0}} draft=lock.json.$3
left() {{ [ -n "$4" ] && ours "$4"; }}
agents=$(
  for lock in runs/*/spool/agent.lock runs/*/*/spool/agent.lock; do
    [ -e "$lock" ] || continue
    flock -s -n "$lock" true
    [ $? -ne 1 ] || echo "agent=${{lock%/spool/agent.lock}}"
  done
)
if [ -z "$agents" ]; then
  printf '%s, "boot": "%s", "at": %s}}' "$2" "$boot" "$uptime" >"$draft" || {{ rm -f "$draft"; exit 1; }}
  if left "$@"; then mv -f "$draft" lock.json; else ln "$draft" lock.json; code=$?; fi
  rm -f "$draft"
  [ -e lock.json ] || exit $code
fi
if [ -e lock.json ] && ! ours "$3" && ! left "$@"; then
  printf 'held=yes\\nlock='; tr '\\n' ' ' <lock.json; echo
fi
command -v "$5" >/dev/null && echo python=yes
printf '%s\\n' "uptime=$uptime" "boot=$boot" "first=${{boot##*/}}" "$agents"
"""

# $1 folder, $2 our visit.  What still builds there does so for nobody.
_RELEASE = f"""\
{_ALONE}
ours "$2" || exit 0
if [ -e {BUILDER_LOCK} ]; then
  flock -s -n {BUILDER_LOCK} true
  [ $? -ne 1 ] || kill -KILL "-$(cat {BUILDER_LOCK})"
fi
rm -f lock.json
"""


class Hold:
    """A device's lock, for one visit."""

    def __init__(self, device: Device) -> None:
        self.taken = False
        self._device = device
        self._visit = secrets.token_hex(16)

    def take(self, connection: Connection, found: Mapping[str, Any] | None) -> None:
        """Hold the device, or see that we still do; `found`: the lock as it was last seen there.

        Raises LockedError when a run or another visit has it, DiskError when no lock can be written there.
        """
        if not self.taken:
            self._take(connection, found)
        elif found is None or found.get("visit") != self._visit:
            name = self._device.name
            raise LockedError(
                f"device {name} was taken from this visit with `testbed unlock`, and nothing more was changed; go on "
                f"with: testbed provision --only {name}"
            )

    def release(self, connection: Connection) -> None:
        """Let go of the device, and end what an interrupted visit left at work there."""
        self._forget()
        connection.attempt(["sh", "-c", _RELEASE, "sh", _board.folder(self._device), self._visit])

    def _take(self, connection: Connection, found: Mapping[str, Any] | None) -> None:
        self.taken = True  # also where it breaks off, and is not known to be so
        _at_work.add(self._visit)
        folder, python = _board.folder(self._device), _board.python(self._device)
        claim = json.dumps(self._claim()).removesuffix("}")
        ran = connection.attempt(["sh", "-c", _TAKE, "sh", folder, claim, self._visit, _left_behind(found), python])
        if ran.exit_code:
            self._forget()
            why = "".join(ran.errors.strip().splitlines()[-1:]) or f"exit code {ran.exit_code}"
            raise DiskError(f"device {self._device.name} cannot be held: {why}")
        if others := _others(self._device, Answer(output=ran.output)):
            self._forget()
            raise LockedError(others)

    def _forget(self) -> None:
        self.taken = False
        _at_work.discard(self._visit)

    def _claim(self) -> dict[str, Any]:
        """As a run says it; and who we are, for the next visit."""
        return {
            "run": PROVISION,
            "device": self._device.name,
            "owner": f"{_login()}:{os.getpid()}",
            "since": time.time(),
            "spool": f"{_board.folder(self._device)}/runs/{PROVISION}/spool",  # is never there: it has no agent
            "orphan_seconds": _STALE_SECONDS,
            "visit": self._visit,
            "process": asdict(ProcessIdentity.own()),
        }


def _login() -> str:
    return f"{login_name()}@{socket.gethostname()}"


def _left_behind(lock: Mapping[str, Any] | None) -> str:
    """The visit whose lock it is, where that is one of ours that is no more; else ""."""
    if lock is None or lock.get("run") != PROVISION or str(lock.get("owner")).rpartition(":")[0] != _login():
        return ""
    try:
        visit, process = str(lock["visit"]), ProcessIdentity(**lock["process"])
    except (KeyError, TypeError):  # somebody else wrote it
        return ""
    at_work = visit in _at_work if process == ProcessIdentity.own() else process.alive
    return "" if at_work else visit


# ── who holds it, in words ───────────────────────────────────────────────────────────────────────────────────────────
def _others(device: Device, answer: Answer) -> str | None:
    """Who holds the device, or is at work there, and the way out; None when it is ours."""
    agents = [line.removeprefix("agent=") for line in answer.output.splitlines() if line.startswith("agent=")]
    if "held" not in answer.values:
        return _at_work_text(device.name, agents[0]) if agents else None
    holder = _holder(answer.values, agents)
    text = locked_text(device.name, PROVISION, holder)
    if "python" in answer.values:
        return text
    return f"{text} (or, while it has no Python of ours, remove {_board.folder(device)}/lock.json there)"


def _holder(told: Mapping[str, str], agents: list[str]) -> dict[str, Any]:
    """What `testbed.node.landing.holder` would say."""
    try:
        lock = json.loads(told["lock"])
        begun = lock["at"] if lock["boot"] == told["boot"] else int(told["first"]) / _TICKS_PER_SECOND
        age = float(told["uptime"]) - begun
        alive = any(lock["spool"].endswith(f"/{agent}/spool") for agent in agents)
        stale = not alive and age > lock["orphan_seconds"]
        named = {key: lock[key] for key in ("run", "device", "owner")}
    except (ValueError, KeyError, TypeError, AttributeError):  # the disk was full, or somebody else wrote it
        return {"run": None}
    return {**named, "age_seconds": age, "agent_alive": alive, "stale": stale}


def _at_work_text(device: str, agent: str) -> str:
    """`agent`: below the folder, runs/RUN or runs/RUN/DEVICE.  Of emulated devices there is no lock."""
    run = agent.split("/")[1]
    return (
        f"an agent of run {run} is at work on the machine of device {device}; wait for it, or end it with `testbed "
        f"stop {run}`"
    )
