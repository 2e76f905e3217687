"""What a host sees: its root, /proc, /sys, /dev, /run and /tmp, mounted in its own mount namespace.

The root is an overlay: this machine's root below, the host's own files above.  /sys is an overlay too: the kernel's
below, the persona's above, so that what is written to it is kept there and never reaches this machine.  Files of
/proc that would tell of this machine (memory, swap, boot id) or that a persona has are bind-mounted over the kernel's;
a file that procfs lacks cannot be added to it, which is why /proc/device-tree is missing off Arm.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.lab import kernel
from testbed.lab.meminfo import meminfo

if TYPE_CHECKING:
    from testbed.lab.spec import HostFolder, HostSpec, LabSpec

OPAQUE = "trusted.overlay.opaque"
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
#: This machine's sensors, buses and device tree: a host has its persona's, or none.
_HIDDEN_IN_SYS = (
    "bus/i2c/devices", "class/devfreq", "class/hwmon", "class/power_supply", "class/powercap", "class/thermal",
    "firmware/devicetree",
)  # fmt: skip
_NO_SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
#: Written to, these would change this whole machine.
_READ_ONLY_IN_PROC = ("sys", "sysrq-trigger", "irq", "bus")


def prepare_boot(folder: HostFolder, host: HostSpec) -> None:
    """Make what is new at every boot: an empty /tmp, and what lies over /proc and /sys, as the persona has it."""
    shutil.rmtree(folder.boot, ignore_errors=True)
    for tree in ("proc", "sys"):
        source = folder.persona / tree
        if source.is_dir():
            shutil.copytree(source, folder.boot / tree, symlinks=True)
    for name in ("tmp", "sys", "sys.work"):
        (folder.boot / name).mkdir(parents=True, exist_ok=True)
    (folder.boot / "tmp").chmod(0o1777)
    for path in _HIDDEN_IN_SYS:
        make_opaque(folder.boot / "sys" / path)
    _prepare_proc(folder.boot / "proc", host.memory_bytes)


def make_opaque(folder: Path) -> None:
    """Let a folder above hide the one below it, in an overlay."""
    folder.mkdir(parents=True, exist_ok=True)
    os.setxattr(folder, OPAQUE, b"y")


def meminfo_file(folder: HostFolder) -> Path:
    return folder.boot / "proc" / "meminfo"


def assemble(folder: HostFolder, lab: LabSpec) -> None:
    """Mount the host's view and make it the root of this mount namespace; raises OSError."""
    kernel.mount("", Path("/"), flags=kernel.RECURSIVE | kernel.PRIVATE)
    root = folder.root
    _overlay(Path("/"), folder.upper, folder.work, root)
    _mount_proc(root / "proc", folder.boot / "proc")
    kernel.mount("sysfs", root / "sys", "sysfs")
    _overlay(root / "sys", folder.boot / "sys", folder.boot / "sys.work", root / "sys")
    _tmpfs(root / "sys/fs/cgroup")
    _mount_dev(root / "dev")
    _tmpfs(root / "run")
    kernel.bind(folder.boot / "tmp", root / "tmp")
    for path in lab.exposed:
        (root / path[1:]).mkdir(parents=True, exist_ok=True)
        kernel.bind(Path(path).resolve(), root / path[1:], read_only=True)
    kernel.make_root(root)
    for path in ("/run/sshd", "/run/lock"):
        Path(path).mkdir()


def mount_memory_cgroup(target: Path, kind: str, options: str) -> None:
    """The host's own group becomes the root of the hierarchy that it sees, because of its cgroup namespace."""
    target.mkdir(exist_ok=True)
    kernel.mount("cgroup", target, kind, options=options)


def _prepare_proc(proc: Path, memory_bytes: int) -> None:
    boot_id = proc / "sys/kernel/random/boot_id"
    boot_id.parent.mkdir(parents=True)
    boot_id.write_text(f"{uuid.uuid4()}\n", encoding="ascii")
    swaps, memory = proc / "swaps", proc / "meminfo"
    if not swaps.exists():
        swaps.write_text(_NO_SWAPS, encoding="ascii")
    below = memory.read_text(encoding="ascii") if memory.exists() else ""
    memory.write_text(meminfo(memory_bytes, below), encoding="ascii")


def _mount_proc(target: Path, over: Path) -> None:
    kernel.mount("proc", target, "proc", kernel.NO_SUID | kernel.NO_DEVICES | kernel.NO_PROGRAMS)
    for name in _READ_ONLY_IN_PROC:
        if (target / name).exists():
            kernel.bind(target / name, target / name, read_only=True)
    kernel.bind(target / "sys/net", target / "sys/net")  # of the host's own network namespace
    kernel.mount("", target / "sys/net", flags=kernel.BIND | kernel.REMOUNT)
    for folder, _, files in os.walk(over):
        for name in files:
            source = Path(folder, name)
            place = target / source.relative_to(over)
            if place.exists():
                kernel.bind(source, place)


def _mount_dev(target: Path) -> None:
    _tmpfs(target)
    for name in _DEVICES:
        (target / name).touch()
        kernel.bind(Path("/dev", name), target / name)
    for name in ("pts", "shm"):
        (target / name).mkdir()
    kernel.mount("devpts", target / "pts", "devpts", options="newinstance,ptmxmode=0666,mode=620,gid=5")
    _tmpfs(target / "shm", mode="1777")
    links = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
    for name, link in links.items():
        (target / name).symlink_to(link)


def _tmpfs(target: Path, mode: str = "755") -> None:
    kernel.mount("tmpfs", target, "tmpfs", kernel.NO_SUID, options=f"mode={mode}")


def _overlay(lower: Path, upper: Path, work: Path, target: Path) -> None:
    kernel.mount("overlay", target, "overlay", options=f"lowerdir={lower},upperdir={upper},workdir={work}")
