"""How fast this machine trains, for a forecast where no run is there to go by: steps of the quickstart, timed.

A step is that of a trainer: every block of the quickstart model, LoRA on all of it, forward and backward on one thread,
with the allocator's setting of trainers; of several the median, as one alone may meet other work.  A trainer's start is
timed, too.  What both leave out is the rest: probes, sending and combining.
"""

from __future__ import annotations

import time
from functools import cache
from statistics import median

from testbed.method import SEQUENCE_CLASSIFICATION, Submodel, Workload

_BATCH, _LENGTH, _LABELS, _REPEATS = 16, 64, 8, 5
_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@cache
def start_here() -> float:
    """Seconds until a new trainer has loaded its libraries and done a first step."""
    from testbed.node.baseline import measure_here

    began = time.monotonic()
    measure_here(1)
    return time.monotonic() - began


@cache
def pace_here() -> float:
    """Seconds of a training step, over the bytes of the weights and the tokens that go through them."""
    import torch

    from testbed.model.adapters import LoraShape, mount_lora
    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import build
    from testbed.node.runtime import fix_mmap_threshold
    from testbed.prepare import content_store, model_folder

    fix_mmap_threshold()
    base = BaseModel.open(model_folder("quickstart"), content_store(), SEQUENCE_CLASSIFICATION, _LABELS)
    work = Workload(task=SEQUENCE_CLASSIFICATION, labels=_LABELS)
    kept = base.fill_in(Submodel.first(len(base.shape)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        built = build(base.config, kept, base.store.path, base.outside, work, seed=0)
        mount_lora(built, LoraShape(16, _MAPS), 32.0, 0.0)
        tokens = torch.randint(3, 100, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(0))
        _step(built.model, tokens)  # the first one also chooses kernels and touches memory
        took = median(_step(built.model, tokens) for _ in range(_REPEATS))
        built.close()
    finally:
        torch.set_num_threads(threads)
    weights = 4 * (base.shape.outside_elements + sum(base.shape.block_elements))
    return took / (weights * tokens.numel())


def _step(model: object, tokens: object) -> float:
    began = time.monotonic()
    model(input_ids=tokens).logits.sum().backward()  # type: ignore[operator]
    return time.monotonic() - began
