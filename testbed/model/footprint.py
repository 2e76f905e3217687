"""Predict a job's peak memory, phase by phase and part by part, allocating nothing.

    peak = runtime + weights + adapters + optimizer slots + the highest moment of the passes + allocator slack

The *runtime* is measured once per device with an empty trainer (`Baseline`, see testbed.node.baseline).  The passes
are read off the real model on fake tensors (`testbed.model.tracing`), one block of each kind, and put together here
for as many blocks as the phase has.  What was left to be fitted is in `Coefficients`.

Two sums are kept apart, because a kernel can take back one and not the other:

unreclaimable   anonymous and shared memory.  This is what PeakMemory.estimate_bytes measures (and lower_bytes
                samples), and what the smallest surviving cap comes to.
bytes           unreclaimable plus the libraries' mapped working set and what mapped weights need to be in memory at a
                time: what a budget must hold for the job to run without thrashing, so this is what is fitted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.method import MAPPED, STREAMED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from testbed.method import ModelShape, Phase, Workload
    from testbed.model.tracing import BlockTrace, Trace

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_READ_BUFFER_BYTES = 4 << 20  # of testbed.model.tensorfile, where a weight is converted as it is read
_SLOT_BYTES = 4  # of an optimizer slot, per element
#: What CUDA's caching allocator holds beyond what it has handed out: the rest of one large and of one small segment.
#: From its source (20 MiB and 2 MiB segments); tried on nothing yet.
_CUDA_SEGMENT_BYTES = (20 + 2) << 20
#: Parts that the kernel may take back and read again.
RECLAIMABLE = ("libraries", "mapped weights")
#: Parts that belong to a moment of the passes.
PASSES = ("inputs", "activations", "logits", "gradients", "working", "streamed block")


@dataclass(frozen=True)
class Baseline:
    """What a trainer takes on a device before it holds any model; measured, never guessed.

    bytes              anonymous + shared memory of an empty trainer (torch and transformers imported): unreclaimable
    library_bytes      its file pages: the libraries' mapped working set, reclaimable, but read again at every step
    first_step_bytes   anonymous memory that the first step of any model adds for good: model classes, kernels, the
                       thread of the backward pass (measured with a model of a few KiB)
    context_bytes      what the first kernel takes of an accelerator's memory for good; 0 on the CPU
    """

    bytes: int
    library_bytes: int = 0
    first_step_bytes: int = 0
    context_bytes: int = 0


@dataclass(frozen=True)
class Coefficients:
    """What was fitted on the calibration cases of benchmarks/footprint.py; everything else follows from the code."""

    slack: float = 0.0  # of the passes' highest moment: kernels' workspaces
    slack_bytes: int = 0  # what any job adds: its own modules, its shard, small allocations


COEFFICIENTS_FILE = Path(__file__).with_name("coefficients.json")


@cache
def fitted_coefficients() -> Coefficients:
    """As fitted by `benchmarks/footprint.py --calibrate`."""
    return Coefficients(**json.loads(COEFFICIENTS_FILE.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class PhaseFootprint:
    """The predicted peak of one phase, in bytes by part."""

    name: str
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What a budget must hold."""
        return sum(self.parts.values())

    @property
    def unreclaimable_bytes(self) -> int:
        """What the kernel cannot take back: to be compared with a measured estimate."""
        return sum(size for part, size in self.parts.items() if part not in RECLAIMABLE)


@dataclass(frozen=True)
class Footprint:
    """The predicted peaks of a job's phases."""

    phases: tuple[PhaseFootprint, ...]

    @property
    def largest(self) -> PhaseFootprint:
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def bytes(self) -> int:
        """What a budget must hold, at the largest phase."""
        return self.largest.bytes

    @property
    def unreclaimable_bytes(self) -> int:
        return max(phase.unreclaimable_bytes for phase in self.phases)


def predict(
    phases: Sequence[Phase],
    shape: ModelShape,
    work: Workload,
    baseline: Baseline,
    fitted: Coefficients | None = None,
) -> Footprint:
    """The peak of a job with these phases on a device with this baseline."""
    chosen = fitted or fitted_coefficients()
    return Footprint(tuple(_phase(phase, shape, work, baseline, chosen) for phase in phases))


def passes_bytes(phase: PhaseFootprint) -> int:
    """What the passes alone come to at their highest moment."""
    return sum(phase.parts.get(part, 0) for part in PASSES)


