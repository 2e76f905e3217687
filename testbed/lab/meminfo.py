"""What a host sees as /proc/meminfo: the cap of its memory cgroup in the place of this machine's memory."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from testbed.lab.groups import HostGroups

_FIELDS = (
    "MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "SwapCached", "Active", "Inactive", "Shmem",
    "SReclaimable", "SwapTotal", "SwapFree",
)  # fmt: skip


def meminfo(memory_bytes: int, below: str = "") -> str:
    """The file of a host that uses nothing yet; `below` is a persona's, whose other lines stay (swap, GPU memory)."""
    text = below or "".join(_line(name, 0) for name in _FIELDS)
    return _with(text, MemTotal=memory_bytes, MemFree=memory_bytes, MemAvailable=memory_bytes)


def refresh(file: Path, memory_bytes: int, groups: HostGroups) -> None:
    """Write the host's present use into the file, in place: it is bind-mounted, and its length stays."""
    used = groups.used_bytes()
    if used is None:
        return
    free = max(0, memory_bytes - used)
    with contextlib.suppress(OSError):
        text = file.read_text(encoding="ascii")
        descriptor = os.open(file, os.O_WRONLY)
        try:
            os.pwrite(descriptor, _with(text, MemFree=free, MemAvailable=free).encode(), 0)
        finally:
            os.close(descriptor)


def _with(text: str, **values: int) -> str:
    for name, value in values.items():
        text = re.sub(rf"^{name}:.*\n", _line(name, value), text, flags=re.MULTILINE)
    return text


def _line(name: str, value_bytes: int) -> str:
    """As the kernel writes it: the number ends in the same column always."""
    return f"{name + ':':<16}{value_bytes >> 10:>8} kB\n"
