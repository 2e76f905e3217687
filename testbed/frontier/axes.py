"""What can be varied on a device, and what the footprint predicts of it: submodel, batch size, length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from testbed.errors import UsageError
from testbed.frontier.record import BATCH_SIZE, CEILING, LENGTH, MEMORY, MODEL, SUBMODEL, FrontierPoint
from testbed.frontier.search import largest
from testbed.method import IMAGE_CLASSIFICATION, Method, ModelShape, Submodel, Workload
from testbed.model.footprint import Footprint, predict
from testbed.model.prompt import longest_text
from testbed.plan import fit
from testbed.quantities import bytes_text

if TYPE_CHECKING:
    from testbed.inventory import Device
    from testbed.model.footprint import Baseline

#: Beyond these nobody would go: where they end an axis, a device holds at least so much.
CEILINGS = {BATCH_SIZE: 4096, LENGTH: 16384}


@dataclass(frozen=True)
class Asked:
    """One value of one axis, as a job has it."""

    submodel: Submodel
    work: Workload


@dataclass(frozen=True)
class Axis:
    """The values of one axis on one device, in ascending order, and what each of them asks for."""

    name: str
    unit: str
    values: Sequence[int]
    limited_by: str  # what ends the values: MODEL or CEILING
    start: int  # the run's own value
    asked: Callable[[int], Asked]
    words: Callable[[int], str]


@dataclass(frozen=True)
class Ground:
    """One method on one device: all that a prediction needs."""

    method: Method
    shape: ModelShape
    work: Workload  # of the run, with this device's accelerator
    device: Device
    baseline: Baseline

    @property
    def budget_bytes(self) -> int:
        return self.device.budget.memory_bytes

    def footprint(self, asked: Asked) -> Footprint:
        """What a job needs at its largest phase; raises UsageError where the method cannot do it."""
        phases = self.method.phases(asked.submodel, self.shape, asked.work)
        return predict(phases, self.shape, asked.work, self.baseline)

    def held_submodel(self) -> Submodel:
        """What the plan gives this device at the run's values; where it refuses the device, the smallest choice."""
        planned = fit(self.method, self.shape, self.work, self.budget_bytes, self.baseline).submodel
        return planned or min(
            self.method.choices(self.shape), key=lambda choice: self.footprint(Asked(choice, self.work)).bytes
        )


def axis_of(name: str, ground: Ground) -> Axis:
    """An axis with the others at the run's values; raises UsageError for the length of images."""
    if name == SUBMODEL:
        return _submodels(ground)
    if name == LENGTH and ground.work.task == IMAGE_CLASSIFICATION:
        raise UsageError("--vary length: images have no length; leave it out")
    held = ground.held_submodel()
    values, limited_by = _numbers(name, ground)
    unit = "tokens" if name == LENGTH else "examples"
    return Axis(
        name,
        unit,
        values,
        limited_by,
        getattr(ground.work, name),
        lambda value: Asked(held, _with(ground.work, name, value)),
        lambda value: f"{value} {unit}",
    )


def _with(work: Workload, name: str, value: int) -> Workload:
    return replace(work, length=value) if name == LENGTH else replace(work, batch_size=value)


def _numbers(name: str, ground: Ground) -> tuple[range, str]:
    """Every batch size or length that the model and the method can do, up to the ceiling; and what ends them."""
    longest = longest_text(ground.shape, ground.work) if name == LENGTH else None
    most = min(longest or CEILINGS[name], CEILINGS[name])

    def able(value: int) -> bool:
        try:
            ground.method.check(ground.shape, _with(ground.work, name, value))
        except UsageError:
            return False
        return True

    able_until = largest(range(1, most + 1), able, most) or getattr(ground.work, name)
    by_model = able_until < most or most == longest
    return range(1, able_until + 1), MODEL if by_model else CEILING


