"""Swap and zram off: memory that is pushed out is missing from every figure, and zram takes it from the same RAM.

Each source of swap is switched off in its own way, so that it stays off; `swapoff -a` does it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from testbed.byte_text import format_bytes
from testbed.provision import boot_script
from testbed.provision.part import Answer, Part
from testbed.provision.step import Change, Command, Facts

if TYPE_CHECKING:
    from testbed.inventory import Device

#: Unit by the name of what makes swap: JetPack, Raspberry Pi OS up to bookworm, Debian's and Ubuntu's zram.
_UNITS = {
    "nvzramconfig": "nvzramconfig.service",
    "dphys-swapfile": "dphys-swapfile.service",
    "zramswap": "zramswap.service",
    "zram-config": "zram-config.service",
}
#: What each makes, as /proc/swaps names it; the rest of the swap is somebody else's (a line of fstab, say).
_MAKES = {
    "nvzramconfig": ("/dev/zram",),
    "dphys-swapfile": ("/var/swap",),
    "zramswap": ("/dev/zram",),
    "zram-config": ("/dev/zram",),
    "rpi-swap": ("/dev/zram", "/var/swap"),
}
#: Raspberry Pi OS from trixie on: a generator, which reads these at boot, the last word counts.
_RPI_SWAP_CONF = "/etc/rpi/swap.conf"
_RPI_SWAP_FILE = "/etc/rpi/swap.conf.d/90-edge-testbed.conf"
_RPI_SWAP = "[Main]\nMechanism=none\n"
_SCRIPT = f"""\
[ -d /run/systemd/system ] && quick systemctl show -p Id,UnitFileState {" ".join(_UNITS.values())}
[ -e {_RPI_SWAP_CONF} ] && echo rpi_swap=yes
true
"""


def _parse(answer: Answer) -> dict[str, Any]:
    devices = _devices(answer.text("/proc/swaps") or "")
    enabled = _enabled_units(answer.output)
    sources = [name for name, unit in _UNITS.items() if unit in enabled]
    if "rpi_swap" in answer.values and _mechanism(answer.files) != "none":
        sources.append("rpi-swap")
    return {"swap": {"devices": devices, "bytes": sum(each["bytes"] for each in devices), "sources": sources}}


PART = Part("swap", _parse, files=("/proc/swaps", _RPI_SWAP_CONF, "/etc/rpi/swap.conf.d/*.conf"), script=_SCRIPT)


def _enabled_units(shown: str) -> set[str]:
    """From `systemctl show`, which tells Id and then UnitFileState of each."""
    enabled, unit = set(), ""
    for key, _, value in (line.partition("=") for line in shown.splitlines()):
        unit = value if key == "Id" else unit
        if key == "UnitFileState" and value == "enabled":
            enabled.add(unit)
    return enabled


def _mechanism(files: Mapping[str, str]) -> str:
    """The `Mechanism` of [Main] that counts: swap.conf first, then the drop-ins by name."""
    section, mechanism = "", "auto"
    paths = sorted(
        (path for path in files if path.startswith("/etc/rpi/")), key=lambda path: (path != _RPI_SWAP_CONF, path)
    )
    for line in "\n".join(files[path] for path in paths).splitlines():
        section = line.strip() if line.startswith("[") else section
        if section == "[Main]" and line.startswith("Mechanism="):
            mechanism = line.partition("=")[2].strip()
    return mechanism


def _devices(table: str) -> list[dict[str, Any]]:
    """From /proc/swaps, whose sizes are in KiB."""
    rows = [line.split() for line in table.splitlines()[1:]]
    return [{"name": row[0], "bytes": int(row[2]) * 1024} for row in rows if len(row) >= 5]


class SwapOff:
    """No swap, neither now nor after the next boot."""

    name = "swap"

    def check(self, facts: Facts, device: Device) -> Change | None:
        swap = facts["swap"]
        sources = swap["sources"]
        if not swap["devices"] and not sources:
            return None
        commands = [command for source in sources for command in _switch_off(source)]
        if swap["devices"]:
            commands += [_SWAPOFF] if _explained(swap) else _off_at_every_boot(facts)
        return Change(self.name, _text(swap, sources), "no swap", tuple(commands))


_SWAPOFF = Command(("swapoff", "-a"), become=True, patience_seconds=120)  # what was swapped out is read back


def _explained(swap: dict[str, Any]) -> bool:
    """Whether all swap comes from what will be switched off."""
    made = tuple(name for source in swap["sources"] for name in _MAKES[source])
    return all(each["name"].startswith(made) for each in swap["devices"])


def _switch_off(source: str) -> list[Command]:
    if source == "rpi-swap":
        return [boot_script.write_file(_RPI_SWAP_FILE, _RPI_SWAP)]
    return [Command(("systemctl", "disable", "--now", _UNITS[source]), become=True)]


def _off_at_every_boot(facts: Facts) -> list[Command]:
    """Swap of an unknown source (a line of fstab, say) is left as it is configured, and ended after every boot."""
    return list(boot_script.install(facts, "swap", "swapoff -a\n"))


def _text(swap: dict[str, Any], sources: list[str]) -> str:
    devices = ", ".join(f"{each['name']} ({format_bytes(each['bytes'])})" for each in swap["devices"])
    return devices + (" by " if devices else "none now, but ") * bool(sources) + ", ".join(sources)
