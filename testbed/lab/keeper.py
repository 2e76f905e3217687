"""The process that stands for a host's power supply: it starts the host, and does to it what a person at the shelf can.

One keeper per host, outside of it.  It outlives the command that started it; others find it by what its state file
says (`testbed.process_identity`) and talk to it over a Unix socket, a JSON line each way.  When it is killed, the
kernel ends the host with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from testbed.errors import LabError, TestbedError
from testbed.lab.groups import HostGroups
from testbed.lab.init import APART, REBOOT, UP, Starting, start_init
from testbed.lab.link import LinkShape
from testbed.lab.meminfo import refresh
from testbed.lab.network import Link
from testbed.lab.spec import HostFolder, LabSpec
from testbed.lab.view import meminfo_file, prepare_boot
from testbed.process_identity import ProcessIdentity

OFF, BOOTING, RUNNING, FROZEN = "off", "booting", "up", "frozen"
_BOOT_SECONDS = 60.0
_END_SECONDS = 10.0
_REFRESH_SECONDS = 1.0
_LARGEST_REQUEST = 65_536


class Keeper:
    """Holds one host."""

    def __init__(self, folder: Path, name: str) -> None:
        self.lab = LabSpec.load(folder)
        self.host = self.lab.host(name)
        self.folder = HostFolder(folder, name)
        self.groups = HostGroups(self.lab.group, name)
        self.link = Link(self.lab, self.host)
        self.shape = self.lab.shape
        self.state = OFF
        self.connected = True
        self.boots = 0
        self.problem: str | None = None
        self._init: int | None = None
        self._init_ended = -1  # a descriptor that can be waited for
        self._boot_at: float | None = None
        self._verbs: dict[str, Callable[..., None]] = {
            "start": self.start, "stop": self.stop, "reboot": self.reboot, "cut": self.cut, "mend": self.mend,
            "freeze": self.freeze, "thaw": self.thaw, "shape": self.reshape,
        }  # fmt: skip

    def start(self) -> None:
        """Switch the host on; nothing happens to one that is on."""
        if self._init is not None:
            return
        self._boot_at = None
        self.groups.make(self.host.memory_bytes)
        prepare_boot(self.folder, self.host)
        starting = start_init(self.lab, self.host, self.folder, self.groups)
        self._init = starting.pid
        self._init_ended = os.pidfd_open(starting.pid)
        try:
            self._bring_up(starting)
        except BaseException:
            self.stop()
            raise
        self.state, self.boots, self.problem = RUNNING, self.boots + 1, None

    def stop(self) -> None:
        """Pull the plug: the link is down before anything can say goodbye."""
        self._boot_at = None
        if self._init is not None:
            with contextlib.suppress(LabError):
                self.link.connect(connected=False)
            os.kill(self._init, signal.SIGKILL)
            self.groups.freeze(frozen=False)  # what is frozen does not die
            self._bury()
        self.state = OFF

    def reboot(self) -> None:
        """As `reboot` in the host does; returns when it is down.  Raises LabError when it is off or frozen."""
        self._expect_running("rebooted")
        os.kill(self._must_init(), signal.SIGHUP)
        if not _readable(self._init_ended, _END_SECONDS):
            os.kill(self._must_init(), signal.SIGKILL)
        self._bury()
        self._boot_later()

    def cut(self) -> None:
        """Pull the network cable."""
        self.connected = False
        if self._init is not None:
            self.link.connect(connected=False)

    def mend(self) -> None:
        """Put the network cable back."""
        self.connected = True
        if self._init is not None:
            self.link.connect(connected=True)

    def freeze(self) -> None:
        """Stop every process where it is; the kernel goes on answering for them on the network."""
        self._expect_running("frozen")
        self.groups.freeze(frozen=True)
        self.state = FROZEN

    def thaw(self) -> None:
        if self.state == FROZEN:
            self.groups.freeze(frozen=False)
            self.state = RUNNING

    def reshape(self, **shape: Any) -> None:
        """Another bandwidth, delay or loss from now on; connections live through it."""
        self.shape = LinkShape(**shape)
        if self._init is not None:
            self.link.plug(self._init, self.shape, connected=self.connected)

    def serve(self, listener: socket.socket) -> None:
        """Do what is asked, and notice when the host reboots or dies; does not return."""
        while True:
            waiting = [listener.fileno()] + ([self._init_ended] if self._init is not None else [])
            ready, _, _ = select.select(waiting, [], [], self._patience())
            if self._init is not None and self._init_ended in ready:
                self._notice_end()
            if listener.fileno() in ready:
                self._answer(listener)
            if self._boot_at is not None and time.monotonic() >= self._boot_at:
                self._boot_again()
            if self.state == RUNNING:
                refresh(meminfo_file(self.folder), self.host.memory_bytes, self.groups)

    def write_state(self) -> None:
        """For everybody who wants to know: whole or not there."""
        record = {
            "keeper": asdict(ProcessIdentity.own()), "state": self.state, "connected": self.connected,
            "init": self._init, "boots": self.boots, "shape": asdict(self.shape), "problem": self.problem,
        }  # fmt: skip
        partial = self.folder.state.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.folder.state)

    def _bring_up(self, starting: Starting) -> None:
        try:
            _expect(starting.report, APART)
            self.link.plug(starting.pid, self.shape, connected=self.connected)
            os.write(starting.go, b"g")
            _expect(starting.report, UP)
        finally:
            os.close(starting.report)
            os.close(starting.go)

    def _patience(self) -> float | None:
        if self._boot_at is not None:
            return max(0.0, self._boot_at - time.monotonic())
        return _REFRESH_SECONDS if self.state == RUNNING else None

    def _answer(self, listener: socket.socket) -> None:
        channel, _ = listener.accept()
        with channel:
            channel.settimeout(5.0)
            try:
                request = json.loads(channel.recv(_LARGEST_REQUEST))
                answer = self._do(request.pop("do"), request)
            except (OSError, ValueError, KeyError) as error:
                answer = {"error": f"the keeper of {self.host.name} was asked something it cannot do: {error!r}"}
            with contextlib.suppress(OSError):  # who asked has gone
                channel.sendall(json.dumps(answer).encode() + b"\n")

    def _do(self, verb: str, arguments: dict[str, Any]) -> dict[str, str]:
        try:
            self._verbs[verb](**arguments)
        except TestbedError as error:
            return {"error": str(error)}
        finally:
            self.write_state()
        return {}

    def _notice_end(self) -> None:
        status = self._bury()
        if _asked_for_reboot(status):
            self._boot_later()
        else:
            self.state = OFF
        self.write_state()

    def _boot_later(self) -> None:
        self.state = BOOTING
        self._boot_at = time.monotonic() + self.lab.boot_delay_seconds

    def _boot_again(self) -> None:
        """Nobody waits for this one: a failure goes into the state."""
        try:
            self.start()
        except (TestbedError, OSError) as error:
            self.state, self.problem = OFF, str(error)
        self.write_state()

    def _bury(self) -> int:
        """After the host's end: take away what it leaves.  Gives the status of its first process."""
        _, status = os.waitpid(self._must_init(), 0)
        os.close(self._init_ended)
        self._init = None
        self.link.unplug()
        self.groups.remove()
        return status

    def _must_init(self) -> int:
        if self._init is None:
            raise LabError(f"host {self.host.name} is off; `testbed lab start {self.host.name}` starts it")
        return self._init

    def _expect_running(self, wanted: str) -> None:
        if self.state != RUNNING:
            way_out = "thaw" if self.state == FROZEN else "start"
            raise LabError(
                f"host {self.host.name} was to be {wanted}, and it is {self.state}; "
                f"first `testbed lab {way_out} {self.host.name}`"
            )


