"""The clock: kept by chrony, and how far it is from the controller's, measured over the connection."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from testbed.provision.part import Answer, Part
from testbed.provision.step import Change, Command, Facts, Note

if TYPE_CHECKING:
    from testbed.connection import Connection
    from testbed.inventory import Device

#: offset_seconds and uncertainty_seconds.
Offset = dict[str, float | None]

#: What a clock may be off against the controller's before a person is told.
_MOST_SECONDS = 0.5
#: The offset's uncertainty below which it is not measured again.
_WELL_ENOUGH_SECONDS = 0.03
_QUICK_SECONDS = 10.0
_INSTALL_SECONDS = 900.0
_INSTALL = (
    "export DEBIAN_FRONTEND=noninteractive; "
    "apt-get install -y -q chrony || { apt-get update -q && apt-get install -y -q chrony; }"
)
#: A minute, looked at every second.
_WAIT = (
    "chronyc waitsync 60 0 0 1 || { echo 'no time source answers: name one that it reaches (the controller, say) in "
    "/etc/chrony/chrony.conf' >&2; exit 1; }"
)
_SCRIPT = """\
command -v chronyc >/dev/null && echo chronyc=yes && quick chronyc -n tracking
[ -d /run/systemd/system ] && timedatectl show -p NTPSynchronized
true
"""


def _parse(answer: Answer) -> dict[str, Any]:
    told = {key.strip(): text.strip() for key, _, text in (line.partition(":") for line in answer.output.splitlines())}
    leap, installed = told.get("Leap status"), "chronyc" in answer.values
    other = answer.values.get("NTPSynchronized")
    clock = {
        "chrony": "missing" if not installed else "stopped" if leap is None else "running",
        "synchronised": leap in {"Normal", "Insert second", "Delete second"} if leap else other == "yes",
        "ntp_offset_seconds": _ntp_offset(told.get("System time", "")),
    }
    return {"clock": clock}


PART = Part("clock", _parse, script=_SCRIPT)


def _ntp_offset(text: str) -> float | None:
    """From "0.000001501 seconds slow of NTP time" to -1.501e-06: how far the device's clock is ahead of NTP's."""
    found = re.match(r"([\d.]+) seconds (fast|slow)", text)
    return None if found is None else float(found[1]) * (1 if found[2] == "fast" else -1)


def offset(sent: float, received: float, stamps: tuple[float, float] | None) -> Offset:
    """How far the device's clock is ahead of the controller's, and how far that may be wrong.

    sent, received    the controller's clock around the round trip, in seconds
    stamps            the device's clock, when its script began and when it ended

    What travelled took the round trip less the script's own time; nobody knows how it was shared between there and
    back, so that the middle is wrong by half of it at most.
    """
    if stamps is None:
        return {"offset_seconds": None, "uncertainty_seconds": None}
    begun, ended = stamps
    travelled = max(0.0, (received - sent) - (ended - begun))
    return {"offset_seconds": begun - (sent + travelled / 2), "uncertainty_seconds": travelled / 2}


def closer(connection: Connection, found: Offset) -> Offset:
    """The offset; measured once more, by the shortest of commands, where it is not known well enough."""
    uncertainty = found["uncertainty_seconds"]
    if uncertainty is None or uncertainty <= _WELL_ENOUGH_SECONDS:
        return found
    sent = time.time()
    told = re.fullmatch(r"\d+\.\d+", connection.attempt(["date", "+%s.%N"], _QUICK_SECONDS).output.strip())
    received = time.time()
    if told is None:  # a `date` that knows no fractions
        return found
    again = offset(sent, received, (float(told[0]), float(told[0])))
    return min(found, again, key=lambda each: each["uncertainty_seconds"] or 0.0)


class Chrony:
    """chrony is there, runs, and has the time.

    needed    False: a clock that agrees with the controller's will do (a server has its own way to keep it)
    """

    name = "clock"

    def __init__(self, *, needed: bool = True) -> None:
        self._needed = needed

    def check(self, facts: Facts, device: Device) -> Change | Note | None:
        clock = facts["clock"]
        if clock["chrony"] == "running" and clock["synchronised"]:
            return self._far(clock)
        if not self._needed and clock["chrony"] == "missing" and _agrees(clock):
            text = f"no chrony; it agrees with the controller's clock to {clock['uncertainty_seconds']:.3f} s now"
            return Note(self.name, text)
        found = {"missing": "no chrony", "stopped": "chrony is not running"}.get(clock["chrony"], "not synchronised")
        commands = (*_up(clock["chrony"]), Command(("sh", "-c", _WAIT), patience_seconds=90))
        return Change(self.name, found, "synchronised by chrony", commands)

    def _far(self, clock: dict[str, Any]) -> Note | None:
        found = clock["offset_seconds"]
        if found is None or _agrees(clock):
            return None
        way = "ahead of" if found > 0 else "behind"
        text = f"its clock is {abs(found):.2f} s {way} the controller's; look whether that one is synchronised"
        return Note(self.name, text)


def _agrees(clock: dict[str, Any]) -> bool:
    """Whether the clock may be the controller's, as far as that could be measured."""
    found, uncertainty = clock["offset_seconds"], clock["uncertainty_seconds"]
    return found is not None and abs(found) - uncertainty <= _MOST_SECONDS


def _up(state: str) -> list[Command]:
    """The commands after which chronyd runs and looks for the time."""
    if state == "running":
        return [Command(("chronyc", "burst", "4/8"), become=True), Command(("chronyc", "makestep"), become=True)]
    install = Command(("sh", "-c", _INSTALL), become=True, patience_seconds=_INSTALL_SECONDS)
    start = Command(("systemctl", "enable", "--now", "chrony.service"), become=True)
    return [install, start] if state == "missing" else [start]
