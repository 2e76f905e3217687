"""Power mode, clocks, fan and governor: what decides how fast a board computes, and what it draws doing so.

Numbers of power modes differ between tables: a mode is named, and its number is read in the board's own table.

Tried on: the programs and files of the virtual lab's boards; on no board yet.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from testbed.provision import boot_script
from testbed.provision.part import Answer, Part
from testbed.provision.step import Change, Command, Facts, Problem
from testbed.spelling import did_you_mean

if TYPE_CHECKING:
    from testbed.inventory import Device

_TABLE = "/etc/nvpmodel.conf"
_STATUS = "/var/lib/nvpmodel/status"
#: In memory, so that a boot forgets it: the power mode that was chosen for the next boot.
_PENDING = "/run/edge-testbed/power-mode"
_FREQUENCY = "/sys/devices/system/cpu/cpufreq/policy*/scaling_"
#: 57000000.gpu on Nano, 17000000.gv11b on Xavier, 17000000.ga10b or 17000000.gpu on Orin.
_GPUS = tuple(f"/sys/class/devfreq/*{name}*/" for name in ("gpu", "gv11b", "ga10b"))
_SCRIPT = """\
command -v nvpmodel >/dev/null && echo nvpmodel=yes && quick nvpmodel -q | sed -n 's/^NV Power Mode: */mode=/p'
command -v jetson_clocks >/dev/null && echo jetson_clocks=yes
true
"""


def _parse(answer: Answer) -> dict[str, Any]:
    values = answer.values
    modes = _modes(answer.text(_TABLE) or "")
    stored = re.search(r"pmode:0*(\d+)", answer.text(_STATUS) or "")
    by_status = modes.get(stored[1]) if stored else None
    policies = _policies(answer.files)
    return {
        "power_mode": values.get("mode") or by_status,
        "power_modes": modes,
        "power_mode_pending": answer.text(_PENDING),
        "nvpmodel": "nvpmodel" in values,
        "jetson_clocks": "jetson_clocks" in values,
        "clocks_locked": _locked(policies, _gpu_range(answer.files)),
        "governor": _one(policy["governor"] for policy in policies),
        "frequencies": policies,
        "fan": _fan(answer.files),
    }


PART = Part(
    "power",
    _parse,
    files=(
        _TABLE,
        _STATUS,
        _PENDING,
        f"{_FREQUENCY}governor",
        f"{_FREQUENCY}min_freq",
        f"{_FREQUENCY}max_freq",
        *(f"{gpu}{end}_freq" for gpu in _GPUS for end in ("min", "max")),
        "/sys/class/hwmon/hwmon*/pwm1",
        "/sys/devices/pwm-fan/target_pwm",
    ),
    script=_SCRIPT,
)


def _modes(table: str) -> dict[str, str]:
    """Name by number, of the `< POWER_MODEL ID=2 NAME=MAXN >` lines of nvpmodel.conf."""
    lines = re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", table, re.MULTILINE)
    return {str(int(number)): name for number, name in lines}


def _policies(files: Any) -> list[dict[str, Any]]:
    """Governor and limits of every group of cores, in the order of their numbers."""
    folders = {path.rpartition("/")[0] for path in files if "/cpufreq/policy" in path}
    ordered = sorted(folders, key=lambda folder: int(re.sub(r"\D", "", folder.rpartition("/")[2]) or 0))
    return [
        {
            "name": folder.rpartition("/")[2],
            "governor": files.get(f"{folder}/scaling_governor"),
            "min_hertz": _kilohertz(files.get(f"{folder}/scaling_min_freq")),
            "max_hertz": _kilohertz(files.get(f"{folder}/scaling_max_freq")),
        }
        for folder in ordered
    ]


def _kilohertz(text: str | None) -> int | None:
    return int(text) * 1000 if text and text.strip().isdigit() else None


def _gpu_range(files: Any) -> tuple[str | None, str | None] | None:
    """The GPU's lowest and highest frequency; None where it tells none."""
    folder = next((path.rpartition("/")[0] for path in files if path.startswith("/sys/class/devfreq/")), None)
    return None if folder is None else (files.get(f"{folder}/min_freq"), files.get(f"{folder}/max_freq"))


