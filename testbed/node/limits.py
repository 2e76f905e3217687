"""Memory cgroups, v1 and v2: cap a trainer, read its peak, tell an out-of-memory kill, leave nothing behind.

What each needs:

v1   the memory controller mounted at ROOT/memory, and the right to write there (root).
v2   a group whose cgroup.controllers has "memory" and in which we may create groups: ROOT itself as root; without
     root, a delegated subtree that holds nothing but ourselves, which `systemd-run --user --scope -p Delegate=yes`
     gives (`scope_command`).

Tried on: v1 as root and delegated; v2 through the systemd user scope, in virtual machines (Debian 12 on x86-64,
Debian 13 on arm64: rounds with `memory.peak` as their upper bound).

Every path hangs off a `root` parameter, so that the logic can be tested without a kernel that has it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import LimitError
from testbed.node.kernel_file import KernelFile

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path("/sys/fs/cgroup")
#: Every group of ours begins so, and nothing else is ever removed.
PREFIX = "testbed-"
CPU_PERIOD_MICROSECONDS = 100_000
WAY_OUT = (
    "run as root, or on cgroup v2 in a session of your own with systemd (systemd-run --user), or give --no-cap to "
    "run without limits (the run is then marked uncapped)"
)


class Group(ABC):
    """One trainer's memory cgroup (and its cpu group, where a quota was asked for)."""

    version: str
    peak_source: str
    peak_file: str

    def __init__(self, path: Path, limit_bytes: int, cores: float | None = None) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self.cores = cores  # of its budget; None: no quota
        self._stat = KernelFile(path / "memory.stat")
        self._peak = KernelFile(path / self.peak_file)
        self._reset = KernelFile(path / self.peak_file, os.O_RDWR)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every directory that belongs to the group."""
        return (self.path,)

    def add(self, pid: int) -> None:
        """Move a process in; called by the child itself, before it becomes the trainer."""
        for path in self.paths:
            (path / "cgroup.procs").write_text(str(pid))

    @abstractmethod
    def usage(self) -> tuple[int | None, int | None]:
        """Now: anonymous + shared + kernel memory in bytes; pages read again after they were reclaimed, so far."""

    @abstractmethod
    def oom_kills(self) -> int:
        """How often the kernel has killed in this very group (the counter is not inherited by parents)."""

    @abstractmethod
    def limit_cores(self, cores: float | None) -> bool:
        """Hold everything inside to so many cores, with None to those of its budget; False where the kernel cannot."""

    def peak(self) -> int | None:
        """The kernel's own peak in bytes, page cache included; None where it keeps none."""
        return self._peak.number()

    def reset_peak(self) -> bool:
        """Start a new peak; False where the kernel cannot."""
        return self._reset.write(b"0")

    def kill(self) -> None:
        """Kill everything inside."""
        _kill_inside(self.path)

    def remove(self) -> None:
        """Kill what is left inside and remove the directories; raises LimitError when they cannot be removed."""
        for file in self._files():
            file.close()
        for path in self.paths:
            remove_path(path)

    def _files(self) -> tuple[KernelFile, ...]:
        return (self._stat, self._peak, self._reset)


class Group1(Group):
    """cgroup v1."""

    version = "v1"
    peak_source = "cgroup1_max_usage"
    peak_file = "memory.max_usage_in_bytes"

    def __init__(self, path: Path, limit_bytes: int, cpu_path: Path | None = None, cores: float | None = None) -> None:
        super().__init__(path, limit_bytes, cores)
        self.cpu_path = cpu_path
        self._kernel = KernelFile(path / "memory.kmem.usage_in_bytes")
        self._events = KernelFile(path / "memory.oom_control")

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,) if self.cpu_path is None else (self.path, self.cpu_path)

    def limit_cores(self, cores: float | None) -> bool:
        cores = self.cores if cores is None else cores
        quota = -1 if cores is None else _quota(cores)
        return self.cpu_path is not None and _try_write(self.cpu_path / "cpu.cfs_quota_us", str(quota))

    def oom_kills(self) -> int:
        return self._events.table().get("oom_kill", 0)

    def usage(self) -> tuple[int | None, int | None]:
        stat = self._stat.table()
        if "rss" not in stat:
            return None, None
        return stat["rss"] + stat.get("shmem", 0) + (self._kernel.number() or 0), _refaults(stat)

    def _files(self) -> tuple[KernelFile, ...]:
        return (*super()._files(), self._kernel, self._events)


