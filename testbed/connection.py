"""How the controller reaches a device: run a command, put and get files, start an agent, open a channel to it.

Here: the controller's own machine.  Another way (SSH) is another class with the same few verbs.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from testbed.errors import DeviceError


class Starting(Protocol):
    """A command that was started detached."""

    def first_line(self, patience_seconds: float) -> str:
        """What it says when it is ready ("" when it ended without a word); raises DeviceError when that takes long."""

    def wait(self, patience_seconds: float) -> bool:
        """Whether it has ended within that time."""

    def close(self) -> None:
        """Let go of it; it may live on."""


class Connection(Protocol):
    """The verbs that devices are driven with; paths are the device's own."""

    def run(self, command: Sequence[str], patience_seconds: float = 60.0) -> str:
        """Run a command and give its output; raises DeviceError when it fails or takes longer."""

    def start(self, command: Sequence[str], log: Path) -> Starting:
        """Start a command that outlives the connection; what it writes to stderr goes to `log`."""

    def missing(self, paths: Iterable[Path]) -> list[Path]:
        """Those of the files that are not there, in one round trip."""

    def put(self, source: Path, target: Path) -> None:
        """Copy a file of the controller to the device; it appears there whole, or not at all."""

    def get(self, source: Path, target: Path) -> None:
        """Copy a file of the device to the controller."""

    def open_channel(self, folder: Path, name: str) -> socket.socket:
        """Connect to a Unix socket on the device; raises OSError when nobody listens."""


class LocalConnection:
    """The controller's own machine."""

    def run(self, command: Sequence[str], patience_seconds: float = 60.0) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=patience_seconds, check=True)
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{' '.join(command)}: no end after {patience_seconds:.0f} s") from None
        except subprocess.CalledProcessError as error:
            raise DeviceError(f"{' '.join(command)}: exit code {error.returncode}: {error.stderr.strip()}") from None
        except OSError as error:
            raise DeviceError(f"{' '.join(command)}: {error.strerror}") from None
        return done.stdout

    def start(self, command: Sequence[str], log: Path) -> LocalStarting:
        try:
            with log.open("ab") as errors:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,  # Ctrl-C is for the controller; it tells the others
                )
        except OSError as error:
            raise DeviceError(f"{command[0]} cannot be started: {error.strerror}") from None
        return LocalStarting(process)

    def missing(self, paths: Iterable[Path]) -> list[Path]:
        return [path for path in paths if not path.exists()]

    def put(self, source: Path, target: Path) -> None:
        """A hard link where that is possible: content is never changed in place."""
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            try:
                os.link(source, partial)
            except OSError:  # another file system
                shutil.copyfile(source, partial)
            partial.replace(target)
        except OSError as error:
            raise DeviceError(f"{target} cannot be written: {error.strerror}") from None
        finally:
            partial.unlink(missing_ok=True)

    def get(self, source: Path, target: Path) -> None:
        self.put(source, target)

    def open_channel(self, folder: Path, name: str) -> socket.socket:
        """Through /proc, because the path of a Unix socket may have 107 bytes only."""
        here = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        channel = socket.socket(socket.AF_UNIX)
        try:
            channel.connect(f"/proc/self/fd/{here}/{name}")
        except OSError:
            channel.close()
            raise
        finally:
            os.close(here)
        return channel


class LocalStarting:
    """A process of ours in a session of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def first_line(self, patience_seconds: float) -> str:
        line, deadline = b"", time.monotonic() + patience_seconds
        out = self._process.stdout
        if out is None:
            return ""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise DeviceError(f"process {self._process.pid} has said nothing for {patience_seconds:.0f} s")
            piece = os.read(out.fileno(), 1 << 16)
            if not piece:
                break
            line += piece
        return line.decode(errors="replace")

    def wait(self, patience_seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_seconds)
        return self._process.returncode is not None

    def close(self) -> None:
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.poll()
