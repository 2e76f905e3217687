"""The command that starts a virtual machine, and what this machine must have for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.device_images.debian import native_architecture
from testbed.device_images.emulator import EMULATORS
from testbed.errors import UsageError
from testbed.lab.machines.qmp import SOCKET
from testbed.lab.machines.spec import LOOPBACK, MachineFolder
from testbed.lab.spec import lab_id
from testbed.programs import lacking

if TYPE_CHECKING:
    from testbed.lab.machines.spec import MachineLabSpec, MachineSpec

#: The first moment of a machine's clock: a Raspberry Pi without a battery starts as wrong, until chrony steps it.
CLOCK_START = "2025-01-01T00:00:00"
_TOOLS = {"qemu-img": "qemu-utils", "mformat": "mtools", "mke2fs": "e2fsprogs", "ssh": "openssh-client"}


def check_machine(architecture: str) -> None:
    """Raises UsageError with every program that lacks here."""
    if architecture not in EMULATORS:
        raise UsageError(f"--architecture: expected one of {', '.join(EMULATORS)}, got {architecture!r}")
    tools = {**_TOOLS, EMULATORS[architecture].program: EMULATORS[architecture].package}
    if missing := lacking(tools):
        raise UsageError(f"virtual machines need what is not on this machine: {', '.join(missing)}; install it")


def can_accelerate(architecture: str) -> bool:
    """Whether KVM runs such a machine here.

    /dev/kvm alone tells nothing: a cloud's own variant of it may be there with which a guest's kernel never comes up.
    """
    if architecture != native_architecture() or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    return architecture == "arm64" or any(Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd"))


def command(lab: MachineLabSpec, host: MachineSpec, folder: MachineFolder) -> list[str]:
    """Start it in the folder `folder.path`: paths there are relative, so that a socket's is short."""
    machine, image = EMULATORS[lab.architecture], lab.debian_image
    disks = [folder.disk, folder.seed, *([folder.environment] if lab.environment else [])]
    drives = [
        word
        for disk in disks
        for word in ("-drive", f"file={disk.name},if=virtio,format={'raw' if disk == folder.seed else 'qcow2'}")
    ]
    forward = f"hostfwd=tcp:{LOOPBACK}:{host.ssh_port}-:22"
    return [
        *(
            machine.program,
            "-name",
            process_name(folder.lab, host.name),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ),
        *("-machine", machine.board, "-cpu", "max" if lab.accelerated else machine.processor),
        *("-accel", "kvm" if lab.accelerated else "tcg"),
        *("-smp", str(lab.cores), "-m", str(host.memory_bytes >> 20)),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
        *("-append", machine.kernel_words),
        *drives,
        *("-netdev", f"user,id=net0,{forward}", "-device", f"virtio-net-pci,netdev=net0,id=nic0,mac={_mac(host)}"),
        *("-device", "virtio-rng-pci", "-rtc", f"base={CLOCK_START}"),
        *("-serial", f"file:{folder.console.name}", "-qmp", f"unix:{SOCKET},server=on,wait=off"),
        *("-pidfile", folder.pid.name, "-daemonize"),
    ]


def process_name(lab: Path, host: str = "") -> str:
    """What tells a machine's process from others: its lab, and the host."""
    return f"testbed-{lab_id(lab)}-{host}"


def _mac(host: MachineSpec) -> str:
    """A locally administered address; the same after a reboot, as a board's is."""
    return f"52:54:00:7b:00:{host.number:02x}"
