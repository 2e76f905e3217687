"""The accelerator that a trainer works on: its limit, its clock, its peak.  On the CPU every call does nothing.

Tried on: nothing yet.
"""

from __future__ import annotations

from pathlib import Path

import torch

from testbed.node.memory import parse_status

CUDA = "cuda"
#: How PyTorch says on a Jetson that cudaMalloc has failed: while it words its OutOfMemoryError it asks NVML, in vain
#: (https://github.com/pytorch/pytorch/issues/185240); and how libraries say it that allocate by themselves.
_OUT_OF_MEMORY_WORDS = (
    "NVML_SUCCESS == r",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "NvMapMemAlloc",
)


def set_limit(accelerator: str, budget_bytes: int | None) -> None:
    """Hold the caching allocator to what the budget leaves beside the trainer's own memory.

    The CUDA context and what the process takes later lie outside it: the agent watches the sum.
    """
    if accelerator == CUDA and budget_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory  # starts CUDA, whose part in the process counts too
        status = parse_status(Path("/proc/self/status").read_bytes())
        own = status.get("RssAnon", 0) + status.get("RssShmem", 0)
        torch.cuda.set_per_process_memory_fraction(allocator_fraction(budget_bytes, own, total))


def allocator_fraction(budget_bytes: int, own_bytes: int, total_bytes: int) -> float:
    """The allocator's share of the accelerator's memory, when the process itself holds `own_bytes` of the budget."""
    return min(1.0, max(0, budget_bytes - own_bytes) / total_bytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the accelerator's memory is used up, in whatever words."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY_WORDS)


def synchronise(accelerator: str) -> None:
    """Wait until the accelerator has done what it was given: only then does a clock tell the truth."""
    if accelerator == CUDA:
        torch.cuda.synchronize()


def reset_peak(accelerator: str) -> None:
    """Begin to watch for a new peak."""
    if accelerator == CUDA:
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(accelerator: str) -> int | None:
    """What the caching allocator has held at most since the last reset; None where there is no accelerator."""
    return torch.cuda.max_memory_reserved() if accelerator == CUDA else None