def main(folder: str, name: str) -> None:
    """Become the keeper of a host in the background; ends with exit code 0 when the host is up, else says why not."""
    report, said = os.pipe()
    if os.fork():
        os.close(said)
        with open(report, encoding="utf-8") as stream:  # noqa: PTH123 -- a descriptor
            problem = stream.read()
        sys.exit(problem.strip() or None)
    os.close(report)
    os.setsid()
    os.umask(0o022)
    keeper = Keeper(Path(folder), name)
    _to_console(keeper.folder.console)
    with _listen(keeper.folder) as listener:
        _first_boot(keeper, said)
        keeper.serve(listener)


def _first_boot(keeper: Keeper, said: int) -> None:
    try:
        keeper.write_state()
        keeper.start()
        keeper.write_state()
    except (TestbedError, OSError) as error:
        os.write(said, f"host {keeper.host.name} does not start: {error}; see {keeper.folder.console}".encode())
        os._exit(1)
    os.close(said)


def _listen(folder: HostFolder) -> socket.socket:
    """The path of a Unix socket may have 107 bytes only, so it is bound by its name."""
    os.chdir(folder.path)
    listener = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(FileNotFoundError):
        Path(folder.socket).unlink()
    listener.bind(folder.socket)
    Path(folder.socket).chmod(0o600)
    listener.listen()
    return listener


def _to_console(console: Path) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    written = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(nothing, 0)
    for standard in (1, 2):
        os.dup2(written, standard)


def _expect(report: int, wanted: str) -> None:
    """Read what init says until the line that is wanted; raises LabError for another one, an end, or silence."""
    line, deadline = b"", time.monotonic() + _BOOT_SECONDS
    while not line.endswith(b"\n"):
        if not _readable(report, deadline - time.monotonic()):
            raise LabError(f"no word from it for {_BOOT_SECONDS:.0f} s")
        piece = os.read(report, 1)
        if not piece:
            raise LabError("its first process has ended")
        line += piece
    said = line.decode().strip()
    if said != wanted:
        raise LabError(said.removeprefix("error: "))


def _readable(descriptor: int, patience_seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], max(0.0, patience_seconds))[0])


def _asked_for_reboot(status: int) -> bool:
    """By our `reboot` program, or by the system call: the kernel then says SIGHUP in the place of the real signal."""
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGHUP
    return os.WEXITSTATUS(status) == REBOOT
