"""A host of the lab, and what can be done to it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import testbed
from testbed.errors import LabError
from testbed.lab.groups import HostGroups
from testbed.lab.link import LinkShape
from testbed.lab.spec import HostFolder, HostSpec, LabSpec
from testbed.process_identity import ProcessIdentity

_PATIENCE_SECONDS = 60.0
_SSH_PORT = 22
#: Starts a keeper without `site`: nothing but the standard library and this package is looked at.
_KEEPER = (
    "import sys; sys.path.insert(0, {code!r}); from testbed.lab.keeper import main; main(sys.argv[1], sys.argv[2])"
)


class LabHost(Protocol):
    """What every kind of lab host can do, whatever it is made of."""

    @property
    def name(self) -> str: ...

    @property
    def address(self) -> str: ...

    @property
    def alive(self) -> bool:
        """It is on; a host that is frozen or cut off is alive too."""

    def start(self) -> None:
        """Switch it on."""

    def stop(self) -> None:
        """Pull the plug."""

    def reboot(self) -> None:
        """Have it reboot; returns when it is down."""

    def wait_up(self, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        """Wait until its SSH server answers; raises LabError when it does not."""

    def cut(self) -> None:
        """Pull the network cable."""

    def mend(self) -> None:
        """Put the network cable back."""

    def freeze(self) -> None:
        """Stop every process where it is."""

    def thaw(self) -> None:
        """Let them go on."""

    def shape(self, shape: LinkShape) -> None:
        """Another bandwidth, delay or loss from now on."""


@dataclass(frozen=True)
class HostState:
    """How a host is."""

    state: str  # "up", "frozen", "booting", "off", or "gone" when its keeper has been killed
    connected: bool = True
    boots: int = 0
    shape: LinkShape = field(default_factory=LinkShape)
    init: int | None = None  # the id of its first process, on this machine
    keeper: int | None = None
    used_bytes: int | None = None
    problem: str | None = None  # why it did not come up again


class NamespaceHost:
    """A host made of Linux namespaces.  Every verb raises LabError when it cannot be done."""

    def __init__(self, folder: Path, lab: LabSpec, spec: HostSpec) -> None:
        self.spec = spec
        self.folder = HostFolder(folder, spec.name)
        self._lab = lab

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def address(self) -> str:
        return self.spec.address

    @property
    def alive(self) -> bool:
        return self.state().state in {"up", "frozen"}

    def start(self) -> None:
        if self.state().keeper is None:
            launch([self])
        else:
            self._ask("start")

    def stop(self) -> None:
        if self.state().keeper is not None:
            self._ask("stop")

    def reboot(self) -> None:
        self._ask("reboot")

    def cut(self) -> None:
        self._ask("cut")

    def mend(self) -> None:
        self._ask("mend")

    def freeze(self) -> None:
        self._ask("freeze")

    def thaw(self) -> None:
        self._ask("thaw")

    def shape(self, shape: LinkShape) -> None:
        self._ask("shape", **asdict(shape))

    def wait_up(self, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        deadline = time.monotonic() + patience_seconds
        while not self._answers(deadline - time.monotonic()):
            state = self.state()
            if state.state in {"off", "gone"} or time.monotonic() > deadline:
                why = f": {state.problem}" if state.problem else ""
                raise LabError(
                    f"host {self.name} ({self.address}) is {state.state}{why}, and its SSH server does not answer; "
                    f"see {self.folder.console}"
                )
            time.sleep(0.01)  # a port cannot be waited for

    def _answers(self, patience_seconds: float) -> bool:
        """Whether its SSH server says its name.  Nobody is asked who is not there: a search for its address is slow."""
        if not self.alive:
            return False
        wait_seconds = max(0.01, min(patience_seconds, 5.0))
        try:
            with socket.create_connection((self.address, _SSH_PORT), timeout=wait_seconds) as channel:
                return channel.recv(255).startswith(b"SSH-")
        except OSError:
            return False

    def console(
        self, command: Sequence[str], patience_seconds: float = _PATIENCE_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root in the host, past its network: what a keyboard and a screen would be good for."""
        init = self.state().init
        if init is None:
            raise LabError(f"host {self.name} is off; `testbed lab start {self.name}` starts it")
        join = 'echo 0 >"$0/cgroup.procs" && exec "$@"'
        group = self.groups().processes
        inside = ["nsenter", f"--target={init}", "--all", "--", *command]
        return subprocess.run(
            ["sh", "-c", join, str(group), *inside],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=patience_seconds, check=False,
        )  # fmt: skip

    def state(self) -> HostState:
        """From the keeper's file, which is believed only while the keeper lives."""
        try:
            record = json.loads(self.folder.state.read_text(encoding="utf-8"))
            keeper = ProcessIdentity(**record.pop("keeper"))
        except (OSError, ValueError, KeyError, TypeError):
            return HostState("gone")
        shape = LinkShape(**record.pop("shape"))
        if not keeper.alive:
            return HostState("gone", shape=shape, boots=record["boots"], problem=record["problem"])
        return HostState(keeper=keeper.pid, shape=shape, used_bytes=self.groups().used_bytes(), **record)

    def groups(self) -> HostGroups:
        return HostGroups(self._lab.group, self.name)

    def _ask(self, verb: str, **arguments: Any) -> None:
        try:
            answer = json.loads(self._exchange(json.dumps({"do": verb, **arguments})))
        except PermissionError:
            raise LabError(f"host {self.name} belongs to another user: only root may {verb} it (sudo)") from None
        except (OSError, ValueError) as error:
            raise LabError(
                f"host {self.name} cannot be asked to {verb}: its keeper does not answer ({error}); "
                f"`testbed lab start {self.name}` starts it anew, `testbed lab down` removes the lab"
            ) from None
        if "error" in answer:
            raise LabError(answer["error"])

    def _exchange(self, request: str) -> str:
        """Through /proc, because the path of a Unix socket may have 107 bytes only."""
        here = os.open(self.folder.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX) as channel:
                channel.settimeout(_PATIENCE_SECONDS)
                channel.connect(f"/proc/self/fd/{here}/{self.folder.socket}")
                channel.sendall(request.encode())
                with channel.makefile("r", encoding="utf-8") as stream:
                    return stream.readline()
        finally:
            os.close(here)


def launch(hosts: Iterable[NamespaceHost]) -> None:
    """Start the keepers of hosts side by side, and with them the hosts; raises LabError with what went wrong."""
    started = [(host, _start_keeper(host)) for host in hosts]
    problems = []
    for host, process in started:
        try:
            _, said = process.communicate(timeout=2 * _PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
        if process.returncode:
            lines = said.strip().splitlines() or [f"its keeper ended with exit code {process.returncode}"]
            problems.append(lines[-1] if host.name in lines[-1] else f"host {host.name}: {lines[-1]}")
    if problems:
        raise LabError("\n".join(problems))


def _start_keeper(host: NamespaceHost) -> subprocess.Popen[str]:
    code = _KEEPER.format(code=str(Path(testbed.__file__).resolve().parent.parent))
    command = [sys.executable, "-I", "-S", "-c", code, str(host.folder.lab), host.name]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        start_new_session=True,  # Ctrl-C is for the command
    )


def keepers_of(folder: Path) -> list[int]:
    """The keepers of a lab by their command lines, when its files no longer tell."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if len(words) > 6 and "testbed.lab.keeper" in words[4] and words[5] == str(folder):
                found.append(int(path.name))
    return found
