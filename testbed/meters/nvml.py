"""A discrete NVIDIA GPU, by the library that comes with its driver (libnvidia-ml.so.1).

    meter: nvml                    # the first GPU
    meter:
      nvml: {index: 1}             # another one, in NVML's own order (that of nvidia-smi)

What it measures is the GPU with its memory ("and its associated circuitry"), not the machine around it.  Jetson boards
have sensors of their own: `ina3221`.

From NVIDIA's NVML reference, device queries (https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html):
nvmlDeviceGetPowerUsage is in milliwatts, "accurate to within +/- 5%" on Fermi and Kepler (nothing is stated for newer
ones, for which the same is assumed here), and on Ampere and newer, except GA100, an average over one second;
nvmlDeviceGetTotalEnergyConsumption counts millijoules since the driver was loaded, on Volta and newer.  That counter
moves about every 100 ms (https://ml.energy/blog/energy/measurement/thermally-stable-profiling-for-accurate-gpu-energy-measurement).
On A100 and H100 the sensor was found to see a quarter of the time only (https://arxiv.org/abs/2312.02741): loads that
repeat in step with it may be misjudged by more than what is stated here.

Tried on: nothing yet; against a library of our own with these functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from testbed.errors import MeterError
from testbed.meters import Accuracy, Meter, Reading

if TYPE_CHECKING:
    from collections.abc import Sequence

_LIBRARY = "libnvidia-ml.so.1"
_GAIN = 0.05
#: By how much a reading is older than its stamp: what the power is averaged over, what the counter is refreshed after.
_AVERAGED_SECONDS, _REFRESH_SECONDS = 1.0, 0.1

# From nvml.h (nvmlReturn_t), with the way out where there is one.
_SUCCESS, _INVALID_ARGUMENT, _NOT_SUPPORTED, _FUNCTION_NOT_FOUND = 0, 2, 3, 13
_WAYS_OUT = {
    3: "this GPU has no power sensor that NVML reads; measure with an external meter",
    4: "run the agent as a user who may use the GPU (the device files /dev/nvidia*)",
    9: "load the driver (modprobe nvidia), or install the one of this GPU",
    15: "the GPU has fallen off the bus; restart the machine",
    18: "library and kernel module are of different drivers; restart the machine after an update of the driver",
}


class NvmlMeter(Meter):
    """One GPU by its `index`; `library` is another file than the system's, for tests and odd installations."""

    point = "processor"

    def __init__(self, index: int = 0, library: str = _LIBRARY) -> None:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"index: expected a whole number from 0 up, got {index!r}")
        self._index, self._file = index, library
        self._library: Any = None
        self._device: Any = None

    def open(self) -> None:
        """Load NVML and find the GPU; raises MeterError where there is no driver, no such GPU, or no sensor."""
        import ctypes  # a megabyte, for those who want it

        try:
            self._library = ctypes.CDLL(self._file)
            self._library.nvmlErrorString.restype = ctypes.c_char_p
            self._call("nvmlInit_v2")
        except (OSError, AttributeError) as error:
            self._library = None
            raise MeterError(f"NVML cannot be loaded ({error}); install the driver of the NVIDIA GPU") from None
        except MeterError:
            self._library = None
            raise
        try:
            self._device = self._handle()
            self.has_counters = self._counts()
            self._milliwatts()
        except MeterError:
            self.close()
            raise
        self.rails = self.total_rails = (f"GPU{self._index}",)
        self.accuracy = (Accuracy(_GAIN, timing_seconds=_REFRESH_SECONDS if self.has_counters else _AVERAGED_SECONDS),)

    def read(self) -> Reading:
        """The GPU's power, and its energy where it counts that; raises MeterError with NVML's own words."""
        joules = (self._millijoules() / 1000,) if self.has_counters else None
        return Reading((self._milliwatts() / 1000,), joules)

    def close(self) -> None:
        if self._library is not None:
            self._library.nvmlShutdown()
        self._library = self._device = None

    def _handle(self) -> Any:
        from ctypes import byref, c_uint, c_void_p

        device, count = c_void_p(), c_uint()
        self._call("nvmlDeviceGetCount_v2", byref(count))
        if self._index >= count.value:
            there = f"0 to {count.value - 1}" if count.value else "none"
            raise MeterError(f"there is no GPU of index {self._index}; NVML knows {there}")
        self._call("nvmlDeviceGetHandleByIndex_v2", c_uint(self._index), byref(device))
        return device

    def _counts(self) -> bool:
        """Whether this GPU has the counter, which came with Volta."""
        try:
            self._millijoules(quiet=(_NOT_SUPPORTED, _FUNCTION_NOT_FOUND, _INVALID_ARGUMENT))
        except _LacksError:
            return False
        return True

    def _milliwatts(self) -> int:
        from ctypes import byref, c_uint

        power = c_uint()
        self._call("nvmlDeviceGetPowerUsage", self._device, byref(power))
        return power.value

    def _millijoules(self, quiet: Sequence[int] = ()) -> int:
        from ctypes import byref, c_ulonglong

        energy = c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._device, byref(energy), quiet=quiet)
        return energy.value

    def _call(self, name: str, *arguments: Any, quiet: Sequence[int] = ()) -> None:
        """One function of NVML; raises MeterError with its reason, or _LacksError for one of `quiet`."""
        if self._library is None:
            raise MeterError("the meter of the NVIDIA GPU is not open")
        function = getattr(self._library, name, None)  # an older library lacks a function that a newer one has
        code = _FUNCTION_NOT_FOUND if function is None else function(*arguments)
        if code == _SUCCESS:
            return
        if code in quiet:
            raise _LacksError
        said = (self._library.nvmlErrorString(code) or b"").decode(errors="replace")
        way_out = f"; {_WAYS_OUT[code]}" if code in _WAYS_OUT else ""
        raise MeterError(f"NVML refuses {name} for GPU {self._index}: {said or f'error {code}'}{way_out}")


class _LacksError(Exception):
    """This GPU or this library does not have that."""
