"""What a trainer's process is started with so that its memory can be predicted.  Standard library only."""

from __future__ import annotations

#: The C allocator (glibc; others ignore these).  By default it raises the size from which an allocation gets pages of
#: its own to 32 MiB as it goes, so that activations of every size share one heap, where aligned blocks that were freed
#: leave holes that nothing fits.  With a fixed threshold the peak *is* the sum of the live tensors; the price is page
#: faults.  benchmarks/allocator.py measures both.
MMAP_THRESHOLD_BYTES = 1 << 16

TRAINER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 17),
    "MALLOC_TOP_PAD_": "0",
}


def fix_mmap_threshold() -> None:
    """The same for a process that runs already: large tensors that are freed go back to the kernel at once.

    Without it the controller keeps one payload more than it holds, in holes between tensors.
    """
    import ctypes  # a megabyte, for those who want it

    option = -3  # M_MMAP_THRESHOLD of glibc's malloc.h; another C library has no mallopt, or ignores it
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, MMAP_THRESHOLD_BYTES)
