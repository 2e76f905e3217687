"""A virtual machine of the lab, and what can be done to it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from testbed.errors import LabError
from testbed.lab.folder import SSH_CONFIG
from testbed.lab.host import HostState
from testbed.lab.link import LinkShape
from testbed.lab.machines import clock, link
from testbed.lab.machines.qemu import command
from testbed.lab.machines.qmp import QmpError, connected
from testbed.lab.machines.spec import LOOPBACK, MachineFolder, MachineLabSpec, MachineSpec
from testbed.process_identity import ProcessIdentity

#: Emulated on a busy machine, a first boot takes minutes.
BOOT_SECONDS = 1800.0
_ANSWER_SECONDS = 5.0
_CONSOLE_SECONDS = 300.0
_LOGIN_SECONDS = 2.0
_SSH_FAILED = 255  # the exit code of ssh itself
_FROZEN = "paused"  # as QEMU says it


@dataclass(frozen=True)
class _Record:
    """What only the lab knows of a machine."""

    process: ProcessIdentity | None = None
    connected: bool = True
    boots: int = 0
    shape: LinkShape = field(default_factory=LinkShape)


class VirtualMachineHost:
    """A host made by QEMU.  Every verb raises LabError when it cannot be done."""

    def __init__(self, folder: Path, lab: MachineLabSpec, spec: MachineSpec) -> None:
        self.spec = spec
        self.folder = MachineFolder(folder, spec.name)
        self._lab = lab

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def address(self) -> str:
        return self.spec.address

    @property
    def alive(self) -> bool:
        process = self._read().process
        return process is not None and process.alive

    def start(self) -> None:
        if self.alive:
            return
        if not self._lab.debian_image.whole:
            raise LabError(
                f"host {self.name} cannot start: the image that its disk is changes to is gone ({self._lab.image}); "
                "`testbed lab down` removes the lab"
            )
        clock.ensure(self.folder.lab, self._lab.time_port)
        done = subprocess.run(
            command(self._lab, self.spec, self.folder),
            cwd=self.folder.path, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if done.returncode:
            raise LabError(f"host {self.name} cannot start: {done.stderr.strip()}")
        process = ProcessIdentity.of(int(self.folder.pid.read_text(encoding="ascii")))
        record = self._read()
        self._write(replace(record, process=process, boots=record.boots + 1))
        if not record.connected:
            self._ask("set_link", name="net0", up=False)

    def stop(self) -> None:
        process = self._read().process
        if process is None or not process.alive:
            return
        with contextlib.suppress(QmpError):  # it may hang up before it has answered
            self._ask("quit")
        while process.alive:
            time.sleep(0.01)  # it is nobody's child: there is nothing to wait for

    def reboot(self) -> None:
        """Like its user who types `reboot`: what is not on its disk is gone."""
        self._expect_reachable("reboot")
        with self._qmp(_CONSOLE_SECONDS) as qmp:
            self.console(["systemctl", "reboot", "--no-block"])
            qmp.wait_for("RESET", "SHUTDOWN")
        record = self._read()
        self._write(replace(record, boots=record.boots + 1))

    def wait_up(self, patience_seconds: float = BOOT_SECONDS) -> None:
        deadline = time.monotonic() + patience_seconds
        while not self._answers(deadline - time.monotonic()):
            if not self.alive or time.monotonic() > deadline:
                state = self.state().state
                raise LabError(
                    f"host {self.name} ({self.address}) is {state}, and its SSH server does not answer; "
                    f"see {self.folder.console}"
                )
            time.sleep(0.2)  # a port cannot be waited for

    def wait_configured(self) -> None:
        """Wait until cloud-init has done what the rendered files ask for; raises LabError with what it says.

        A login is refused until the boot is over, and one that is about to be let in is cut off when cloud-init has the
        SSH server read its files again.
        """
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            self.wait_up(deadline - time.monotonic())
            done = self.console(["cloud-init", "status", "--wait", "--long"], BOOT_SECONDS)
            if done.returncode != _SSH_FAILED or time.monotonic() > deadline:
                break
            time.sleep(_LOGIN_SECONDS)  # each try takes from a boot that is slow as it is
        if done.returncode:
            told = done.stdout.strip() or done.stderr.strip()
            raise LabError(f"host {self.name} is not as its files want it: {told}\nsee {self.folder.console}")

    def cut(self) -> None:
        self._connect(there=False)

    def mend(self) -> None:
        self._connect(there=True)

    def freeze(self) -> None:
        self._expect_alive("be frozen")
        self._ask("stop")

    def thaw(self) -> None:
        self._expect_alive("be thawed")
        self._ask("cont")

    def shape(self, shape: LinkShape) -> None:
        """By the machine's own kernel, also after it has booted again."""
        self._expect_reachable("be shaped")
        done = self.console(["sh", "-c", link.script(shape)])
        if done.returncode:
            raise LabError(f"host {self.name}: its link cannot be shaped: {done.stderr.strip()}")
        self._write(replace(self._read(), shape=shape))

    def console(
        self, command: Sequence[str], patience_seconds: float = _CONSOLE_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root in the machine, over its SSH server."""
        config = str(self.folder.lab / SSH_CONFIG)
        words = ["ssh", "-F", config, "-o", "BatchMode=yes", self.name, "sudo", "-n", shlex.join(command)]
        try:
            return subprocess.run(
                words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=patience_seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"host {self.name}: {command[0]} has not ended after {patience_seconds:.0f} s") from None

    def state(self) -> HostState:
        """As QEMU sees it, and whether its SSH server answers."""
        record = self._read()
        process = record.process if record.process is not None and record.process.alive else None
        state, problem = ("off", None) if process is None else self._state_of_machine(record)
        return HostState(
            state,
            connected=record.connected,
            boots=record.boots,
            shape=record.shape,
            keeper=None if process is None else process.pid,
            used_bytes=None if process is None else _resident_bytes(process.pid),
            problem=problem,
        )

    def _state_of_machine(self, record: _Record) -> tuple[str, str | None]:
        try:
            status = self._ask("query-status")["status"]
        except LabError as error:
            return "gone", str(error)
        if status == _FROZEN:
            return "frozen", None
        return ("up" if not record.connected or self._answers(_ANSWER_SECONDS) else "booting"), None

    def _answers(self, patience_seconds: float) -> bool:
        """Whether its SSH server says its name: QEMU takes the connection in any case."""
        if not self.alive:
            return False
        wait_seconds = max(0.1, min(patience_seconds, _ANSWER_SECONDS))
        try:
            with socket.create_connection((LOOPBACK, self.spec.ssh_port), timeout=wait_seconds) as channel:
                return channel.recv(255).startswith(b"SSH-")
        except OSError:
            return False

    def _connect(self, *, there: bool) -> None:
        if self.alive:
            self._ask("set_link", name="net0", up=there)
        self._write(replace(self._read(), connected=there))

    def _expect_alive(self, verb: str) -> None:
        if not self.alive:
            raise LabError(f"host {self.name} is off, and cannot {verb}; `testbed lab start {self.name}` starts it")

    def _expect_reachable(self, verb: str) -> None:
        """For what is done over its SSH server: from a machine that cannot answer, an answer would be waited for."""
        self._expect_alive(verb)
        if self._ask("query-status")["status"] == _FROZEN:
            state, way_out = "frozen", "thaw"
        elif not self._read().connected:
            state, way_out = "cut", "mend"
        else:
            return
        raise LabError(f"host {self.name} is {state}, and cannot {verb}; first `testbed lab {way_out} {self.name}`")

    def _ask(self, what: str, **arguments: Any) -> Any:
        with self._qmp() as qmp:
            return qmp.ask(what, **arguments)

    @contextlib.contextmanager
    def _qmp(self, patience_seconds: float = 30.0) -> Any:
        try:
            with connected(self.folder.path, patience_seconds) as qmp:
                yield qmp
        except PermissionError:
            raise LabError(f"host {self.name} belongs to another user (sudo)") from None
        except OSError as error:
            raise LabError(f"host {self.name}: {error}; `testbed lab status` shows how it is") from None

    def _read(self) -> _Record:
        try:
            told = json.loads(self.folder.state.read_text(encoding="utf-8"))
            process, shape = told.pop("process"), LinkShape(**told.pop("shape"))
            return _Record(process=ProcessIdentity(**process) if process else None, shape=shape, **told)
        except (OSError, ValueError, KeyError, TypeError):
            return _Record()

    def _write(self, record: _Record) -> None:
        draft = self.folder.state.with_suffix(".new")
        draft.write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")
        draft.replace(self.folder.state)


def _resident_bytes(pid: int) -> int | None:
    """What the machine takes of this one's memory."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
