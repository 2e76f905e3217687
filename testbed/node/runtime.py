"""What a trainer's process is started with so that its memory can be predicted.  Standard library only."""

from __future__ import annotations

#: The C allocator (glibc; others ignore these).  By default it raises the size from which an allocation gets pages of
#: its own to 32 MiB as it goes, so that activations of every size share one heap, where aligned blocks that were freed
#: leave holes that nothing fits.  With a fixed threshold the peak *is* the sum of the live tensors.  Measured (glibc
#: 2.36, a virtual machine with slow page faults, one thread), peak and CPU seconds per step:
#:     11 M model, batch 16 x 128    1514 MiB 1.46 s   here  922 MiB 2.8 s
#:     67 M model, batch 4 x 128     1300 MiB 1.9 s    here 1038 MiB 2.4 s
#: Time goes to page faults; thresholds up to 1 MiB and huge pages changed it by less than a tenth.
MMAP_THRESHOLD_BYTES = 1 << 16

TRAINER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 17),
    "MALLOC_TOP_PAD_": "0",
}
