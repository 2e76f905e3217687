"""The trainer as the agent sees it: a child process in its cgroup, and the agent's end of the pipe to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from testbed.errors import WireError
from testbed.node.runtime import TRAINER_ENVIRONMENT
from testbed.node.spool import FD_VARIABLE, LOG_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from testbed.node.limits import Group

#: Of a result, mostly; large values belong into tensors.
MAX_LINE_BYTES = 3 << 20
_LOG_BYTES = 1 << 20
_TAIL_BYTES = 2000
_PR_SET_PDEATHSIG = 1
#: Starts a module out of folders that need not be installed; isolated, so that a stray file cannot win.
_BOOTSTRAP = "import runpy, sys; sys.path[:0] = {code!r}; runpy.run_module({module!r}, run_name='__main__')"


def environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """The trainer's environment: its threads, passive waiting (spinning threads slow each other down), no network."""
    threads = str(settings.get("threads") or 1)
    return {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        **TRAINER_ENVIRONMENT,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **settings.get("environment", {}),
    }


def command(settings: Mapping[str, Any]) -> list[str]:
    """How the trainer is started."""
    module, code = settings["trainer"], settings.get("code") or []
    start = ["-c", _BOOTSTRAP.format(code=code, module=module)] if code else ["-m", module]
    return [settings["python"], "-I", *start]


class Child:
    """One life of the trainer, from fork to reaping."""

    def __init__(self, settings: Mapping[str, Any], spool: Path, group: Group | None) -> None:
        self.ready = False
        self.unloading = False
        self.farewell: float | None = None  # it has closed its end of the pipe, and should be gone by then
        self.group = group
        self.oom_kills = group.oom_kills() if group is not None else 0
        self._buffer = bytearray()
        self._log = self._open_log(spool)
        self._log_start = os.fstat(self._log).st_size
        self.link, theirs = socket.socketpair()
        try:
            self.pid = self._fork(settings, spool, theirs)
        finally:
            theirs.close()

    def fileno(self) -> int:
        return self.link.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """A trainer that has just died shows when it is reaped, not here."""
        with contextlib.suppress(OSError):
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None when the link has ended.  Raises WireError for what is none."""
        try:
            data = self.link.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest
        if len(rest) > MAX_LINE_BYTES:
            raise WireError(f"the trainer sent a line of more than {MAX_LINE_BYTES} bytes")
        return [_message(line) for line in lines]

    def out_of_memory(self) -> bool:
        """Whether the kernel has killed for memory in the trainer's group, in this life."""
        return self.group is not None and self.group.oom_kills() > self.oom_kills

    def kill(self) -> None:
        """Kill the trainer with whatever it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # between fork and setpgid there is no group of that number
        if self.group is not None:
            self.group.kill()

    def reap(self, *, block: bool = False) -> tuple[int, int] | None:
        """(exit code, negative for a signal; high-water mark in bytes) once it has ended, else None."""
        pid, status, usage = os.wait4(self.pid, 0 if block else os.WNOHANG)
        if not pid:
            return None
        return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024

    def close(self) -> None:
        self.link.close()
        os.close(self._log)

    def log_tail(self) -> str:
        """The end of what this life has written, for a message."""
        size = os.fstat(self._log).st_size
        start = max(self._log_start, size - _TAIL_BYTES)
        return os.pread(self._log, _TAIL_BYTES, start).decode(errors="replace").strip()

    def _open_log(self, spool: Path) -> int:
        fd = os.open(spool / LOG_FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if os.fstat(fd).st_size > _LOG_BYTES:
            os.ftruncate(fd, 0)
        return fd

    def _fork(self, settings: Mapping[str, Any], spool: Path, theirs: socket.socket) -> int:
        argv, variables, agent = command(settings), environment(settings), os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setpgid(0, 0)
            self._become(spool, theirs, agent)
            os.execve(argv[0], argv, {**variables, FD_VARIABLE: str(theirs.fileno())})  # noqa: S606 -- our own trainer
        except BaseException as error:  # noqa: BLE001 -- the child of a fork must not return into the agent's loop
            os.write(self._log, f"the trainer could not be started: {error}\n".encode())
        finally:
            os._exit(127)

    def _become(self, spool: Path, theirs: socket.socket, agent: int) -> None:
        """What must hold before the first byte of the trainer is loaded."""
        if self.group is not None:
            self.group.add(os.getpid())
        die_with(agent)
        for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123 -- /proc
            score.write("500")  # where there is no cap, the agent should outlive its trainer
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(self._log, 1)
        os.dup2(self._log, 2)
        theirs.set_inheritable(True)
        os.chdir(spool)


def die_with(agent: int) -> None:
    """Have the kernel kill us when the agent dies, even by SIGKILL."""
    import ctypes  # a megabyte, paid in the child only

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != agent:  # it died before we asked
        sys.exit(1)


def _message(line: bytearray) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the trainer sent a line that is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise WireError("the trainer sent a line that is not a JSON object")
    return message
