"""Real jobs of one method on one device under its cap, as a run sends them: what a frontier is confirmed with.

A trial has one client and follows the method's own rounds, each job of several local steps on batches that are as large
and as long as they can be.  It ends when every phase of the prediction has been measured, when the rounds are
over, or with the first job that does not finish.  Every trial has an agent and a trainer of its own: what an earlier
one left behind changes nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.engine import Engine
from testbed.errors import LimitError
from testbed.frontier.axes import Asked, Axis, Ground
from testbed.frontier.record import Trial
from testbed.job import FAILED, Job, Result
from testbed.measurement import PeakMemory
from testbed.method import CAUSAL_LM, IMAGE_CLASSIFICATION, Client, Order, State
from testbed.session import node_settings
from testbed.task import Example, Shard
from testbed.updates import SpooledUpdate, write_tensors

if TYPE_CHECKING:
    from testbed.data import DataSet
    from testbed.inventory import Device
    from testbed.model.footprint import Footprint
    from testbed.prepare import Prepared

#: The second step is the first that holds the optimizer's moments; the allocator's holes grow for a few more.  Of five
#: frontiers found with 2 steps, two were killed within 4; from 8 to 32 nothing changed (docs/frontier.md).
SETTLING_STEPS = 8


@dataclass(frozen=True)
class Site:
    """What the trials of one device have in common."""

    prepared: Prepared
    device: Device
    folder: Path  # for this time only
    run: str  # what the device is told that it is held by
    steps: int = SETTLING_STEPS  # of each job


@contextmanager
def emptied(folder: Path) -> Iterator[None]:
    """A folder for this time only, empty before and gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def attempt(place: Site, ground: Ground, axis: Axis, value: int, footprint: Footprint) -> Trial:
    """Do the jobs of one value.  Raises DeviceError for a device out of reach, LimitError where nothing can be capped.

    Whatever becomes of a job is the trial's outcome.
    """
    asked = axis.asked(value)
    names = {phase.name for phase in footprint.phases}
    settings = node_settings(place.prepared, place.run, place.folder / "nodes")
    others = tuple(device for device in place.prepared.inventory if device.name != place.device.name)
    with Engine(
        [replace(place.device, meters=())],  # no figure of a trial is an energy
        place.folder,
        place.run,
        content_path=place.prepared.store.path,
        settings=replace(settings, capped=True, telemetry_seconds=None, others=others),
        job_timeout_seconds=place.prepared.config.job_timeout_seconds,
    ) as engine:
        try:
            engine.hold()
            results = list(_until_settled(_Rounds(place, ground, asked, value), engine, names))
        except LimitError as error:
            raise LimitError(
                f"{place.device.name}: a frontier is confirmed under a real cap, and there is none here: {error}. "
                f"Without --confirm nothing is capped: the frontier is predicted"
            ) from None
    return replace(_trial(value, axis.words(value), footprint, results), steps=place.steps)


def _trial(value: int, text: str, footprint: Footprint, results: list[Result]) -> Trial:
    """What the jobs came to; a method that asks for none has failed to say anything."""
    last = results[-1] if results else Result("", 0, 0, FAILED, error="the method asked for no job")
    peaks = [result.measurement.peak for result in results]
    times = [seconds for result in results if (seconds := result.measurement.seconds) is not None]
    return Trial(
        value=value,
        text=text,
        outcome=last.outcome,
        predicted_bytes=footprint.bytes,
        predicted_peak_bytes=footprint.unreclaimable_bytes,
        peak=max(peaks, key=lambda peak: peak.estimate_bytes or 0, default=PeakMemory()),
        limit_bytes=last.measurement.limit_bytes,
        phase=last.phase,
        error=last.error,
        jobs=len(results),
        seconds=sum(times) if times else None,
    )


# ── the rounds of one client ─────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class _Rounds:
    place: Site
    ground: Ground
    asked: Asked
    value: int

    @property
    def count(self) -> int:
        return self.place.prepared.config.rounds

    def job(self, order: Order, index: int, shard: str, kept: str | None) -> Job:
        """What a run would send, but for the shard and the number of steps."""
        base, config = self.place.prepared.base, self.place.prepared.config
        return Job(
            id=f"{self.place.run}-{self.value}-r{index}",
            run=self.place.run,
            round=index,
            client=0,
            kind=order.kind,
            method=config.method,
            settings=config.settings,
            config=base.config_hash,
            outside=base.outside,
            submodel=base.fill_in(order.submodel),
            shard=shard,
            work=self.asked.work,
            steps=self.place.steps,
            learning_rate=config.learning_rate,
            seed=config.seed,
            scalars=order.scalars,
            state=kept,
            further=order.contents,
            reads_base=order.reads_base,
        )


def _until_settled(rounds: _Rounds, engine: Engine, names: set[str]) -> Iterator[Result]:
    """The results, round by round; `names`: the phases that are to be measured."""
    prepared, method = rounds.place.prepared, rounds.ground.method
    full = filled_shard(prepared.data, rounds.asked.work.batch_size, rounds.asked.work.length)
    shard, kept, unseen = _stored(prepared, full), None, set(names)
    client = Client(0, rounds.place.device.name, len(full), rounds.asked.submodel, full.label_counts)
    state = method.start(prepared.base, rounds.asked.work, [client], prepared.config.seed, rounds.count)
    for index in range(rounds.count):
        state = method.begin(state, prepared.base, index)
        able = [client] if method.admits(state, prepared.base, client) else []
        for order in method.order(state, prepared.base, able, index) if able else ():
            job = rounds.job(order, index, shard, kept)
            [(result, path)] = engine.run([(rounds.place.device.name, job, _payload(rounds.place, order, job))])
            yield result
            if not result.finished or path is None:
                return
            unseen -= {phase.name for phase in result.measurement.phases}
            if not unseen:
                return
            kept = result.state or kept
            state = _combined(rounds, state, result, path)


def _combined(rounds: _Rounds, state: State, result: Result, path: Path) -> State:
    update = SpooledUpdate(result, path)
    state = rounds.ground.method.combine(state, rounds.place.prepared.base, [update])
    path.unlink()
    return state


def _payload(place: Site, order: Order, job: Job) -> Path | None:
    return write_tensors(order.tensors, place.folder / f"{job.id}.safetensors") if order.tensors else None


# ── the largest batch there can be ───────────────────────────────────────────────────────────────────────────────────
def filled_shard(data: DataSet, batch_size: int, length: int) -> Shard:
    """One batch of the run's own examples, as many as asked; of texts, the first one is as long as asked.

    Examples are repeated, and texts go on with the next ones, where the data have too few or too short ones.  The
    other texts end a token earlier, so that the batch has padding as batches of a run have.
    """
    count = len(data.train)
    if data.task == IMAGE_CLASSIFICATION:
        chosen = [data.train[place % count] for place in range(batch_size)]
    else:
        chosen = [_text(data, place, length if place == 0 else max(1, length - 1)) for place in range(batch_size)]
    return Shard.of(chosen, data.task, len(data.classes), data.scale)


def _text(data: DataSet, place: int, length: int) -> Example:
    count, ids = len(data.train), list[int]()
    first = data.train[place % count]
    while len(ids) < length:
        ids += data.train[place % count].ids
        place += 1
    return Example(ids[:length], label=None if data.task == CAUSAL_LM else first.label)


def _stored(prepared: Prepared, shard: Shard) -> str:
    partial = prepared.store.folder / f"frontier-{os.getpid()}.partial"
    shard.save(partial)
    return prepared.store.put_file(partial)
