"""A board with an accelerator, as files that a test moves on: a trainer's status, cgroup, meminfo, nvmap's table."""

from testbed.node.accelerator_memory import find
from testbed.node.limits import Group1, Group2
from testbed.node.memory import PhaseMeter

KIB = 1024
PID = 7
CLIENTS = "sys/kernel/debug/nvmap/iovmm/clients"


class UnifiedBoard:
    """Everything in KiB.  `charges`: whether the board charges the accelerator's memory to the trainer's cgroup."""

    def __init__(self, root, *, version="v2", charges=False, table=True, total=8_000_000):
        self.root, self.version, self.charges, self.table, self.total = root, version, charges, table, total
        self.group_folder = root / "group"
        self.highest = self.peak = 0
        for folder in (self.group_folder, root / "proc" / str(PID), (root / CLIENTS).parent):
            folder.mkdir(parents=True)
        (root / "proc" / str(PID) / "clear_refs").touch()

    def group(self, limit=4_000_000):
        kinds = {"v1": Group1, "v2": Group2, None: None}
        kind = kinds[self.version]
        return None if kind is None else kind(self.group_folder, limit * KIB)

    def accelerator(self, charged, *others):
        """What a node finds here; `others`: what others held, whenever there was no trainer."""
        self.rests(others[0] if others else 0)
        found = find("cuda", charged, self.root)
        for held in others:
            self.rests(held)
            found.take_baseline()
        return found

    def meter(self, charged, *others, limit=4_000_000):
        found = self.accelerator(charged, *others)
        self.moves_to()
        return PhaseMeter(PID, self.group(limit), self.root / "proc", found)

    def rests(self, others):
        self._write_meminfo(others, self.total // 2)

    def moves_to(self, *, anonymous=0, file=0, kernel=0, held=0, others=0, available=None):
        """The trainer holds so much from now on: anonymous, of mapped files, in the kernel, on the accelerator."""
        resident = anonymous + file
        self.highest = max(self.highest, resident)
        (self.root / "proc" / str(PID) / "status").write_text(
            f"Name:\tpython\nVmHWM:\t{self.highest} kB\nVmRSS:\t{resident} kB\nRssAnon:\t{anonymous} kB\n"
            f"RssFile:\t{file} kB\nRssShmem:\t0 kB\n"
        )
        self._write_meminfo(others + held, self.total // 2 if available is None else available)
        if self.table:
            rows = f"user python {PID} {held}K\nuser Xorg 99 {others}K\ntotal {held + others}K\n"
            (self.root / CLIENTS).write_text("CLIENT PROCESS PID SIZE\n" + rows)
        self._write_group(anonymous, file, kernel, held if self.charges else 0)

    def _write_meminfo(self, held, available):
        (self.root / "proc" / "meminfo").write_text(
            f"MemTotal: {self.total} kB\nMemAvailable: {available} kB\nNvMapMemUsed: {held} kB\n"
        )

    def _write_group(self, anonymous, file, kernel, charged):
        self.peak = max(self.peak, anonymous + file + kernel + charged)
        stat = f"anon {anonymous * KIB}\nfile {file * KIB}\nkernel_stack {kernel * KIB}\n"
        stat += f"kernel {(kernel + charged) * KIB}\n"
        if self.version == "v1":
            stat = f"rss {anonymous * KIB}\ncache {file * KIB}\n"
        files = {
            "memory.stat": stat,
            "memory.peak": str(self.peak * KIB),
            "memory.max_usage_in_bytes": str(self.peak * KIB),
            "memory.kmem.usage_in_bytes": str((kernel + charged) * KIB),
        }
        for name, text in files.items():
            (self.group_folder / name).write_text(text)