class Group2(Group):
    """cgroup v2.  memory.peak exists since Linux 5.19; since 6.12 it starts again, for one open file, when written."""

    version = "v2"
    peak_source = "cgroup2_peak"
    peak_file = "memory.peak"

    def __init__(self, path: Path, limit_bytes: int, cores: float | None = None) -> None:
        super().__init__(path, limit_bytes, cores)
        self._local_events = KernelFile(path / "memory.events.local")
        self._events = KernelFile(path / "memory.events")

    def reset_peak(self) -> bool:
        if not self._reset.write(b"reset"):
            return False
        self._peak = self._reset  # only this open file sees the new peak
        return True

    def limit_cores(self, cores: float | None) -> bool:
        cores = self.cores if cores is None else cores
        quota = "max" if cores is None else str(_quota(cores))
        return _try_write(self.path / "cpu.max", f"{quota} {CPU_PERIOD_MICROSECONDS}")

    def oom_kills(self) -> int:
        return (self._local_events.table() or self._events.table()).get("oom_kill", 0)

    def usage(self) -> tuple[int | None, int | None]:
        stat = self._stat.table()
        if "anon" not in stat:
            return None, None
        parts = ("shmem", "kernel_stack", "pagetables", "percpu", "sock", "slab_unreclaimable")
        return stat["anon"] + sum(stat.get(part, 0) for part in parts), _refaults(stat)

    def _files(self) -> tuple[KernelFile, ...]:
        return (*super()._files(), self._local_events, self._events)


def create(
    name: str,
    memory_bytes: int,
    cores: float | None = None,
    parent: Path | None = None,
    root: Path = ROOT,
    *,
    quota: bool = False,
) -> Group:
    """A capped group for one trainer, swap off; raises LimitError when none can be made here.

    `parent` names the directory to create it in (v1: of the memory controller); None finds one.  `quota`: `limit_cores`
    is to hold it back later, where that can be had.
    """
    name = PREFIX + "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:200]
    try:
        version, where = (_version_of(parent), parent) if parent is not None else find_parent(root)
        if version == "v1":
            cpu_root = _beside(where, root) if quota or cores is not None else None
            return _create1(where / name, memory_bytes, cores, cpu_root)
        return _create2(where / name, memory_bytes, cores, quota=quota)
    except OSError as error:
        raise LimitError(
            f"memory cannot be capped here: a group of {memory_bytes} bytes was to be made, and {error.filename} said "
            f"{error.strerror}; {WAY_OUT}"
        ) from None


def find_parent(root: Path = ROOT, membership: Path = Path("/proc/self/cgroup")) -> tuple[str, Path]:
    """("v1" or "v2", the directory to create groups in); raises LimitError with the way out where there is none."""
    if _writable(root / "memory") and (root / "memory" / "memory.limit_in_bytes").exists():
        return "v1", root / "memory"
    for parent in (_own_group2(root, membership), root):
        if parent is not None and _can_delegate(parent, root):
            return "v2", parent
    raise LimitError(f"memory cannot be capped here: no memory cgroup under {root} may be written; {WAY_OUT}")


