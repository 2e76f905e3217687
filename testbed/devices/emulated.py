"""A device emulated on the controller's own machine: a trainer in a memory cgroup of the budget's size.

    devices:
      small-board:
        kind: emulated
        profile: raspberry_pi_4b_2gb
        budget: {memory: "440 MiB"}

Tried on: Debian 12, x86-64, cgroup v1 as root.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import testbed
from testbed import errors
from testbed.connection import LocalConnection, Starting
from testbed.errors import DeviceError, TestbedError
from testbed.node import limits
from testbed.node.agent import clean_up_after
from testbed.node.spool import LOCK_FILE, SETTINGS_FILE, SOCKET_FILE, STATE_FILE

if TYPE_CHECKING:
    import socket

    from testbed.devices import NodeSettings
    from testbed.inventory import Device

#: Starts the agent without `site`: nothing but the standard library and this package is looked at.
_BOOTSTRAP = (
    "import sys; sys.path.insert(0, {code!r}); from testbed.node.agent import main; sys.exit(main(sys.argv[1:]))"
)
_START_SECONDS = 30.0


class EmulatedNode:
    """The node of an emulated device."""

    def __init__(self, device: Device, settings: NodeSettings) -> None:
        self.name = device.name
        self.folder = settings.folder.absolute() / device.name  # the trainer works in a folder of its own
        self.spool = self.folder / "spool"
        self.content = self.folder / "content"
        self.connection = LocalConnection()
        self._device = device
        self._settings = settings
        self._starting: Starting | None = None

    def prepare(self) -> None:
        for folder in (self.spool / "jobs", self.spool / "state", self.content):
            folder.mkdir(parents=True, exist_ok=True)
        if not self.alive():
            clean_up_after(self.spool)
        (self.spool / SETTINGS_FILE).write_text(json.dumps(self._agent_settings(), indent=1))

    def alive(self) -> bool:
        """An agent holds the lock of its spool for as long as it lives."""
        fd = os.open(self.spool / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def begin_start(self) -> None:
        code = str(Path(testbed.__file__).resolve().parent.parent)
        command = [self._settings.python, "-I", "-S", "-c", _BOOTSTRAP.format(code=code), str(self.spool)]
        scope = limits.scope_command() if self._settings.capped else ()
        self._let_go()
        self._starting = self.connection.start([*scope, *command], self.spool / "agent.log")

    def finish_start(self) -> None:
        if self._starting is None:
            return
        line = self._starting.first_line(_START_SECONDS)
        try:
            said = json.loads(line)
        except ValueError:
            said = {"error": f"it said {line!r}; see {self.spool / 'agent.log'}"}
        if "error" in said:
            self._starting.wait(_START_SECONDS)
            kind = getattr(errors, str(said.get("kind")), DeviceError)
            known = isinstance(kind, type) and issubclass(kind, TestbedError)
            raise (kind if known else DeviceError)(f"device {self.name}: the agent cannot start: {said['error']}")

    def attach(self) -> socket.socket:
        return self.connection.open_channel(self.spool, SOCKET_FILE)

    def wait_gone(self, patience_seconds: float) -> bool:
        deadline = time.monotonic() + patience_seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)  # the lock of somebody else's process cannot be waited for with a limit
        self._let_go()
        clean_up_after(self.spool)
        return True

    def kill(self) -> None:
        if self.alive():
            with contextlib.suppress(OSError, ValueError, KeyError):
                os.kill(json.loads((self.spool / STATE_FILE).read_text())["pid"], signal.SIGKILL)
        if not self.wait_gone(_START_SECONDS):
            raise DeviceError(f"device {self.name}: its agent in {self.spool} cannot be ended; kill it by hand")

    def missing(self, hashes: Iterable[str]) -> tuple[str, ...]:
        names = tuple(hashes)
        gone = {path.name for path in self.connection.missing(self.content / name for name in names)}
        return tuple(name for name in names if name in gone)

    def put_content(self, content: str, path: Path) -> None:
        self.connection.put(path, self.content / content)

    def _let_go(self) -> None:
        if self._starting is not None:
            self._starting.wait(_START_SECONDS)
            self._starting.close()
        self._starting = None

    def _agent_settings(self) -> dict[str, object]:
        device, settings = self._device, self._settings
        return {
            "run": settings.run,
            "device": device.name,
            "trainer": settings.trainer,
            "python": settings.python,
            "code": list(settings.code),
            "memory_bytes": device.budget.memory_bytes if settings.capped else None,
            "cores": device.budget.cores,
            "threads": device.threads,
            "accelerator": device.accelerator,
            "cgroup_parent": str(settings.cgroup_parent) if settings.cgroup_parent else None,
            "orphan_seconds": settings.orphan_seconds,
            "sample_seconds": settings.sample_seconds,
            "content": str(self.content),
            "environment": dict(settings.environment),
        }


def node(device: Device, settings: NodeSettings) -> EmulatedNode:
    return EmulatedNode(device, settings)
