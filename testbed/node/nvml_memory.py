"""What processes hold on NVIDIA's cards, by the driver's management library (NVML).

A card's list of processes names process ids of the host, so that in a container nobody may be found.  Boards whose GPU
shares the board's memory do not tell how much of it is used ("not supported"): that is how they are known.

Source: https://docs.nvidia.com/deploy/nvml-api/ (nvmlDeviceGetMemoryInfo, nvmlDeviceGetComputeRunningProcesses_v3;
where a driver has no _v3, _v2 has the same fields).
Tried on: a library of the tests that answers as that documentation says; no card yet.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

LIBRARY = "libnvidia-ml.so.1"
_SUCCESS = 0
_INSUFFICIENT_SIZE = 7
_NOT_AVAILABLE = (1 << 64) - 1
_ROOM = 64  # processes; a longer list is asked for again


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Nvml:
    """All cards of this machine together: a source of `testbed.node.accelerator_memory`."""

    family = "nvml"
    lists_our_pids = False

    def __init__(self, library: ctypes.CDLL, devices: list[ctypes.c_void_p]) -> None:
        self._devices = devices
        self._memory = library.nvmlDeviceGetMemoryInfo
        self._processes: Any = getattr(library, "nvmlDeviceGetComputeRunningProcesses_v3", None) or getattr(
            library, "nvmlDeviceGetComputeRunningProcesses_v2", None
        )

    def system_bytes(self, _: Mapping[str, int]) -> int | None:
        """What is used of all cards; None where one does not say."""
        used = 0
        for device in self._devices:
            memory = _Memory()
            if self._memory(device, ctypes.byref(memory)) != _SUCCESS:
                return None
            used += memory.used
        return used

    def processes(self) -> list[tuple[int, int | None]] | None:
        """(process id, bytes) on each card; None where one does not say."""
        rows: list[tuple[int, int | None]] = []
        for device in self._devices:
            found = self._processes_of(device)
            if found is None:
                return None
            rows += found
        return rows

    def _processes_of(self, device: ctypes.c_void_p) -> list[tuple[int, int | None]] | None:
        if self._processes is None:
            return None
        count = ctypes.c_uint(_ROOM)
        while True:
            room = count.value
            table = (_Process * room)()
            code = self._processes(device, ctypes.byref(count), table)
            if code == _SUCCESS:
                return [(row.pid, None if row.used == _NOT_AVAILABLE else row.used) for row in table[: count.value]]
            if code != _INSUFFICIENT_SIZE or count.value <= room:
                return None


def open_nvml(library: str | None = None) -> Nvml | None:
    """NVML of this machine; None where there is none, or no card."""
    try:
        nvml = ctypes.CDLL(library or LIBRARY)
        init, how_many, by_index = nvml.nvmlInit_v2, nvml.nvmlDeviceGetCount_v2, nvml.nvmlDeviceGetHandleByIndex_v2
    except (OSError, AttributeError):
        return None
    count = ctypes.c_uint()
    if init() != _SUCCESS or how_many(ctypes.byref(count)) != _SUCCESS:
        return None
    devices = []
    for index in range(count.value):
        device = ctypes.c_void_p()
        if by_index(ctypes.c_uint(index), ctypes.byref(device)) == _SUCCESS:
            devices.append(device)
    return Nvml(nvml, devices) if devices else None