def scope_command(root: Path = ROOT, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """What to put before an agent's command so that it gets a delegated group of its own; () where not needed.

    Needed on cgroup v2 without root, where systemd runs a session for the user; a login that PAM had no part in does
    not know where.  Tried on: Debian 12 with systemd 252, in a virtual machine.
    """
    v2 = (root / "cgroup.controllers").exists()
    runtime = environment.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    if not v2 or _writable(root) or not Path(runtime, "bus").exists() or shutil.which("systemd-run") is None:
        return ()
    where = f"XDG_RUNTIME_DIR={runtime}"
    return ("env", where, "systemd-run", "--user", "--scope", "--quiet", "--collect", "-p", "Delegate=yes", "--")


def remove_path(path: Path, patience_seconds: float = 5.0) -> None:
    """Remove one of our groups and kill what is left in it; what is gone already is fine."""
    if not path.name.startswith(PREFIX):
        raise LimitError(f"{path} was to be removed, and is no group of the testbed")
    deadline = time.monotonic() + patience_seconds
    while (problem := _try_rmdir(path)) is not None:
        if problem.errno not in (errno.EBUSY, errno.ENOTEMPTY) or time.monotonic() > deadline:
            raise LimitError(f"{path} cannot be removed: {problem.strerror}; remove it with rmdir")
        _kill_inside(path)
        time.sleep(0.005)  # the kernel takes a moment to let go of the killed


def _try_rmdir(path: Path) -> OSError | None:
    try:
        path.rmdir()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def _kill_inside(path: Path) -> None:
    if _try_write(path / "cgroup.kill", "1"):
        return
    with contextlib.suppress(OSError):
        for pid in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _create1(path: Path, memory_bytes: int, cores: float | None, cpu_root: Path | None) -> Group1:
    cpu_path = cpu_root / path.name if cpu_root is not None and _writable(cpu_root) else None
    group = Group1(path, memory_bytes, cpu_path, cores)
    try:
        for made in group.paths:
            made.mkdir()
        (path / "memory.limit_in_bytes").write_text(str(memory_bytes))
        _try_write(path / "memory.memsw.limit_in_bytes", str(memory_bytes))  # absent where swap is not accounted
        _try_write(path / "memory.swappiness", "0")
        if cpu_path is not None:
            (cpu_path / "cpu.cfs_period_us").write_text(str(CPU_PERIOD_MICROSECONDS))
            if cores is not None:
                (cpu_path / "cpu.cfs_quota_us").write_text(str(_quota(cores)))
    except OSError:
        group.remove()
        raise
    return group


def _create2(path: Path, memory_bytes: int, cores: float | None, *, quota: bool = False) -> Group2:
    _enable_controllers(path.parent, "memory cpu" if quota or cores is not None else "memory")
    path.mkdir()
    group = Group2(path, memory_bytes, cores)
    try:
        (path / "memory.max").write_text(str(memory_bytes))
        _try_write(path / "memory.swap.max", "0")  # absent on a kernel without swap
        _try_write(path / "memory.oom.group", "1")
        if cores is not None:
            _try_write(path / "cpu.max", f"{_quota(cores)} {CPU_PERIOD_MICROSECONDS}")
    except OSError:
        group.remove()
        raise
    return group


def _quota(cores: float) -> int:
    """In microseconds of a period; the kernel takes none below 1 ms."""
    return int(cores * CPU_PERIOD_MICROSECONDS)


def _beside(parent: Path, root: Path) -> Path:
    """The group of the cpu controller that goes with one of the memory controller: both are handed to a user alike."""
    try:
        return root / "cpu" / parent.relative_to(root / "memory")
    except ValueError:
        return root / "cpu"


def _enable_controllers(parent: Path, controllers: str) -> None:
    """Let the children of `parent` be capped; a group other than the root must not hold processes itself."""
    enabled = (parent / "cgroup.subtree_control").read_text().split()
    for controller in controllers.split():
        if controller in enabled:
            continue
        try:
            (parent / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError as error:
            if error.errno != errno.EBUSY:
                if controller == "memory":
                    raise
                continue  # a quota is good to have; the cap is what must hold
            _move_self_below(parent)
            (parent / "cgroup.subtree_control").write_text(f"+{controller}")


def _move_self_below(parent: Path) -> None:
    """Leave a delegated group for a leaf of it, so that it may have capped children ("no internal processes")."""
    leaf = parent / f"{PREFIX}agent"
    leaf.mkdir(exist_ok=True)
    (leaf / "cgroup.procs").write_text(str(os.getpid()))


def _own_group2(root: Path, membership: Path) -> Path | None:
    """Our own v2 group, or its parent where an agent before us has already stepped into a leaf."""
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            if line.startswith("0::/") and line != "0::/":
                path = root / line[4:]
                return path.parent if path.name == f"{PREFIX}agent" else path
    return None


def _can_delegate(parent: Path, root: Path) -> bool:
    """Whether groups with a memory cap can be made in a v2 group."""
    try:
        controllers = (parent / "cgroup.controllers").read_text().split()
        inside = [int(pid) for pid in (parent / "cgroup.procs").read_text().split()]
    except (OSError, ValueError):
        return False
    alone = parent == root or set(inside) <= {os.getpid()}
    return "memory" in controllers and alone and _writable(parent) and _writable(parent / "cgroup.procs")


def _version_of(parent: Path) -> str:
    return "v2" if (parent / "cgroup.controllers").exists() else "v1"


def _writable(path: Path) -> bool:
    return os.access(path, os.W_OK)


def _try_write(path: Path, text: str) -> bool:
    """Write to a file of the kernel; False where it is not there or refuses.  Never creates one."""
    file = KernelFile(path, os.O_WRONLY)
    try:
        return file.write(text.encode())
    finally:
        file.close()


def _refaults(stat: Mapping[str, int]) -> int | None:
    """Linux 5.9 and later count anonymous and file pages apart; earlier ones together."""
    names = ("workingset_refault_anon", "workingset_refault_file", "workingset_refault")
    found = [stat[name] for name in names if name in stat]
    return sum(found) if found else None
