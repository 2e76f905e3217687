"""Bring a lab of virtual machines up, find it again, take it down.

with MachineLab.up(folder, MachineWish(devices=1)) as lab:
    lab.inventory             # works at once with --inventory
    lab.host("board-1").reboot()
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from testbed.byte_text import format_bytes
from testbed.device_images import debian
from testbed.device_images.debian import DebianImage
from testbed.errors import LabError, UsageError
from testbed.lab.access import give_to_user
from testbed.lab.base import LabBase
from testbed.lab.folder import claim, expect_free, has_lab, remove_files
from testbed.lab.link import LinkShape
from testbed.lab.machines import clock
from testbed.lab.machines.host import VirtualMachineHost
from testbed.lab.machines.preparation import PROFILE, prepare
from testbed.lab.machines.qemu import can_accelerate, check_machine, process_name
from testbed.lab.machines.spec import LOOPBACK, MARK, MachineLabSpec, MachineSpec
from testbed.provision.step import Say

DEFAULT_ARCHITECTURE = "arm64"
DEFAULT_MEMORY_BYTES = 2 << 30
SMALLEST_MEMORY_BYTES = 512 << 20
_CORES = 2
_END_SECONDS = 10.0


@dataclass(frozen=True)
class MachineWish:
    """What a user wants of a lab of virtual machines."""

    devices: int = 1
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    architecture: str = DEFAULT_ARCHITECTURE
    environment: bool = True  # a second disk with Python packages
    shape: LinkShape = field(default_factory=LinkShape)


class MachineLab(LabBase[VirtualMachineHost]):
    """A lab of virtual machines that is there."""

    def __init__(self, folder: Path, spec: MachineLabSpec) -> None:
        super().__init__(folder, [VirtualMachineHost(folder, spec, host) for host in spec.hosts])
        self.spec = spec

    @classmethod
    def up(cls, folder: Path, wish: MachineWish | None = None, say: Say = lambda _: None) -> Self:
        """Make a lab and wait until every board is as its files want it; raises LabError, and nothing is left then."""
        folder, wish = folder.absolute(), wish or MachineWish()
        _check(wish)
        expect_free(folder)
        check_machine(wish.architecture)
        claim(folder, MARK)
        try:
            image = debian.build(wish.architecture, say)
            lab = cls(folder, _spec(wish, image))
            lab._build(wish.shape, say)
        except BaseException:
            with contextlib.suppress(LabError):  # what failed first is what is told
                take_down(folder)
            raise
        return lab

    def down(self) -> None:
        take_down(self.folder)

    def facts(self) -> dict[str, Any]:
        """What else is to be known of it, for `testbed lab status --json`."""
        spec = self.spec
        return {"architecture": spec.architecture, "accelerated": spec.accelerated, "environment": spec.environment}

    def how(self) -> str:
        """How it is made, in a sentence."""
        by = (
            "KVM"
            if self.spec.accelerated
            else "emulation of every instruction: slow, and no measure of a board's speed"
        )
        return (
            f"Virtual machines ({self.spec.architecture}) by {by}. Links are shaped by each machine's own netem. "
            "Memory: what QEMU takes of this machine's, not what the board uses."
        )

    def _build(self, shape: LinkShape, say: Say) -> None:
        prepare(self.folder, self.spec, say)
        give_to_user(self.folder)
        for host in self.hosts:
            host.start()
        for host in self.hosts:
            say(f"{host.name}: booting, its console is in {host.folder.console}")
            host.wait_configured()
            if shape != LinkShape():
                host.shape(shape)


def _check(wish: MachineWish) -> None:
    if wish.memory_bytes < SMALLEST_MEMORY_BYTES:
        least = SMALLEST_MEMORY_BYTES >> 20
        got = format_bytes(wish.memory_bytes)
        raise UsageError(f"--memory: expected at least {least} MiB for a virtual machine, got {got}")
    total, here = wish.devices * wish.memory_bytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total > here:
        raise UsageError(
            f"--memory, --devices: the virtual machines would have {format_bytes(total)} together, and this machine "
            f"has {format_bytes(here)}"
        )


def _spec(wish: MachineWish, image: DebianImage) -> MachineLabSpec:
    *ports, time_port = _free_ports(wish.devices + 1)
    profile = PROFILE.format(wish.architecture)
    hosts = tuple(
        MachineSpec(f"board-{number}", number, f"{LOOPBACK}:{port}", wish.memory_bytes, profile)
        for number, port in enumerate(ports, 1)
    )
    return MachineLabSpec(
        hosts=hosts,
        architecture=wish.architecture,
        image=str(image.folder),
        cores=min(_CORES, os.cpu_count() or 1),
        accelerated=can_accelerate(wish.architecture),
        time_port=time_port,
        environment=wish.environment,
    )


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody has now."""
    with contextlib.ExitStack() as held:
        channels = [held.enter_context(socket.socket()) for _ in range(count)]
        for channel in channels:
            channel.bind((LOOPBACK, 0))
        return [int(channel.getsockname()[1]) for channel in channels]


# ── taking it down ───────────────────────────────────────────────────────────────────────────────────────────────────
def take_down(folder: Path) -> None:
    """Remove all of a lab that is left: processes and files.  Raises LabError when there was nothing.

    Files go only with their mark (`testbed.lab.folder`); machines are known by the folder's name.
    """
    folder = folder.absolute()
    if not has_lab(folder) and not machines_of(folder):
        raise LabError(f"there is no lab in {folder}")
    _end_processes(folder)
    remove_files(folder)


def machines_of(folder: Path) -> list[int]:
    """The processes of a lab's machines by their command lines, when its files no longer tell."""
    wanted = process_name(folder.absolute())
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if words[0].startswith("qemu-system-") and any(word.startswith(wanted) for word in words[1:3]):
                found.append(int(path.name))
    return found


def _end_processes(folder: Path) -> None:
    clock.end(folder)
    deadline = time.monotonic() + _END_SECONDS
    while machines := machines_of(folder):
        try:
            for pid in machines:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # look again
        except PermissionError:
            raise LabError(f"the lab in {folder} belongs to another user (sudo)") from None
        if time.monotonic() > deadline:
            raise LabError(f"of the lab in {folder} the processes {', '.join(map(str, machines))} do not end")
        time.sleep(0.005)  # they are nobody's children: there is nothing to wait for