def _phase(phase: Phase, shape: ModelShape, work: Workload, baseline: Baseline, fitted: Coefficients) -> PhaseFootprint:
    from testbed.model.tracing import kinds_of, trace

    found = trace(phase, shape.config, work)
    blocks = [found.blocks[found.kinds.index(kind)] for kind in kinds_of(phase, shape.config, work)]
    holding = STREAMED if phase.streamed else work.holding
    converted = shape.stored_dtype != work.dtype
    held = _held(found, blocks, phase, holding, converted=converted)
    streamed = _streamed(blocks, phase, whole=holding == STREAMED, buffer=_READ_BUFFER_BYTES * converted)
    passes = _highest(found, blocks, phase, streamed)
    parts = {
        "runtime": baseline.bytes + baseline.first_step_bytes,
        **held,
        **passes,
        "method": phase.kept_bytes,
        "slack": fitted.slack_bytes + round(fitted.slack * sum(passes.values())),
        "libraries": baseline.library_bytes,
    }
    if work.accelerator == "cuda":
        parts |= {"context": baseline.context_bytes, "caching": _CUDA_SEGMENT_BYTES}
    return PhaseFootprint(phase.name, {part: size for part, size in parts.items() if size})


def _held(found: Trace, blocks: Sequence[BlockTrace], phase: Phase, holding: str, *, converted: bool) -> dict[str, int]:
    """What stays from the first step to the last: weights by way of holding, adapters, optimizer slots."""
    every = [found.outside, *(block.weights for block in blocks)]
    frozen = [traced.weights.frozen for block, traced in zip(phase.blocks, blocks, strict=True) if not block.streamed]
    in_file = holding == MAPPED and not converted
    mounted = sum(weights.adapters for weights in every)
    trained = sum(weights.trained_elements for weights in every)
    beside = max(0, phase.trained_elements - found.outside.trained_elements)
    slots = phase.optimizer_slots * _SLOT_BYTES * phase.backward
    return {
        "weights": 0 if in_file or holding == STREAMED else sum(frozen),
        "mapped weights": max(frozen, default=0) if in_file else 0,
        "outside": 0 if in_file else found.outside.frozen,
        "adapters": mounted + beside * _SLOT_BYTES,
        "optimizer": slots * (trained + beside),
        "gradients beside": beside * _SLOT_BYTES * phase.backward,
    }


def _streamed(blocks: Sequence[BlockTrace], phase: Phase, *, whole: bool, buffer: int) -> list[int]:
    """What streaming holds while each block computes: itself, and what is read ahead for the next one."""
    frozen = [(traced.weights.frozen + buffer) for traced in blocks]
    ahead = [block.streamed for block in phase.blocks]
    return [
        size * (whole or ahead[index])
        + (frozen[index + 1] if ahead[index] and any(ahead[index + 1 : index + 2]) else 0)
        for index, size in enumerate(frozen)
    ]


def _highest(found: Trace, blocks: Sequence[BlockTrace], phase: Phase, streamed: Sequence[int]) -> dict[str, int]:
    """The parts at the highest moment of a step: inputs, activations, logits, gradients, working, streamed block."""
    return max(_moments(found, blocks, phase, streamed), key=lambda parts: sum(parts.values()))


def _moments(
    found: Trace, blocks: Sequence[BlockTrace], phase: Phase, streamed: Sequence[int]
) -> Iterator[dict[str, int]]:
    """The highest moment of every section of a step, in the order of time."""
    inputs = found.before.kept
    yield {"working": found.before.peak}
    kept = 0
    for block, held in zip(blocks, streamed, strict=True):
        yield {"inputs": inputs, "activations": kept, "working": block.forward.peak, "streamed block": held}
        kept += block.forward.kept
    yield {"inputs": inputs, "activations": kept, "logits": found.head.peak}
    if not phase.backward:
        return
    gradients = found.outside.trained
    yield {"inputs": inputs, "activations": kept, "logits": found.head.kept + found.head_backward.peak}
    rest = inputs + found.head.kept + found.head_backward.kept - gradients  # the gradient that goes down, and remains
    late = max(0, -rest)  # gradients of what is trained outside that come only when the blocks have theirs
    gradients, rest = gradients - late, rest + late
    for block, held in zip(reversed(blocks), reversed(streamed), strict=True):
        yield {
            "inputs": rest,
            "activations": kept,
            "gradients": gradients,
            "working": block.backward.peak,
            "streamed block": held * (block.backward.peak > 0),  # one that nothing goes back through is not read again
        }
        gradients += block.weights.trained
        kept += block.backward.kept - block.weights.trained
    yield {"gradients": gradients + late, "working": 2 * _largest_trained(found, blocks)}  # the optimizer's temporaries


def _largest_trained(found: Trace, blocks: Sequence[BlockTrace]) -> int:
    return max(weights.largest_trained for weights in [found.outside, *(block.weights for block in blocks)])