def _submodels(ground: Ground) -> Axis:
    """The method's choices, the smallest first: told by their blocks where these differ, and else numbered."""
    choices = list(ground.method.choices(ground.shape))[::-1]
    counts = [len(choice.blocks) for choice in choices]
    by_blocks = all(before < after for before, after in pairwise(counts))
    values = counts if by_blocks else list(range(1, len(choices) + 1))
    of_value = dict(zip(values, choices, strict=True))
    total = len(ground.shape)

    def words(value: int) -> str:
        text = submodel_text(of_value[value], total)
        return text if by_blocks else f"{text} (choice {value} of {len(choices)})"

    return Axis(
        SUBMODEL,
        "blocks" if by_blocks else "choices",
        values,
        MODEL,
        values[-1],
        lambda value: Asked(of_value[value], ground.work),
        words,
    )


def submodel_text(submodel: Submodel, blocks: int) -> str:
    """9 of 12 blocks, 4 of them trained, width 0.5"""
    streamed = sum(block.streamed for block in submodel.blocks)
    parts = sum(not block.whole for block in submodel.blocks)
    notes = [
        f"{len(submodel.trained)} of them trained" if submodel.trained is not None else "",
        f"{streamed} of them streamed" if streamed else "",
        f"{parts} of them in part" if parts else "",
        f"width {submodel.width:g}" if submodel.width != 1 else "",
    ]
    return ", ".join([f"{len(submodel.blocks)} of {blocks} blocks", *filter(None, notes)])


# ── the prediction ───────────────────────────────────────────────────────────────────────────────────────────────────
class Predicted:
    """The footprints along an axis, each traced once."""

    def __init__(self, ground: Ground, axis: Axis) -> None:
        self.ground, self.axis = ground, axis
        self.of = cache(lambda value: ground.footprint(axis.asked(value)))

    def admitted(self) -> int | None:
        """The largest value that the plan admits."""
        return self._largest(lambda value: self.of(value).bytes <= self.ground.budget_bytes)

    def within(self, share: float) -> int | None:
        """The largest value whose unreclaimable memory is predicted within that share of the budget."""
        return self._largest(lambda value: self.of(value).unreclaimable_bytes <= share * self.ground.budget_bytes)

    def _largest(self, holds: Callable[[int], bool]) -> int | None:
        if self.axis.name == SUBMODEL:  # as the plan does it: choices need not be ordered by their bytes
            return next((value for value in reversed(self.axis.values) if holds(value)), None)
        return largest(self.axis.values, holds, self.axis.start)


def predicted_point(ground: Ground, axis: Axis, predicted: Predicted) -> FrontierPoint:
    """A point with what is predicted, and no trial."""
    device, values = ground.device, axis.values
    found, edge = predicted.admitted(), predicted.within(1.0)
    smallest = predicted.of(values[0])
    return FrontierPoint(
        device=device.name,
        kind=device.kind,
        profile=device.profile.name,
        accelerator=device.accelerator,
        threads=device.threads,
        budget_bytes=ground.budget_bytes,
        axis=axis.name,
        unit=axis.unit,
        held=_held(ground, axis),
        limit=values[-1],
        limited_by=axis.limited_by if found == values[-1] else MEMORY,
        predicted=found,
        predicted_bytes=None if found is None else predicted.of(found).bytes,
        predicted_text=None if found is None else axis.words(found),
        edge=edge,
        edge_bytes=None if edge is None else predicted.of(edge).unreclaimable_bytes,
        needed_bytes=None if found is not None else smallest.bytes,
        refusal=None if found is not None else _refusal(ground, axis, smallest),
    )


def _held(ground: Ground, axis: Axis) -> dict[str, str | int]:
    """What the other axes stand at; images have no length."""
    held: dict[str, str | int] = {"batch_size": ground.work.batch_size}
    if ground.work.task != IMAGE_CLASSIFICATION:
        held["length"] = ground.work.length
    held.pop(axis.name, None)
    if axis.name != SUBMODEL:
        held["submodel"] = submodel_text(axis.asked(axis.values[0]).submodel, len(ground.shape))
    return held


def _refusal(ground: Ground, axis: Axis, smallest: Footprint) -> str:
    return (
        f"{axis.words(axis.values[0])}, the least there is, would need {bytes_text(smallest.bytes)} (phase "
        f"{smallest.largest.name}), the budget is {bytes_text(ground.budget_bytes)}"
    )
