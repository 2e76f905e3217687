"""The memory frontier of devices: the largest submodel, batch and length that each can hold.  Nouns, and their files.

runs/frontiers/<method>-<key>.json     one Frontier; the key is made of all that was asked but devices and axes

Two figures are predicted, and one is measured:

predicted   the largest value that the plan admits: unreclaimable memory and the libraries' working set fit the budget
edge        the largest value whose unreclaimable memory alone does: beyond it the kernel is expected to kill
confirmed   the largest value that a real job under the real cap survived; `refuted`: the smallest that one did not
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from testbed.durable import disk_errors_in_words, read_json, write_json
from testbed.errors import StoreError
from testbed.job import FINISHED, OUT_OF_MEMORY, OVER_BUDGET, TIMED_OUT
from testbed.measurement import PeakMemory

SUBMODEL = "submodel"
BATCH_SIZE = "batch_size"
LENGTH = "length"
AXES = (SUBMODEL, BATCH_SIZE, LENGTH)

#: What ends an axis where memory does not: the model itself, or what nobody would ask for.
MEMORY = "memory"
MODEL = "model"
CEILING = "ceiling"

#: How a job ends that is too large for its device; one that timed out read its own code again and again.
TOO_LARGE = (OUT_OF_MEMORY, OVER_BUDGET, TIMED_OUT)
FOLDER = "frontiers"


@dataclass(frozen=True)
class Trial:
    """Real jobs with one value under the device's cap, until its memory had settled or it ended otherwise."""

    value: int
    text: str  # the value in words: "9 of 12 blocks"
    outcome: str  # of testbed.job: that of the last job
    predicted_bytes: int  # what a budget must hold, by the plan
    predicted_peak_bytes: int  # … of which unreclaimable: what the measured estimate is compared with
    peak: PeakMemory = field(default_factory=PeakMemory)  # the bounds of the largest job
    limit_bytes: int | None = None
    phase: str | None = None  # where it ended, if not finished
    error: str | None = None
    jobs: int = 0
    steps: int = 0  # of each job
    seconds: float | None = None  # of all jobs together

    @property
    def survived(self) -> bool:
        return self.outcome == FINISHED

    @property
    def decided(self) -> bool:
        """Whether it says anything about memory: a device out of reach does not."""
        return self.survived or self.outcome in TOO_LARGE

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        return cls(**{**_known(cls, data), "peak": PeakMemory(**data["peak"])})


