"""Memory that a trainer holds on the accelerator, read from outside.  How it enters a peak: `testbed.node.memory`.

    memory = find("cuda", charged)          # None on a CPU device
    memory.take_baseline()                  # whenever no trainer runs
    memory.sample(pid)                      # of the trainer and the processes that it started

Where it is read:

nvmap   Jetsons whose CUDA takes its memory from nvmap (Nano to Orin): `NvMapMemUsed` of /proc/meminfo (kB, all
        processes together), and the driver's table of processes, /sys/kernel/debug/nvmap/iovmm/clients (root only;
        `maps` beside it has the same lines, with details between them)
nvml    cards with their own memory, and boards on nvidia.ko (Jetson Thor, L4T 38): the driver's list of processes.
        There NvMapMemUsed is missing and nvmap's table, where it is there at all, says 0 for everybody
        (https://github.com/rbonghi/jetson_stats/pull/849), so it is not asked

A table gives the trainer's own memory, with its CUDA context.  Without one, what all processes hold has grown by the
trainer's part and by what others took meanwhile: certain is only what lies beyond the most that they have been seen to
hold without a trainer.

A card's own memory is in nobody's cgroup, and a budget is one number all the same: a device with such a card stands for
a board whose memory is shared, so its budget counts host memory and the card's together.

Sources: nvmap_dev.c and nvmap_debug.c of L4T's kernels; https://docs.nvidia.com/cuda/cuda-for-tegra-appnote/.
Tried on: reconstructed files of L4T 32, 35, 36 and 38; no board yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from testbed.node.kernel_file import KernelFile
from testbed.node.memory import AcceleratorSample, mebibytes, parse_status

if TYPE_CHECKING:
    from collections.abc import Mapping

CUDA = "cuda"
_TABLES = ("sys/kernel/debug/nvmap/iovmm/clients", "sys/kernel/debug/nvmap/iovmm/maps")
_HEADER = [b"CLIENT", b"PROCESS", b"PID", b"SIZE"]
_SHIFTS = {b"K": 10, b"M": 20, b"G": 30}
#: A list of processes that speaks of other process ids than ours (of a container) is known by growth that nobody has.
_UNLISTED_BYTES = 64 << 20
#: Kept for the system, since nvmap freezes a board that has nothing left rather than failing: what a trainer takes
#: between two samples must still fit, and so must sshd, the agent and what the driver takes for itself.
_RESERVE_BYTES = 128 << 20
_RESERVE_SHARE = 0.05  # of a board whose memory is small
_MAX_ANCESTORS = 32


class Source(Protocol):
    """A driver that tells what is held.  `lists_our_pids`: its table can be trusted to mean our process ids."""

    family: str
    lists_our_pids: bool

    def system_bytes(self, meminfo: Mapping[str, int]) -> int | None:
        """What all processes hold together."""

    def processes(self) -> list[tuple[int, int | None]] | None:
        """(process id, bytes) of all that hold something; None where the driver does not say."""


class Nvmap:
    """Jetson's allocator under CUDA."""

    family = "nvmap"
    lists_our_pids = True

    def __init__(self, base: Path) -> None:
        self._tables = [base / table for table in _TABLES]

    def system_bytes(self, meminfo: Mapping[str, int]) -> int | None:
        return meminfo.get("NvMapMemUsed")

    def processes(self) -> list[tuple[int, int | None]] | None:
        tables = (_read(table) for table in self._tables)
        return next((parse_clients(data) for data in tables if data is not None), None)


def parse_clients(data: bytes) -> list[tuple[int, int | None]] | None:
    """(process id, bytes) of every line of nvmap's table; None for what is no such table.

    A process's name may hold blanks, and a process that has opened the driver twice has two lines.  Lines that begin
    with a blank are details of the client above.
    """
    lines = data.splitlines()
    if not lines or lines[0].split() != _HEADER:
        return None
    rows: list[tuple[int, int | None]] = []
    for line in lines[1:]:
        words = line.split()
        if line[:1].isspace() or len(words) < len(_HEADER) or not words[-2].isdigit():
            continue
        size = _size(words[-1])
        if size is not None:
            rows.append((int(words[-2]), size))
    return rows


def _size(word: bytes) -> int | None:
    number, shift = word[:-1], _SHIFTS.get(word[-1:])
    return int(number) << shift if shift is not None and number.isdigit() else None