def _locked(policies: list[dict[str, Any]], gpu: tuple[str | None, str | None] | None) -> bool | None:
    """Whether lowest and highest frequency are the same, of every core and the GPU; None where none is told."""
    ranges = [(policy["min_hertz"], policy["max_hertz"]) for policy in policies] + ([gpu] if gpu else [])
    return all(low == high for low, high in ranges) if ranges else None


def _one(values: Any) -> str | None:
    """The value that all have; several with commas; None for none."""
    found = sorted({value for value in values if value})
    return ", ".join(found) or None


def _fan(files: Any) -> int | None:
    """The fan's duty, 0 to 255; None without a fan that tells it."""
    if "/sys/devices/pwm-fan/target_pwm" in files:  # JetPack 4
        return int(files["/sys/devices/pwm-fan/target_pwm"])
    duties = [text for path, text in sorted(files.items()) if path.endswith("/pwm1") and text.isdigit()]
    return int(duties[0]) if duties else None


#: Where a mode needs a reboot, nvpmodel asks whether to do that now.  It is told no, because when a board goes down is
#: for the user to say; the mode is then stored as nvpmodel itself stores it, and its service sets it at the next boot.
_SET_MODE = f"""\
said=$(echo no | nvpmodel -m "$1" 2>&1)
case $said in
  *"Reboot required"*) mkdir -p {_PENDING.rpartition("/")[0]} {_STATUS.rpartition("/")[0]} &&
    printf 'pmode:%04d\\n' "$1" >{_STATUS} && echo "$2" >{_PENDING} ;;
  *"NVPM ERROR"*) echo "$said" >&2; exit 1 ;;
  *) rm -f {_PENDING} ;;
esac"""


class PowerMode:
    """The power mode of the inventory's name; left as it is where the inventory names none."""

    name = "power mode"

    def check(self, facts: Facts, device: Device) -> Change | Problem | None:
        wanted, found = device.power_mode, facts["power_mode"]
        if wanted is None:
            return None
        pending = facts["power_mode_pending"]
        if pending == wanted:
            return Change(self.name, f"{wanted} chosen, not yet in effect", wanted, needs_reboot=True)
        if found == wanted and pending is None:
            return None
        modes = facts["power_modes"]
        number = next((number for number, name in modes.items() if name == wanted), None)
        if number is None:
            known = did_you_mean(wanted, modes.values()) if modes else f"{_TABLE} has none"
            return Problem(self.name, f"this board has no power mode {wanted!r}; {known}")
        command = Command(("sh", "-c", _SET_MODE, "sh", number, wanted), become=True)
        text = f"{pending} chosen for the next boot" if pending else found or "unknown"
        return Change(self.name, text, wanted, (command,))


class Clocks:
    """Every clock of a Jetson at the highest that its power mode allows, held there by `jetson_clocks`."""

    name = "clocks"
    _script = "jetson_clocks\n"

    def check(self, facts: Facts, device: Device) -> Change | None:
        if not facts["jetson_clocks"]:
            return None
        held = facts["clocks_locked"] is not False
        if held and boot_script.installed(facts, "clocks", self._script):
            return None
        found = "held until the next boot" if held else "free to move"
        return Change(self.name, found, "held at their highest", boot_script.install(facts, "clocks", self._script))


class Fan:
    """The fan of a Jetson at full speed: what it draws, and how hot the board gets, is then the same in every run."""

    name = "fan"
    _script = "systemctl stop nvfancontrol 2>/dev/null\njetson_clocks --fan\n"

    def check(self, facts: Facts, device: Device) -> Change | None:
        duty = facts["fan"]
        if duty is None or not facts["jetson_clocks"]:
            return None
        if duty == 255 and boot_script.installed(facts, "fan", self._script):
            return None
        found = f"{100 * duty / 255:.0f} %" + (" until the next boot" if duty == 255 else "")
        return Change(self.name, found, "100 %", boot_script.install(facts, "fan", self._script))


class Governor:
    """The cores' frequency does not wait for load: the governor `performance`."""

    name = "governor"
    _script = f"for file in {_FREQUENCY}governor; do echo performance >$file; done\n"

    def check(self, facts: Facts, device: Device) -> Change | None:
        governor = facts["governor"]
        if governor is None:
            return None
        if governor == "performance" and boot_script.installed(facts, "governor", self._script):
            return None
        found = governor + (" until the next boot" if governor == "performance" else "")
        return Change(self.name, found, "performance", boot_script.install(facts, "governor", self._script))
