"""How the controller reaches a device: run a command, put and get files, start an agent, open a channel to it.

Here: the controller's own machine.  Another way (SSH) is another class with the same few verbs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from testbed.errors import DeviceError, RightError


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    exit_code: int
    output: str
    errors: str


class Connection(Protocol):
    """The verbs that devices are driven with; paths are the device's own, and "~/" is the login user's home there."""

    name: str  # of the device, for messages

    @property
    def alive(self) -> bool:
        """Whether it still stands, as far as is known; one that has broken never comes back."""

    def run(
        self, command: Sequence[str], patience_seconds: float = 60.0, *, data: bytes = b"", become: bool = False
    ) -> str:
        """Run a command with `data` as its input, give its output.

        Raises DeviceError when it fails, takes longer (it is then ended, there too) or the device is out of reach;
        RightError when `become` (root by sudo) is refused.
        """

    def attempt(
        self, command: Sequence[str], patience_seconds: float = 60.0, *, data: bytes = b"", become: bool = False
    ) -> Ran:
        """The same for a command that may fail: its exit code is an answer."""

    def missing(self, paths: Iterable[Path]) -> list[Path]:
        """Those of the files that are not there, in one round trip."""

    def put(self, source: Path, target: Path) -> int:
        """Copy a file of the controller to the device; it appears there whole and verified, or not at all.

        A transfer that broke off goes on where it stopped.  Gives the bytes that travelled.
        """

    def get(self, source: Path, target: Path) -> None:
        """Copy a file of the device to the controller, whole or not at all."""

    def open_channel(self, command: Sequence[str]) -> socket.socket:
        """Start a command there; what is sent goes to its input, what it writes comes back, and no more than that."""

    def close(self) -> None:
        """Hang up."""


class LocalConnection:
    """The controller's own machine."""

    def __init__(self, name: str = "this machine") -> None:
        self.name = name
        self._channels: list[subprocess.Popen[bytes]] = []

    @property
    def alive(self) -> bool:
        return True

    def run(
        self, command: Sequence[str], patience_seconds: float = 60.0, *, data: bytes = b"", become: bool = False
    ) -> str:
        ran = self.attempt(command, patience_seconds, data=data, become=become)
        if ran.exit_code:
            raise DeviceError(f"{self.name}: {shlex.join(command)}: exit code {ran.exit_code}: {ran.errors.strip()}")
        return ran.output

    def attempt(
        self, command: Sequence[str], patience_seconds: float = 60.0, *, data: bytes = b"", become: bool = False
    ) -> Ran:
        argv = _expanded(command)
        if become and os.geteuid() != 0:
            self._may_become(argv)
            argv = ["sudo", "-n", "--", *argv]
        try:
            done = subprocess.run(argv, input=data, capture_output=True, timeout=patience_seconds, check=False)
        except subprocess.TimeoutExpired:
            told = f"{self.name}: {shlex.join(command)}: no end after {patience_seconds:.0f} s"
            raise DeviceError(told) from None
        except OSError as error:
            return Ran(127, "", f"{argv[0]}: {error.strerror}")
        return Ran(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    def missing(self, paths: Iterable[Path]) -> list[Path]:
        return [path for path in paths if not path.expanduser().exists()]

    def put(self, source: Path, target: Path) -> int:
        target = target.expanduser()
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial)
            partial.replace(target)
        except OSError as error:
            raise DeviceError(f"{self.name}: {error.filename} cannot be copied: {error.strerror}") from None
        finally:
            partial.unlink(missing_ok=True)
        return target.stat().st_size

    def get(self, source: Path, target: Path) -> None:
        self.put(source.expanduser(), target)

    def open_channel(self, command: Sequence[str]) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._channels.append(
                    subprocess.Popen(_expanded(command), stdin=theirs.fileno(), stdout=theirs.fileno())
                )
            except OSError as error:
                ours.close()
                raise DeviceError(f"{self.name}: {command[0]} cannot be started: {error.strerror}") from None
        return ours

    def close(self) -> None:
        while self._channels:
            process = self._channels.pop()
            process.kill()
            process.wait()

    def _may_become(self, argv: Sequence[str]) -> None:
        sudo = shutil.which("sudo")
        if sudo is None or subprocess.run([sudo, "-n", "true"], capture_output=True, check=False).returncode:
            raise RightError(
                f"{self.name}: {shlex.join(argv)} needs root, and sudo asks for a password here; allow it without "
                f"one, or run it by hand"
            )


def _expanded(command: Sequence[str]) -> list[str]:
    """As a device does it: "~/" at the beginning of an argument is the user's home."""
    return [os.path.expanduser(word) if word.startswith("~/") else word for word in command]  # noqa: PTH111 -- words