class AcceleratorMemory:
    """One accelerator as a node reads it.

    charged   whether its memory is charged to the cgroup of who takes it; None: not known
    shared    whether it is the board's own memory
    """

    def __init__(self, source: Source | None, charged: bool | None, base: Path, *, shared: bool) -> None:
        self.charged = charged
        self.shared = shared
        self._source = source
        self._proc = base / "proc"
        self._meminfo_file = KernelFile(self._proc / "meminfo")
        self._meminfo: dict[str, int] = {}  # at the last sample
        self._others: int | None = None  # what others held when last there was no trainer …
        self._least_others: int | None = None  # … and at least, and at most, whenever there was none
        self._most_others: int | None = None

    @property
    def family(self) -> str:
        """Which driver tells: nvmap or nvml; "" where none does."""
        return self._source.family if self._source is not None else ""

    def take_baseline(self) -> None:
        """Note what others hold.  For when no trainer runs: before one is started, each time."""
        held = self._system_bytes()
        if held is None:
            return
        self._others = held
        self._least_others = held if self._least_others is None else min(held, self._least_others)
        self._most_others = held if self._most_others is None else max(held, self._most_others)

    def sample(self, pid: int) -> AcceleratorSample:
        """What the process `pid` holds now, with those that it started."""
        held = self._system_bytes()
        delta, least, most = (
            None if held is None or others is None else max(0, held - others)
            for others in (self._others, self._most_others, self._least_others)
        )
        rows = self._source.processes() if self._source is not None else None
        if rows is None:
            return AcceleratorSample(None, delta, least, most, self.family)
        ours = [size for other, size in rows if self._belongs(other, pid)]
        if not ours and self._is_blind(delta):
            return AcceleratorSample(None, delta, 0, most, self.family)
        known = [size for size in ours if size is not None]
        if len(known) < len(ours):
            return AcceleratorSample(None, delta, least, most, self.family)
        process = sum(known)
        return AcceleratorSample(process, delta, process, process, self.family)

    def shortage(self) -> str | None:
        """Why the board is about to run out of memory, by the last sample; None where it is not, or shares none."""
        total, left = self._meminfo.get("MemTotal"), self._meminfo.get("MemAvailable")
        if not self.shared or total is None or left is None:
            return None
        reserve = min(_RESERVE_BYTES, int(total * _RESERVE_SHARE))
        if left >= reserve:
            return None
        return f"{mebibytes(left)} were left of its {mebibytes(total)}, {mebibytes(reserve)} are kept for the system"

    def _system_bytes(self) -> int | None:
        self._meminfo = parse_status(self._meminfo_file.read())
        return self._source.system_bytes(self._meminfo) if self._source is not None else None

    def _is_blind(self, delta: int | None) -> bool:
        """Whether the table must be speaking of other process ids: nobody of ours is in it, and much is held."""
        return (
            self._source is not None
            and not self._source.lists_our_pids
            and delta is not None
            and delta > _UNLISTED_BYTES
        )

    def _belongs(self, pid: int, trainer: int) -> bool:
        """Whether a process is the trainer, of its process group, or a descendant."""
        for _ in range(_MAX_ANCESTORS):
            if pid == trainer:
                return True
            if pid <= 1:
                return False
            stat = _read(self._proc / str(pid) / "stat")
            if stat is None:
                return False
            parent, group = map(int, stat.rpartition(b")")[2].split()[1:3])
            if group == trainer:
                return True
            pid = parent
        return False


def find(
    accelerator: str, charged: bool | None, root: str | Path = "/", library: str | None = None
) -> AcceleratorMemory | None:
    """The accelerator of this node; None on a CPU device.

    charged   what the probe of `testbed.node.charge_probe` found; a card with its own memory needs none
    library   the file of NVML, where it is not the driver's own
    """
    if accelerator != CUDA:
        return None
    base = Path(root)
    meminfo = KernelFile(base / "proc" / "meminfo")
    has_nvmap = "NvMapMemUsed" in parse_status(meminfo.read())
    meminfo.close()
    if has_nvmap:
        return AcceleratorMemory(Nvmap(base), charged, base, shared=True)
    from testbed.node import nvml_memory  # ctypes and the driver's library: megabytes, only where they are needed

    nvml = nvml_memory.open_nvml(library)
    shared = _is_tegra(base) or (nvml is not None and nvml.system_bytes({}) is None)
    has_own_memory = nvml is not None and not shared
    return AcceleratorMemory(nvml, False if has_own_memory else charged, base, shared=shared)


def _is_tegra(base: Path) -> bool:
    compatible = _read(base / "sys/firmware/devicetree/base/compatible") or b""
    return any(name.startswith(b"nvidia,tegra") for name in compatible.split(b"\0"))


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
