"""Find the memory frontier of devices with one method: predicted, and where asked confirmed by bisection.

RunConfig, Inventory ─► find_frontier ─► Frontier        (kept after every trial; the same call goes on)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.environment import describe_environment
from testbed.errors import LimitError, UsageError
from testbed.frontier.axes import Axis, Ground, Predicted, axis_of, predicted_point
from testbed.frontier.record import AXES, FOLDER, LENGTH, Frontier, FrontierPoint, Trial, load, path_of, save
from testbed.frontier.search import MOST_TRIALS, bracket, next_trial
from testbed.frontier.trials import SETTLING_STEPS, Site, attempt, emptied
from testbed.inventory import Budget, Device, Inventory
from testbed.method import IMAGE_CLASSIFICATION
from testbed.model.prompt import longest_text
from testbed.prepare import Prepared, prepare
from testbed.quantities import bytes_text

if TYPE_CHECKING:
    from testbed.run import RunConfig

#: What every device is given while all but its plan is settled: one that holds nothing has a frontier too.
_BOUNDLESS = Budget(1 << 60)


@dataclass(frozen=True)
class Search:
    """How a frontier is looked for.

    say     a line about what takes its time
    tried   a point whose newest trial has just ended
    """

    axes: Sequence[str] = AXES
    confirm: bool = False
    fresh: bool = False  # every trial is made again
    steps: int = SETTLING_STEPS  # of each job, for its memory to settle
    say: Callable[[str], None] = lambda _: None
    tried: Callable[[FrontierPoint], None] = lambda _: None


def find_frontier(config: RunConfig, inventory: Inventory, runs_dir: Path, search: Search | None = None) -> Frontier:
    """The frontier of the inventory's devices, in their order; kept in `runs_dir` after every trial.

    Devices of one profile, budget, kind and accelerator are asked once.  Raises a TestbedError for what the user must
    change; what was measured until then is kept.
    """
    search = search or Search()
    if search.confirm:
        check_room(inventory)
    prepared = _settled(config, inventory, search)
    axes = _axes(search, prepared)
    _check_length(prepared, axes)
    kept = _Record(prepared, inventory, runs_dir)
    asked: dict[tuple[object, ...], str] = {}
    for device in inventory:
        first = asked.setdefault(_likeness(device), device.name)
        for name in axes:
            like = kept.frontier.point(first, name) if first != device.name else None
            if like is not None:
                kept.put(replace(like, device=device.name, same_as=first))
            else:
                _find(kept, _ground(prepared, device), name, search)
    return kept.frontier.only([device.name for device in inventory], axes)


def check_room(inventory: Inventory) -> None:
    """Raise LimitError for a device that is emulated here with more memory than this machine has free."""
    free = available_bytes()
    large = [each.name for each in inventory if each.access is None and each.budget.memory_bytes > free]
    if large:
        raise LimitError(
            f"{', '.join(large)}: emulated here with a budget beyond the {bytes_text(free)} that are free here; "
            f"leave it out (--only), or find its frontier without --confirm"
        )


def available_bytes() -> int:
    """What this machine has free, by its kernel's own word."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def _settled(config: RunConfig, inventory: Inventory, search: Search) -> Prepared:
    """Method, model, data and baselines, as a run has them; the plan of it is of no use here."""
    roomy = tuple(replace(device, budget=_BOUNDLESS, clients=1) for device in inventory)
    return prepare(config, replace(inventory, devices=roomy), search.say)


def _axes(search: Search, prepared: Prepared) -> tuple[str, ...]:
    chosen = tuple(axis for axis in AXES if axis in search.axes)
    if prepared.work.task != IMAGE_CLASSIFICATION or LENGTH not in chosen:
        return chosen
    if set(chosen) != set(AXES):
        raise UsageError("--vary length: images have no length; leave it out")
    return tuple(axis for axis in chosen if axis != LENGTH)


def _check_length(prepared: Prepared, axes: Sequence[str]) -> None:
    """Raise UsageError for a length at which the model has no positions, where it is not what varies."""
    most = None if prepared.work.task == IMAGE_CLASSIFICATION else longest_text(prepared.base.shape, prepared.work)
    if most is not None and prepared.work.length > most and set(axes) != {LENGTH}:
        asked = prepared.work.length
        raise UsageError(f"--length {asked}: this model takes up to {most} tokens; give it so many or fewer")


def _ground(prepared: Prepared, device: Device) -> Ground:
    work = replace(prepared.work, accelerator=device.accelerator)
    return Ground(prepared.method, prepared.base.shape, work, device, prepared.baselines[device.name])