@dataclass(frozen=True)
class FrontierPoint:
    """How far one device goes along one axis with one method; the other axes stand as `held` says.

    Values of the axis `submodel` count blocks where the method's choices differ in them, and else the choices, the
    smallest being 1.
    """

    device: str
    kind: str
    profile: str
    accelerator: str
    threads: int
    budget_bytes: int
    axis: str
    unit: str  # "blocks", "choices", "examples" or "tokens"
    held: Mapping[str, Any]  # the other axes: {"submodel": "3 of 12 blocks", "batch_size": 16}
    limit: int  # the largest value there is
    limited_by: str  # MEMORY; MODEL or CEILING where the plan admits the limit, and the budget would hold more
    predicted: int | None = None  # None: not even the smallest
    predicted_bytes: int | None = None  # what the plan says that it needs
    predicted_text: str | None = None
    edge: int | None = None
    edge_bytes: int | None = None  # predicted unreclaimable memory there
    needed_bytes: int | None = None  # of the smallest value, where the plan refuses that
    refusal: str | None = None
    trials: tuple[Trial, ...] = ()  # in the order in which they were made
    exact: bool = False  # nothing lies between what survived and what did not, or what survived is all there is
    same_as: str | None = None  # the device of like profile and budget that was asked in its place

    @property
    def confirmed(self) -> int | None:
        """The largest value that survived the cap, below the smallest that did not; None: none, or nothing tried."""
        refuted = self.refuted
        survived = [trial.value for trial in self.trials if trial.survived]
        return max((value for value in survived if refuted is None or value < refuted), default=None)

    @property
    def refuted(self) -> int | None:
        """The smallest value that was too large; None: none was, or nothing was tried."""
        return min((trial.value for trial in self.trials if trial.outcome in TOO_LARGE), default=None)

    @property
    def measured(self) -> Trial | None:
        """The trial of the confirmed value."""
        return self.trial_of(self.confirmed)

    @property
    def measured_peak(self) -> PeakMemory | None:
        """The peak of the confirmed value: three bounds, each with its source."""
        return self.measured.peak if self.measured is not None else None

    @property
    def bytes_error(self) -> float | None:
        """Predicted over measured unreclaimable memory at the confirmed value, less 1; None without a measurement."""
        measured = self.measured
        if measured is None or not measured.peak.estimate_bytes:
            return None
        return measured.predicted_peak_bytes / measured.peak.estimate_bytes - 1

    @property
    def jobs(self) -> int:
        return sum(trial.jobs for trial in self.trials)

    def trial_of(self, value: int | None) -> Trial | None:
        """The newest trial of a value."""
        return next((trial for trial in reversed(self.trials) if trial.value == value), None)

    def to_json(self) -> dict[str, Any]:
        """With what follows from the trials, for whoever reads the file without this class."""
        names = ("confirmed", "refuted", "measured_peak", "bytes_error", "jobs")
        derived = {name: getattr(self, name) for name in names}
        peak = derived["measured_peak"]
        return {**asdict(self), **derived, "measured_peak": asdict(peak) if peak is not None else None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FrontierPoint:
        return cls(**{**_known(cls, data), "trials": tuple(map(Trial.from_json, data["trials"]))})


@dataclass(frozen=True)
class Frontier:
    """What one method's frontier is on the devices that were asked."""

    id: str
    made: str  # when it last changed, ISO 8601, UTC
    method: str
    settings: Mapping[str, Any]
    model: str
    task: str
    work: Mapping[str, Any]  # fields of method.Workload, as a run with the same options has them
    inventory: str  # the file
    versions: Mapping[str, Any]  # testbed.environment.describe_environment
    points: tuple[FrontierPoint, ...] = ()

    def point(self, device: str, axis: str) -> FrontierPoint | None:
        return next((point for point in self.points if (point.device, point.axis) == (device, axis)), None)

    def with_point(self, point: FrontierPoint) -> Frontier:
        """The same with this point, in the place of the device's former one on that axis."""
        kept = [known for known in self.points if (known.device, known.axis) != (point.device, point.axis)]
        return replace(self, points=(*kept, point))

    def only(self, devices: Iterable[str], axes: Sequence[str]) -> Frontier:
        """The points of these devices and axes, in that order."""
        found = (self.point(device, axis) for device in devices for axis in axes)
        return replace(self, points=tuple(point for point in found if point is not None))

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "points": [point.to_json() for point in self.points]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Frontier:
        return cls(**{**_known(cls, data), "points": tuple(map(FrontierPoint.from_json, data["points"]))})


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def save(frontier: Frontier, runs_dir: Path) -> Path:
    """Write the record, whole or not at all; raises StoreError where it cannot be written."""
    path = path_of(runs_dir, frontier.id)
    with disk_errors_in_words(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, frontier.to_json())
    return path


def load(path: Path) -> Frontier:
    """The record in a file; raises StoreError with the way out for one that is no record of this version."""
    data = read_json(path)
    try:
        return Frontier.from_json(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path}: not a frontier that this version can read ({type(error).__name__}: {error}); remove it, and "
            f"`testbed frontier` finds it again"
        ) from None


def all_frontiers(runs_dir: Path) -> list[Frontier]:
    """Every record of a runs folder, by name; none where there is no such folder."""
    return [load(path) for path in sorted((runs_dir / FOLDER).glob("*.json")) if not path.name.startswith(".")]


def path_of(runs_dir: Path, frontier_id: str) -> Path:
    return runs_dir / FOLDER / f"{frontier_id}.json"


def _known(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {each.name for each in fields(cls)}
    return {name: value for name, value in data.items() if name in names}
