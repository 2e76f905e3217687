"""A background load: processes that spin, and hold memory inside the device's budget, beside a trainer."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Any

from testbed.node.child import die_with

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from testbed.node.limits import Group

#: Every byte is written, because untouched memory costs nothing; then it says so, and works.
_SCRIPT = """
import os, sys
held = b"\\1" * int(sys.argv[1])
os.write(int(sys.argv[2]), b"1")
os.close(int(sys.argv[2]))
while True:
    pass
"""
#: In which a process must have taken its memory.
_START_SECONDS = 30.0


class Load:
    """So many processes at work, the first of which holds all the memory; raises OSError where one cannot be started.

    They die with the agent, however that ends, and with the device's group.
    """

    def __init__(
        self, settings: Mapping[str, Any], spool: Path, group: Group | None, declared: Mapping[str, Any]
    ) -> None:
        self.processes = int(declared["processes"])
        self.memory_bytes = int(declared["memory_bytes"])
        self._pids: list[int] = []
        self._cpu_seconds = 0.0
        self._ended = 0
        ready, theirs = os.pipe()
        try:
            for number in range(self.processes):
                self._pids.append(_fork(settings["python"], spool, group, 0 if number else self.memory_bytes, theirs))
        finally:
            os.close(theirs)
        try:
            self.complete = _heard(ready, self.processes)
        finally:
            os.close(ready)

    def stop(self) -> dict[str, Any]:
        """End them, and tell what they were; so many had `ended_early`, by themselves or for want of memory."""
        for pid in self._pids:
            early, _, usage = os.wait4(pid, os.WNOHANG)
            if early:
                self._ended += 1
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                _, _, usage = os.wait4(pid, 0)
            self._cpu_seconds += usage.ru_utime + usage.ru_stime
        self._pids.clear()
        return {
            "processes": self.processes,
            "memory_bytes": self.memory_bytes,
            "cpu_seconds": round(self._cpu_seconds, 4),
            "ended_early": self._ended,
        }


def _heard(ready: int, processes: int) -> bool:
    """Whether all of them have said that they hold what they should."""
    deadline = time.monotonic() + _START_SECONDS
    count = 0
    while count < processes and select.select([ready], [], [], max(0.0, deadline - time.monotonic()))[0]:
        said = os.read(ready, processes)
        if not said:
            break
        count += len(said)
    return count == processes


def _fork(python: str, spool: Path, group: Group | None, memory_bytes: int, ready: int) -> int:
    agent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        if group is not None:
            group.add(os.getpid())
        die_with(agent)
        for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(spool)
        os.set_inheritable(ready, True)
        os.execve(python, [python, "-I", "-S", "-c", _SCRIPT, str(memory_bytes), str(ready)], {})  # noqa: S606 -- our own
    except BaseException:  # noqa: BLE001, S110 -- the child of a fork must not return into the agent's loop
        pass
    finally:
        os._exit(127)
