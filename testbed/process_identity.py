"""Which process runs something, so that others can tell whether it still does."""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, told apart from a later one with the same id by when it started and on which boot."""

    pid: int
    started: str  # clock ticks since boot
    boot: str

    @classmethod
    def own(cls) -> ProcessIdentity:
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """The process that has this id now; it is not alive if there is none."""
        return cls(pid, _start_of(pid) or "", _boot())

    @property
    def alive(self) -> bool:
        """False for a process of this machine that has ended, and for one of an earlier boot or another machine."""
        return self.boot == _boot() and _start_of(self.pid) == self.started


def login_name() -> str:
    """Whose processes these are; the number where it has no name, as it may be in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _start_of(pid: int) -> str | None:
    """Field 22 of the process's stat: the name before it may hold spaces and brackets."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *others = stat.rpartition(")")[2].split()
    return None if state in {"Z", "X"} else others[18]