def _likeness(device: Device) -> tuple[object, ...]:
    """What is alike in devices that hold the same; of emulated ones it is their machine, too."""
    machine = device.access.host if device.access is not None and device.kind == "emulated" else None
    return device.kind, device.profile, device.budget.memory_bytes, device.accelerator, device.threads, machine


# ── one device, one axis ─────────────────────────────────────────────────────────────────────────────────────────────
def _find(kept: _Record, ground: Ground, name: str, search: Search) -> None:
    search.say(f"{ground.device.name}: predicting the largest {name.replace('_', ' ')}")
    axis = axis_of(name, ground)
    predicted = Predicted(ground, axis)
    known = None if search.fresh else kept.frontier.point(ground.device.name, name)
    point = _with_known(predicted_point(ground, axis, predicted), known, axis, search.steps)
    kept.put(point)
    if not search.confirm:
        return
    place = Site(kept.prepared, ground.device, kept.scratch, kept.frontier.id, search.steps)
    with emptied(place.folder):
        for trial in _trials(place, point, predicted, search):
            point = _with_trial(point, trial, axis)
            kept.put(point)
            search.tried(point)


def _trials(place: Site, point: FrontierPoint, predicted: Predicted, search: Search) -> Iterator[Trial]:
    """One after the other until the frontier is known, or a job ended in a way that says nothing about memory."""
    axis = predicted.axis
    survived = _survived(point)
    while (value := next_trial(axis.values, survived, predicted.within)) is not None:
        made = f"trial {len(survived) + 1} of at most {MOST_TRIALS}"
        search.say(f"{point.device}: {axis.name.replace('_', ' ')}, {made}: {axis.words(value)}")
        trial = attempt(place, predicted.ground, axis, value, predicted.of(value))
        yield trial
        if not trial.decided:
            return
        survived[value] = trial.survived


def _survived(point: FrontierPoint) -> dict[int, bool]:
    return {trial.value: trial.survived for trial in point.trials if trial.decided}


def _with_trial(point: FrontierPoint, trial: Trial, axis: Axis) -> FrontierPoint:
    trials = (*(known for known in point.trials if known.value != trial.value), trial)
    return _told_exact(replace(point, trials=trials), axis)


def _told_exact(point: FrontierPoint, axis: Axis) -> FrontierPoint:
    survived = _survived(point)
    low, high = bracket(axis.values, survived)
    return replace(point, exact=bool(survived) and high - low == 1)


def _with_known(point: FrontierPoint, known: FrontierPoint | None, axis: Axis, steps: int) -> FrontierPoint:
    """With the trials of the same question that were made before, unless they survived fewer steps."""
    if known is None or known.same_as is not None or _question(known) != _question(point):
        return point
    trials = tuple(trial for trial in known.trials if trial.decided and (not trial.survived or trial.steps >= steps))
    return _told_exact(replace(point, trials=trials), axis)


def _question(point: FrontierPoint) -> tuple[object, ...]:
    device = (point.kind, point.profile, point.accelerator, point.threads, point.budget_bytes)
    return (*device, point.axis, point.unit, point.limit, dict(point.held))


# ── the record ───────────────────────────────────────────────────────────────────────────────────────────────────────
class _Record:
    """The frontier so far, and its file."""

    def __init__(self, prepared: Prepared, inventory: Inventory, runs_dir: Path) -> None:
        self.prepared, self._runs_dir = prepared, runs_dir
        new = _new(prepared, inventory)
        path = path_of(runs_dir, new.id)
        known = load(path).points if path.is_file() else ()
        self.frontier = replace(new, points=known)
        self.scratch = runs_dir / FOLDER / f"{new.id}.trials"

    def put(self, point: FrontierPoint) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.frontier = replace(self.frontier.with_point(point), made=now)
        save(self.frontier, self._runs_dir)


def _new(prepared: Prepared, inventory: Inventory) -> Frontier:
    """A record without points; its id is made of all that decides them but the devices."""
    config = prepared.config
    versions = describe_environment(prepared.base.outside, prepared.data.sha256)
    frontier = Frontier(
        id="",
        made="",
        method=config.method,
        settings=dict(config.settings),
        model=str(config.model),
        task=prepared.work.task,
        work=asdict(prepared.work),
        inventory=inventory.source,
        versions=versions,
    )
    question = {
        **frontier.to_json(),
        "versions": [versions["packages"], versions["python"], versions["model"], prepared.base.config_hash],
        "rounds": config.rounds,
    }
    key = hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return replace(frontier, id=f"{config.method}-{key}")
