"""A small file of the kernel (/proc, cgroup) that is read or written again and again: opened once, at first use.

Opening one costs several times what reading it does, and an agent reads twenty times a second.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MAX_BYTES = 16 << 10


class KernelFile:
    """Never creates a file; one that is not there, or refuses, gives None or False."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self._path = path
        self._flags = flags | os.O_CLOEXEC
        self._fd = -1

    def read(self) -> bytes | None:
        try:
            return os.pread(self._open(), _MAX_BYTES, 0)
        except OSError:
            return None

    def write(self, data: bytes) -> bool:
        try:
            os.pwrite(self._open(), data, 0)
        except OSError:
            return False
        return True

    def number(self) -> int | None:
        """The one number that the file holds."""
        data = self.read()
        return int(data) if data is not None and data.strip().isdigit() else None

    def table(self) -> dict[str, int]:
        """A file of "name number" lines; empty where it cannot be read."""
        pairs = (line.split() for line in (self.read() or b"").splitlines())
        return {pair[0].decode(): int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _open(self) -> int:
        if self._fd < 0:
            self._fd = os.open(self._path, self._flags)
        return self._fd
