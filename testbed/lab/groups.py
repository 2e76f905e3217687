"""The cgroups of a host: its memory cap, and the freezer.

v1   one group per host in the memory hierarchy, one in the freezer's; the host mounts the memory hierarchy and sees
     its own group as the root of it.
v2   one group per host; below it `root`, the root of what the host sees, and below that `init`, because a group that
     has capped children must not hold processes itself.

Tried on: v1 as root.  The v2 code follows the kernel's documentation.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from pathlib import Path

from testbed.errors import LabError
from testbed.node.kernel_file import KernelFile

ROOT = Path("/sys/fs/cgroup")
_PATIENCE_SECONDS = 5.0


def memory_version(root: Path = ROOT) -> str | None:
    """Where the memory controller is on this machine, "v1" or "v2"; None when it is nowhere."""
    if (root / "memory" / "memory.limit_in_bytes").exists():
        return "v1"
    with contextlib.suppress(OSError):
        if "memory" in (root / "cgroup.controllers").read_text().split():
            return "v2"
    return None


def hierarchies(root: Path = ROOT) -> list[Path]:
    """Where a lab has groups: the hierarchy that freezes first, because what is frozen there dies nowhere else."""
    if memory_version(root) == "v2":
        return [root]
    freezers = (path for path in (root / "freezer", root / "unified") if path.is_dir())
    return [*list(freezers)[:1], root / "memory"]


class HostGroups:
    """The groups of one host."""

    def __init__(self, lab: str, host: str, root: Path = ROOT) -> None:
        self._parents = [hierarchy / lab for hierarchy in hierarchies(root)]
        self._paths = [parent / host for parent in self._parents]
        self._v2 = memory_version(root) == "v2"
        self._freezer = self._paths[0]
        self.memory = self._paths[-1]

    def make(self, memory_bytes: int) -> None:
        """Fresh groups, with the cap; what an earlier boot has left in them is gone.  Raises LabError."""
        self.remove()
        try:
            for path in self._paths:
                path.mkdir(parents=True, exist_ok=True)
            if self._v2:
                self._cap2(memory_bytes)
            else:
                _write(self.memory / "memory.limit_in_bytes", memory_bytes)
                _try_write(self.memory / "memory.memsw.limit_in_bytes", memory_bytes)  # absent where not accounted
        except OSError as error:
            raise LabError(f"the memory of a host cannot be capped: {error.filename}: {error.strerror}") from None

    def _cap2(self, memory_bytes: int) -> None:
        for parent in (self.memory.parent.parent, self.memory.parent):
            _write(parent / "cgroup.subtree_control", "+memory")
        _write(self.memory / "memory.max", memory_bytes)
        _try_write(self.memory / "memory.swap.max", 0)
        self.processes.mkdir(parents=True)

    def join(self) -> None:
        """Move the calling process in; what it starts is in, too."""
        for path in self._paths:
            _write((path / "root" if self._v2 else path) / "cgroup.procs", 0)

    @property
    def processes(self) -> Path:
        """Where the host's processes are."""
        return self.memory / "root" / "init" if self._v2 else self.memory

    def leave_root(self) -> None:
        """v2: out of the group that the host sees as its root, so that this may have capped children."""
        if self._v2:
            _write(self.processes / "cgroup.procs", 0)

    def mounting(self) -> tuple[Path, str, str]:
        """Where a host mounts the memory controller, the file system's type, and its options."""
        return (ROOT, "cgroup2", "") if self._v2 else (ROOT / "memory", "cgroup", "memory")

    def open_control(self) -> int | None:
        """v2: what `offer_memory` writes to, opened while this machine's cgroups are still in sight."""
        return os.open(self.memory / "cgroup.subtree_control", os.O_WRONLY | os.O_CLOEXEC) if self._v2 else None

    def freeze(self, *, frozen: bool) -> None:
        """Stop every process of the host where it is, or let them go on.  Raises LabError."""
        old = self._freezer / "freezer.state"
        try:
            if old.exists():
                _write(old, "FROZEN" if frozen else "THAWED")
            else:
                _write(self._freezer / "cgroup.freeze", int(frozen))
        except OSError as error:
            raise LabError(f"the host cannot be frozen: {error.filename}: {error.strerror}") from None

    def used_bytes(self) -> int | None:
        """Memory of the host that cannot be had back by dropping cached files; None when it has no group."""
        stat = KernelFile(self.memory / "memory.stat")
        try:
            table = stat.table()
        finally:
            stat.close()
        for anonymous in ("total_rss", "anon"):
            if anonymous in table:
                return table[anonymous] + table.get("total_shmem", table.get("shmem", 0))
        return None

    def remove(self) -> None:
        for path in self._paths:
            remove_tree(path)


def remove_tree(path: Path) -> None:
    """Kill what is in a group or below it and remove them all; raises LabError when that does not succeed.

    Frozen processes are thawed first, because a v1 freezer keeps them from dying.
    """
    if not path.is_dir():
        return
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for group in [*_below(path), path]:
        while (problem := _try_remove(group)) is not None:
            if problem.errno not in (errno.EBUSY, errno.ENOTEMPTY) or time.monotonic() > deadline:
                raise LabError(f"the cgroup {group} cannot be removed: {problem.strerror}")
            _kill_inside(group)
            time.sleep(0.005)  # the kernel takes a moment to let go of the killed


def _below(path: Path) -> list[Path]:
    """The groups below one, the deepest first."""
    return [Path(folder) for folder, _, _ in os.walk(path, topdown=False) if Path(folder) != path]


def _try_remove(group: Path) -> OSError | None:
    try:
        group.rmdir()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def _kill_inside(group: Path) -> None:
    _try_write(group / "freezer.state", "THAWED")
    with contextlib.suppress(OSError):
        pids = map(int, (group / "cgroup.procs").read_text().split())
        for pid in filter(None, pids):  # 0 stands for a process that we cannot see
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _write(file: Path, value: int | str) -> None:
    with file.open("w", encoding="ascii") as stream:
        stream.write(str(value))


def _try_write(file: Path, value: int | str) -> None:
    if file.exists():
        with contextlib.suppress(OSError):
            _write(file, value)
