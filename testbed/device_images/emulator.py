"""QEMU's words for a virtual board, by Debian's name of its architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Emulator:
    """What QEMU is called, and what it is told, for one architecture."""

    program: str
    package: str
    board: str
    processor: str  # where it is emulated; with KVM it is this machine's
    console: str

    @property
    def kernel_words(self) -> str:
        """The kernel's command line: the first disk is the root, without partitions; the console is a serial line."""
        return f"root=/dev/vda rw console={self.console} panic=10 systemd.condition_needs_update=0"


EMULATORS = {
    "arm64": Emulator("qemu-system-aarch64", "qemu-system-arm", "virt", "cortex-a76", "ttyAMA0"),  # Raspberry Pi 5's
    "amd64": Emulator("qemu-system-x86_64", "qemu-system-x86", "q35", "max", "ttyS0"),
}
