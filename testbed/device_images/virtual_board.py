"""The image of a virtual board: the Debian one, with the board's files where cloud-init looks for them on a disk."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from testbed.device_images import debian
from testbed.device_images.base import Progress, refuse_base
from testbed.device_images.build import Order
from testbed.device_images.debian import DebianImage
from testbed.device_images.emulator import EMULATORS
from testbed.errors import UsageError
from testbed.programs import find, lacking, run

_TOOLS = {"debugfs": "e2fsprogs", "qemu-img": "qemu-utils"}
_SEED = "seed"
#: Of the machine that is started by hand; README.txt names the port too.
_CORES, _MEMORY = 2, "2G"
_SSH_HOST, _SSH_PORT = "127.0.0.1", 2222
_ON_DISK = "/var/lib/cloud/seed/nocloud"


def build(order: Order, part: Path, tell: Progress) -> tuple[str, ...]:
    """A disk in qcow2 that boots as this very board; QEMU is given the kernel beside it, there is no boot loader."""
    refuse_base(order.image, order.base, order.checksums)
    if missing := lacking(_TOOLS):
        raise UsageError(f"the disk cannot be written here: there is no {', no '.join(missing)}")
    image = debian.build(debian.ARCHITECTURES[order.architecture], lambda text: tell(text, 0, 0))
    raw = part.with_name(f"{part.name}.raw")
    try:
        raw.touch(mode=0o600)
        tell("writing the board's files", 0, 0)
        run(["qemu-img", "convert", "-O", "raw", str(image.disk), str(raw)])
        _seed(raw, order.folder / _SEED)
        run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(part)])
    finally:
        raw.unlink(missing_ok=True)
    return (
        f"{order.output}: {order.image.title}, {image.architecture}",
        "QEMU boots it with (ended by Ctrl-A X; where there is KVM, `-accel kvm -cpu max` is faster):",
        f"  {_start(image, order.output)}",
        f"its SSH server then answers at {_SSH_HOST}, port {_SSH_PORT}",
    )


def _start(image: DebianImage, disk: Path) -> str:
    """The whole command: processor, memory, console, kernel, disk, and a network with its SSH port on this machine."""
    emulator = EMULATORS[image.architecture]
    return shlex.join((
        *(emulator.program, "-machine", emulator.board, "-accel", "tcg", "-cpu", emulator.processor),
        *("-smp", str(_CORES), "-m", _MEMORY, "-nographic"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", emulator.kernel_words),
        *("-drive", f"file={str(disk).replace(',', ',,')},if=virtio,format=qcow2"),
        *("-netdev", f"user,id=net0,hostfwd=tcp:{_SSH_HOST}:{_SSH_PORT}-:22", "-device", "virtio-net-pci,netdev=net0"),
        *("-device", "virtio-rng-pci"),
    ))  # fmt: skip


def _seed(disk: Path, files: Path) -> None:
    """Without mounting: debugfs writes into the file system, and says on stderr what it could not do."""
    names = sorted(path.name for path in files.iterdir())
    folders = [*reversed(Path(_ON_DISK).parents), Path(_ON_DISK)]
    lines = [*(f"mkdir {folder}" for folder in folders[3:]), f"cd {_ON_DISK}"]  # /var/lib is there
    for name in names:
        lines += [f"write {name} {name}", *(f"sif {name} {what}" for what in ("mode 0100600", "uid 0", "gid 0"))]
    command = [find("debugfs") or "debugfs", "-w", "-f", "-", str(disk.absolute())]
    done = subprocess.run(
        command, input="\n".join(lines) + "\n", capture_output=True, text=True, cwd=files, check=False
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("debugfs ")]
    problems = [line for line in said if "exists" not in line]  # a folder that is there already
    if done.returncode or problems:
        raise UsageError(f"the board's files cannot be written into the disk: {'; '.join(problems) or done.returncode}")
