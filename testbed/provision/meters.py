"""Meters and flags that the login user can read: power rails, vcgencmd, jtop; throttling and low voltage.

Tried on: the programs and files of the virtual lab's boards; on no board yet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from testbed.node.conditions import THROTTLED
from testbed.provision import boot_script
from testbed.provision.part import Answer, Part
from testbed.provision.step import Change, Command, Facts, Note

if TYPE_CHECKING:
    from testbed.inventory import Device

_HWMON = "/sys/class/hwmon/hwmon*/"
_IIO = "/sys/bus/iio/devices/iio*/"  # JetPack 4
_FIGURES = f"{_HWMON}in?_input {_HWMON}curr?_input {_HWMON}power?_input {_HWMON}energy?_input {_IIO}in_power?_input"
#: At every boot, because sysfs forgets modes; by globs, because the numbers may be others then.
_READABLE = f'for file in {_FIGURES}; do [ ! -e "$file" ] || chmod a+r "$file"; done\n'
_SCRIPT = f"""\
for file in {_FIGURES}; do
  [ -e "$file" ] && [ ! -r "$file" ] && echo "unreadable_$file=yes"
done
command -v vcgencmd >/dev/null && echo vcgencmd=yes && quick vcgencmd get_throttled
[ -S /run/jtop.sock ] && echo jtop=yes && [ -w /run/jtop.sock ] && echo jtop_writable=yes
if [ -S /run/jtop.sock ] || command -v vcgencmd >/dev/null; then echo "groups=$(id -nG $ME)"; fi
"""


def _parse(answer: Answer) -> dict[str, Any]:
    values = answer.values
    flags = values.get("throttled", "")
    meters = {
        "rails": _rails(answer.files),
        "unreadable": sorted(key.removeprefix("unreadable_") for key in values if key.startswith("unreadable_")),
        "vcgencmd": bool(flags) if "vcgencmd" in values else None,
        "jtop": "jtop_writable" in values if "jtop" in values else None,
    }
    throttled = int(flags, 16) if re.fullmatch("0x[0-9a-fA-F]+", flags) else None
    events = {path: int(text) for path, text in answer.files.items() if "_event_cnt" in path and text.isdigit()}
    member = values.get("groups", "").split()
    return {"meters": meters, "throttled": throttled, "over_current_events": events, "member_of": member}


PART = Part(
    "meters",
    _parse,
    files=(
        f"{_HWMON}name",
        f"{_HWMON}in?_label",
        f"{_HWMON}in?_input",
        f"{_HWMON}curr?_input",
        f"{_HWMON}oc?_event_cnt",
        f"{_IIO}rail_name_?",
        f"{_IIO}in_power?_input",
    ),
    script=_SCRIPT,
)


def _rails(files: Mapping[str, str]) -> dict[str, str]:
    """Where each power rail is read, by its name on the board: of those whose figures the user can read."""
    rails = {}
    for path, label in files.items():
        if path.endswith("_label") and files.get(f"{path.rpartition('/')[0]}/name", "").startswith("ina"):
            needed = (path.replace("_label", "_input"), path.replace("_label", "_input").replace("/in", "/curr"))
            if all(file in files for file in needed):
                rails[label.strip()] = needed[0]
        elif "/rail_name_" in path:
            power = path.replace("/rail_name_", "/in_power") + "_input"
            if power in files:
                rails[label.strip()] = power
    return rails


class Rails:
    """The power rails that the profile names are there, and readable without being root."""

    name = "power rails"

    def check(self, facts: Facts, device: Device) -> Change | Note | None:
        names = [rail.name for rail in device.profile.rails if rail.source.startswith("ina")]
        missing = [name for name in names if name not in facts["meters"]["rails"]]
        if not device.profile.rails:
            return Note(self.name, "no power sensor of its own: energy needs an external meter")
        if not missing:
            return None
        if facts["meters"]["unreadable"]:
            found, wanted = f"{', '.join(missing)} cannot be read by {facts['login']['user']}", "readable by everybody"
            return Change(self.name, found, wanted, boot_script.install(facts, "rails", _READABLE))
        return Note(self.name, f"{', '.join(missing)} not found: no energy of this board until a sensor tells them")


class GroupForMeter:
    """The login user is in the group that a meter's program asks for."""

    def __init__(self, meter: str, group: str) -> None:
        self.name = meter
        self._group = group

    def check(self, facts: Facts, device: Device) -> Change | Note | None:
        if facts["meters"][self.name] is not False:
            return None
        user, group = facts["login"]["user"], self._group
        if group in facts["member_of"]:
            return Note(self.name, f"{self.name} gives {user} no answer, although in group {group}")
        command = Command(("usermod", "-aG", group, user), become=True)
        found, wanted = f"not for {user}", f"{user} in group {group}"
        return Change(self.name, found, wanted, (command,), needs_login=True)


class Throttling:
    """What the board says of its voltage and temperature, now and since its boot."""

    name = "throttling"

    def check(self, facts: Facts, device: Device) -> Note | None:
        flags = facts["throttled"] or 0
        now = [text for bit, text in enumerate(THROTTLED) if flags >> bit & 1]
        ever = [text for bit, text in enumerate(THROTTLED) if flags >> (bit + 16) & 1 and text not in now]
        parts = [f"{' and '.join(texts)} {when}" for texts, when in ((now, "now"), (ever, "since its boot")) if texts]
        if not parts:
            return None
        return Note(self.name, f"{'; '.join(parts)}: look at its power supply and cooling before measuring")


class OverCurrent:
    """How often a Jetson has lowered its clocks because it drew too much; counted since its boot."""

    name = "over-current"

    def check(self, facts: Facts, device: Device) -> Note | None:
        count = sum(facts["over_current_events"].values())
        text = f"{count} since its boot: look at its power supply before measuring"
        return Note(self.name, text) if count else None
