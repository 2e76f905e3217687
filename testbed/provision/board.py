"""Which board it is that answers, who logs in there, and what it runs: facts, and the check against the profile."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

from testbed.byte_text import format_bytes
from testbed.provision.environment_torch import NoTorchError, l4t_major, torch_build
from testbed.provision.part import Answer, Part
from testbed.provision.step import Facts, Note, Problem

if TYPE_CHECKING:
    from testbed.inventory import Device, HardwareProfile

#: Of the profile's usable memory, what a board must have at least: releases and firmware settings move it by some
#: percent (an Orin Nano 8 GB has 7300 MiB on JetPack 5 and 7620 on 6), the next smaller board has half.
_LEAST_SHARE = 0.75

_SCRIPT = """\
for tree in /proc/device-tree /sys/firmware/devicetree/base; do
  if [ -r $tree/compatible ]; then
    printf 'model='; tr '\\000' '\\n' <$tree/model; echo
    printf 'compatible='; tr '\\000' ' ' <$tree/compatible; echo
    break
  fi
done
echo "uname=$(uname -rm)"
echo "id=$IDS"
echo "home=$HOME"
getconf -a | grep -E '^(LONG_BIT|PAGESIZE|GNU_LIBC_VERSION) '
[ -d /run/systemd/system ] && echo systemd=yes
for display in /tmp/.X11-unix/X* /run/user/*/wayland-0; do [ -S "$display" ] && echo desktop=yes; done
[ -r "$FOLDER/lock.json" ] && { printf 'lock='; tr '\\n' ' ' <"$FOLDER/lock.json"; echo; }
true
"""


def _parse(answer: Answer) -> dict[str, Any]:
    values = answer.values
    login = _login(values.get("id", ""))
    kernel, _, machine = values.get("uname", "").partition(" ")
    system = dict(re.findall(r"^([A-Z_]+) +(.*\S)", answer.output, re.MULTILINE))  # what getconf says
    board = {
        "model": values.get("model") or None,
        "compatible": values.get("compatible", "").split(),
        **_release(answer),
        "kernel": kernel or None,
        "machine": machine or None,
        "bits": _whole(system.get("LONG_BIT")),
        "glibc": system.get("GNU_LIBC_VERSION", "").removeprefix("glibc ") or None,
        "memory_bytes": _memory(answer.text("/proc/meminfo") or ""),
        "cores": cores_of(answer.text("/sys/devices/system/cpu/online") or ""),
        "page_bytes": _whole(system.get("PAGESIZE")),
        "systemd": "systemd" in values,
        "desktop": "desktop" in values,
    }
    boot = {
        "id": answer.text("/proc/sys/kernel/random/boot_id"),
        "command_line": answer.text("/proc/cmdline"),
    }
    return {"login": {**login, "home": values.get("home")}, "board": board, "boot": boot, "lock": _lock(values)}


PART = Part(
    "board",
    _parse,
    files=(
        "/proc/meminfo",
        "/proc/cmdline",
        "/sys/devices/system/cpu/online",
        "/proc/sys/kernel/random/boot_id",
        "/etc/os-release",
        "/etc/nv_tegra_release",
        "/etc/rpi-issue",
    ),
    script=_SCRIPT,
)


def _release(answer: Answer) -> dict[str, Any]:
    """The operating system in words and in numbers; `l4t` is "36.4.3" on a Jetson, None elsewhere."""
    lines = (answer.text("/etc/os-release") or "").splitlines()
    named = dict(line.split("=", 1) for line in lines if "=" in line)
    release = {key: " ".join(shlex.split(value, posix=True)) for key, value in named.items() if value.count('"') != 1}
    return {
        "os": release.get("PRETTY_NAME"),
        "os_id": release.get("ID"),
        "os_version": release.get("VERSION_ID"),
        "image": (answer.text("/etc/rpi-issue") or "").partition("\n")[0] or None,
        "l4t": l4t_of(answer.text("/etc/nv_tegra_release") or ""),
    }


def l4t_of(text: str) -> str | None:
    """From "# R36 (release), REVISION: 4.3, GCID: …" to "36.4.3"."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


def cores_of(online: str) -> int | None:
    """From "0-3,5" to 5."""
    ranges = [part.partition("-") for part in online.split(",") if part.strip()]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges) or None


def _login(text: str) -> dict[str, Any]:
    """From what `id` prints: uid=1000(ada) gid=1000(ada) groups=1000(ada),44(video)."""
    user = re.match(r"uid=(\d+)(?:\(([^)]*)\))?", text)
    groups = re.search(r"groups=(\S+)", text)
    return {
        "user": user[2] if user else None,
        "uid": int(user[1]) if user else None,
        "groups": re.findall(r"\(([^)]*)\)", groups[1]) if groups else [],
    }


def _memory(meminfo: str) -> int | None:
    found = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _lock(values: dict[str, str]) -> Any:
    """Who holds the device; None when nobody does, `run` is None in a lock that cannot be read."""
    if "lock" not in values:
        return None
    try:
        found = json.loads(values["lock"])
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"run": None}


class Identity:
    """Whether the board behind the address is the one that the inventory names: before anything is changed there."""

    name = "identity"

    def check(self, facts: Facts, device: Device) -> Problem | Note | None:
        board, profile = facts["board"], device.profile
        differs = _other_board(board, profile) or _other_memory(board, profile)
        if differs is not None:
            return Problem(self.name, f"{_who(board)} answers at {_address(device)}, but {differs}; {_WAY_OUT}", True)
        if board["bits"] == 32:
            return Problem(
                self.name, f"{_who(board)} runs a 32-bit system; install the 64-bit image of its maker", True
            )
        told = [text for differs in (_other_machine, _other_release, _other_python) if (text := differs(facts, device))]
        return Note(self.name, "; ".join(told)) if told else None


_WAY_OUT = "nothing was changed there: correct host or profile in the inventory"


def _other_board(board: dict[str, Any], profile: HardwareProfile) -> str | None:
    if not profile.compatible:
        if board["compatible"] or board["machine"] in {None, profile.architecture}:
            return None
        return f"profile {profile.name} has a processor of kind {profile.architecture}, this is {board['machine']}"
    if any(word in entry for word in profile.compatible for entry in board["compatible"]):
        return None
    got = ", ".join(board["compatible"]) or "no device tree"
    return f"profile {profile.name} is {' or '.join(profile.compatible)} in the device tree, this has {got}"


def _other_memory(board: dict[str, Any], profile: HardwareProfile) -> str | None:
    found = board["memory_bytes"]
    if found is None or _LEAST_SHARE * profile.usable_memory_bytes <= found <= profile.memory_bytes:
        return None
    expected = f"{format_bytes(profile.usable_memory_bytes)} usable of {format_bytes(profile.memory_bytes)}"
    return f"profile {profile.name} has {expected}, this has {format_bytes(found)}"


def _other_machine(facts: Facts, device: Device) -> str | None:
    found, expected = facts["board"]["machine"], device.profile.architecture
    if found == expected:
        return None
    return f"its processor is {found}, not {expected}: what is measured is not that board"


def _other_release(facts: Facts, device: Device) -> str | None:
    """On another release than the profile's, cgroups, power modes and sensors may be other ones."""
    profile, major = device.profile, l4t_major(facts)
    if major is None or not profile.l4t or major in profile.l4t:
        return None
    expected = ", ".join(map(str, profile.l4t))
    return f"it runs L4T {facts['board']['l4t']}, and what profile {profile.name} says was written for L4T {expected}"


def _other_python(facts: Facts, device: Device) -> str | None:
    """The system's, where it is another than the profile's and the board's torch has no wheels for it."""
    there = (facts.get("python") or {}).get("candidates")
    if not there or device.python is not None:
        return None
    try:
        build = torch_build(device, facts)
    except NoTorchError:  # which is told where the environment is made
        return None
    found, expected = there[0]["version"], device.profile.python
    version = ".".join(found.split(".")[:2])
    if version == expected or version in build.pythons:
        return None
    fits = ", ".join(build.pythons)
    return f"its Python is {found}, profile {device.profile.name} has {expected}, and {build.text} is for {fits}"


def _who(board: dict[str, Any]) -> str:
    return board["model"] or f"a machine of kind {board['machine']} without a device tree"


def _address(device: Device) -> str:
    return device.access.host if device.access is not None else "this machine"


class Capacity:
    """For a device that emulates another: whether the host has the memory that the budget promises."""

    name = "capacity"

    def check(self, facts: Facts, device: Device) -> Problem | None:
        found = facts["board"]["memory_bytes"]
        if found is None or found >= device.budget.memory_bytes:
            return None
        text = f"the host has {format_bytes(found)}, the budget is {format_bytes(device.budget.memory_bytes)}"
        return Problem(self.name, f"{text}; name a larger host or lower budget.memory", fatal=True)


class Desktop:
    """A graphical session takes memory that a run could use; whether it may go is for a person to say."""

    name = "desktop"

    def check(self, facts: Facts, device: Device) -> Note | None:
        if not facts["board"]["desktop"]:
            return None
        text = "a graphical desktop is running and takes memory (0.8 GB on a Jetson); to do without it: "
        return Note(self.name, f"{text}sudo systemctl set-default multi-user.target && sudo reboot")
