"""The accelerator that a trainer works on: its limit, its clock, its peak.  On the CPU every call does nothing.

Tried on: nothing yet.
"""

from __future__ import annotations

import torch

CUDA = "cuda"


def set_limit(accelerator: str, budget_bytes: int | None) -> None:
    """Hold the caching allocator to the budget; the CUDA context lies outside it, and is in the footprint."""
    if accelerator == CUDA and budget_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total))


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
