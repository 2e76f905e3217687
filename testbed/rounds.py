"""The round loop: draw, order, deploy and send, receive, combine, evaluate, checkpoint.

State goes through here from round to round and is never looked into.  A run killed at any moment resumes from its last
checkpoint; jobs are the same for the same seed, so the end is the same, bit for bit.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from testbed.disturbances import CALM, Weather
from testbed.errors import PlanError, WireError
from testbed.evaluate import evaluate
from testbed.job import FAILED, OUT_OF_MEMORY, Job, Result
from testbed.method import EVALUATE, Client, Method, Order, State, Workload
from testbed.plan import refit
from testbed.run import ClientPlan, Plan, RunConfig
from testbed.stopping import Stopping
from testbed.task import Quality
from testbed.updates import SpooledUpdate, check_finite, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.live import Watcher
    from testbed.model.checkpoint import BaseModel, ContentStore
    from testbed.model.footprint import Baseline
    from testbed.store import RunFolder
    from testbed.task import Shard

#: Rounds in a row in which nobody finished, after which a run is given up.
_HOPELESS_ROUNDS = 2


class JobRunner(Protocol):
    """Something that takes jobs and yields results: the engine of `testbed.engine`, or another one."""

    @property
    def deployed_bytes(self) -> int:
        """What devices were sent so far that they lacked: code, configuration, blocks and shards."""

    def run(self, jobs: Sequence[tuple[str, Job, Path | None]]) -> Iterator[tuple[Result, Path | None]]: ...


@dataclass
class Run:
    """All that the loop works with, settled by `testbed.prepare` before it starts."""

    folder: RunFolder
    config: RunConfig
    plan: Plan
    method: Method
    base: BaseModel
    store: ContentStore
    work: Workload
    shards: Sequence[str]  # content hash of every client's shard
    held_out: Shard
    baselines: Mapping[str, Baseline]
    engine: JobRunner
    watcher: Watcher
    accelerators: Mapping[str, str] = field(default_factory=dict)  # device → "cuda", where it has one
    complete: Callable[[Result], Result] = lambda result: result  # adds what the controller measured itself
    weather: Weather = CALM  # what the jobs of its rounds undergo


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds: the method's state, and what the loop itself must remember."""

    state: State
    next_round: int = 0
    kept: Mapping[str, str] = field(default_factory=dict)  # client → hash of the state it keeps on its node
    refitted: tuple[ClientPlan, ...] = ()
    empty_rounds: int = 0


def federate(run: Run) -> State:
    """Run all rounds that are left; returns the last state.  Raises PlanError when nobody is left to train."""
    progress = _resume(run) or _start(run)
    _warm_up(run, progress)
    stopping = Stopping(run.config.until, run.folder)
    while not stopping.ended(progress.next_round, last=progress.next_round >= run.config.rounds):
        progress = _round(run, progress)
    return progress.state


def _start(run: Run) -> Progress:
    clients = [client.client() for client in run.plan.taking_part]
    state = run.method.start(run.base, run.work, clients, run.config.seed, run.config.rounds)
    run.folder.record_initial_state(state)
    quality = _evaluate(run, state)
    run.folder.record_reference(no_fine_tuning=quality.accuracy, no_fine_tuning_loss=quality.loss)
    return Progress(state)


def _warm_up(run: Run, progress: Progress) -> None:
    """Jobs that count for nothing, so that caches, clocks and boards are as warm as they will be."""
    if not run.config.warm_up or progress.next_round >= run.config.rounds:
        return
    state = run.method.begin(progress.state, run.base, progress.next_round)
    first = {
        plan.device: plan for plan in reversed(_current_plans(run.plan, progress.refitted).values()) if plan.planned
    }
    clients = [plan.client() for plan in first.values() if run.method.admits(state, run.base, plan.client())]
    orders = run.method.order(state, run.base, sorted(clients, key=lambda client: client.index), progress.next_round)
    payloads = dict[int, Path]()
    sent = []
    for order, number in itertools.product(orders, range(run.config.warm_up)):
        job = _job(run, progress, order, learning_rate(run.config, progress.next_round))
        job = replace(job, id=f"{job.id}-warm-up-{number}")
        sent.append(
            (
                _current_plans(run.plan, progress.refitted)[order.client].device,
                job,
                _payload(run, job, order.tensors, payloads),
            )
        )
    for result, path in run.engine.run(sent):
        run.watcher.job_ended(replace(result, scalars={}))
        if path is not None:
            path.unlink(missing_ok=True)


def _resume(run: Run) -> Progress | None:
    saved = run.folder.load_checkpoint()
    if saved is None:
        return None
    state, next_round, extra = saved
    refitted = tuple(ClientPlan.from_json(client) for client in extra["refitted"])
    return Progress(state, next_round, extra["kept"], refitted, extra["empty_rounds"])


def _round(run: Run, progress: Progress) -> Progress:
    """One round.  Whatever happens to a client ends as its result; the round goes on without it."""
    index, began = progress.next_round, time.monotonic()
    rate = learning_rate(run.config, index)
    before, progress = progress, replace(progress, state=run.method.begin(progress.state, run.base, index))
    participants = _draw(run, progress)
    run.watcher.round_started(index, len(participants), rate)
    orders = run.method.order(progress.state, run.base, participants, index)
    results, updates, deployed = _carry_out(run, progress, orders, rate)
    progress = _combine(run, before, progress, results, updates)
    last = index + 1 == run.config.rounds
    evaluation_began = time.monotonic()
    asked = last or bool(run.config.until) or (index + 1) % run.config.evaluate_every == 0
    quality = _quality(run, progress, index) if asked else None
    evaluation_seconds = time.monotonic() - evaluation_began
    if quality is not None:
        run.watcher.evaluated(index, quality)
    run.folder.record_round(
        index,
        seconds=time.monotonic() - began,
        learning_rate=rate,
        participants=len(orders),
        finished=len(updates),
        deployed_bytes=deployed,
        train_loss=_mean_loss(updates),
        quality=quality,
        evaluation_seconds=evaluation_seconds,
    )
    _checkpoint(run, progress)
    run.folder.forget_updates(index)
    return progress


# ── 1. who takes part ────────────────────────────────────────────────────────────────────────────────────────────────
def learning_rate(config: RunConfig, index: int) -> float:
    """The rate of a round: constant within it; over rounds constant, or a cosine from the first to the final one."""
    if config.schedule == "constant" or config.rounds == 1:
        return config.learning_rate
    share = index / (config.rounds - 1)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * (1 + math.cos(math.pi * share)) / 2


def draw_participants(config: RunConfig, clients: Sequence[int], able: Sequence[int], index: int) -> list[int]:
    """The clients of a round, by seed: the same order of all clients for every method, less those who cannot."""
    order = Random(f"{config.seed}/participants/{index}").sample(clients, len(clients))
    return sorted([client for client in order if client in set(able)][: config.participants_of(len(clients))])


def _draw(run: Run, progress: Progress) -> list[Client]:
    plans = _current_plans(run.plan, progress.refitted)
    planned = [client.client() for client in plans.values() if client.planned]
    if not planned:
        raise PlanError("no client is left that can train: " + "; ".join(str(c.reason) for c in plans.values()))
    able = [client.index for client in planned if run.method.admits(progress.state, run.base, client)]
    chosen = draw_participants(run.config, list(plans), able, progress.next_round)
    return [plans[index].client() for index in chosen]


def _current_plans(plan: Plan, refitted: Sequence[ClientPlan]) -> dict[int, ClientPlan]:
    return {client.index: client for client in (*plan.clients, *refitted)}


# ── 2. jobs out, results back ────────────────────────────────────────────────────────────────────────────────────────
def _carry_out(
    run: Run, progress: Progress, orders: Sequence[Order], rate: float
) -> tuple[list[Result], list[SpooledUpdate], int]:
    """Send every order as a job; returns all results, the usable updates in client order, and the bytes deployed.

    A job's contents are deployed on its own way: a device over a thin link keeps no other waiting.

    Results that were stored before the controller was killed are not asked for again.
    """
    plans = _current_plans(run.plan, progress.refitted)
    jobs = {job.id: job for job in (_disturbed(run, _job(run, progress, order, rate)) for order in orders)}
    tensors = {_job_id(run, progress.next_round, order): order.tensors for order in orders}
    results, paths = _stored(run, jobs)
    for result in results:
        run.watcher.job_ended(result)
    waiting = [job for job in jobs.values() if job.id not in {result.job for result in results}]
    deployed_before = run.engine.deployed_bytes
    payloads: dict[int, Path] = {}
    sent = [(plans[job.client].device, job, _payload(run, job, tensors[job.id], payloads)) for job in waiting]
    for received, path in run.engine.run(sent):
        result = run.complete(_checked(run, progress.state, received, path))
        run.folder.record_result(result)
        run.watcher.job_ended(result)
        results.append(result)
        if path is not None:
            paths[result.job] = path
    finished = sorted((result for result in results if result.finished), key=lambda result: result.client)
    return (
        results,
        [SpooledUpdate(result, paths[result.job]) for result in finished],
        (run.engine.deployed_bytes - deployed_before),
    )


def _payload(run: Run, job: Job, tensors: Mapping[str, Tensor], written: dict[int, Path]) -> Path | None:
    """The file of a job's tensors, if it has any; what several clients are sent alike is written once."""
    if tensors and id(tensors) not in written:
        written[id(tensors)] = write_tensors(tensors, run.folder.payload_path(job.id))
    return written.get(id(tensors))


def _stored(run: Run, jobs: Mapping[str, Job]) -> tuple[list[Result], dict[str, Path]]:
    """Results of these jobs from before the controller was killed; one whose update is gone must be had again."""
    results, paths = [], {}
    for result in run.folder.results():
        path = run.folder.update_path(result.job)
        if result.job in jobs and (path.exists() or not result.finished):
            results.append(result)
            paths[result.job] = path
    return results, paths


def _job(run: Run, progress: Progress, order: Order, rate: float) -> Job:
    device = _current_plans(run.plan, progress.refitted)[order.client].device
    return Job(
        id=_job_id(run, progress.next_round, order),
        run=run.folder.run_id,
        round=progress.next_round,
        client=order.client,
        kind=order.kind,
        method=run.config.method,
        settings=run.config.settings,
        config=run.base.config_hash,
        outside=run.base.outside,
        submodel=run.base.fill_in(order.submodel),
        shard=run.shards[order.client],
        work=replace(run.work, accelerator=run.accelerators.get(device, "cpu")),
        steps=run.config.steps,
        learning_rate=rate,
        seed=run.config.seed,
        scalars=order.scalars,
        state=progress.kept.get(str(order.client)),
        further=order.contents,
        reads_base=order.reads_base,
    )


def _disturbed(run: Run, job: Job) -> Job:
    """A round's job, with what it shall undergo; a warm-up and an evaluation undergo nothing."""
    return replace(job, disturbances=run.weather.for_job(job.round, job.client))


def _job_id(run: Run, index: int, order: Order) -> str:
    return f"{run.folder.run_id}-r{index}-c{order.client}"


def _checked(run: Run, state: State, result: Result, path: Path | None) -> Result:
    """The result itself, or a failed one when its update must not be combined."""
    if not result.finished:
        return result
    if path is None:
        return replace(result, outcome=FAILED, phase="send", error="the update did not arrive")
    try:
        update = SpooledUpdate(result, path)
        run.method.verify(state, update)
        check_finite(update)
    except WireError as error:
        return replace(result, outcome=FAILED, phase="combine", error=str(error))
    return result


# ── 3. combine, evaluate, checkpoint ─────────────────────────────────────────────────────────────────────────────────
def _combine(
    run: Run, before: Progress, progress: Progress, results: Sequence[Result], updates: Sequence[SpooledUpdate]
) -> Progress:
    """The progress after this round: too few updates leave the state as it was before it began.

    A round in which the method asked nobody is none in which everybody failed.
    """
    empty = progress.empty_rounds + 1 if results and not updates else 0
    if results and all(result.dropped_out for result in results):
        empty = progress.empty_rounds  # that was declared, and says nothing of the rounds to come
    if empty >= _HOPELESS_ROUNDS:
        causes = "; ".join(sorted({f"{result.outcome}: {result.error}" for result in results}))
        raise PlanError(f"no client finished in {empty} rounds in a row ({causes}); testbed report shows each job")
    state = before.state
    if updates and len(updates) >= run.config.min_participants:
        state = run.method.combine(progress.state, run.base, updates)
    kept = {str(result.client): result.state for result in results if result.finished and result.state}
    return replace(
        progress,
        state=state,
        next_round=progress.next_round + 1,
        kept={**progress.kept, **kept},
        refitted=_refitted(run, progress, results),
        empty_rounds=empty,
    )


def _refitted(run: Run, progress: Progress, results: Sequence[Result]) -> tuple[ClientPlan, ...]:
    """With `--refit`, a smaller submodel for every client that ran out of memory."""
    if not run.config.refit:
        return progress.refitted
    plans = _current_plans(run.plan, progress.refitted)
    refitted = {client.index: client for client in progress.refitted}
    for result in results:
        if result.outcome == OUT_OF_MEMORY:
            client = plans[result.client]
            peak = result.measurement.peak
            measured = peak.estimate_bytes or peak.upper_bytes or client.budget_bytes
            work = replace(run.work, accelerator=run.accelerators.get(client.device, "cpu"))
            smaller = refit(run.method, run.base.shape, work, client, run.baselines[client.device], measured)
            refitted[client.index] = smaller
            run.folder.record_refit(progress.next_round + 1, smaller.to_json())
    return tuple(refitted.values())


def _evaluate(run: Run, state: State) -> Quality:
    return evaluate(run.method, run.base, state, run.work, run.held_out)


def _quality(run: Run, progress: Progress, index: int) -> Quality | None:
    """Of the global model; of a method with personal ones, the mean over the clients' own, told by their devices.

    None where none of them answers.
    """
    plans = _current_plans(run.plan, progress.refitted)
    clients = [plan.client() for plan in plans.values() if plan.planned and str(plan.index) in progress.kept]
    orders = run.method.evaluations(progress.state, run.base, clients)
    if not orders:
        return _evaluate(run, progress.state)
    shard, payloads = _held_out_content(run), dict[int, Path]()
    jobs = {order.client: _evaluation_job(run, progress, index, order, shard) for order in orders}
    sent = [
        (plans[order.client].device, jobs[order.client], _payload(run, jobs[order.client], order.tensors, payloads))
        for order in orders
    ]
    told = []
    for received, _ in run.engine.run(sent):
        result = run.complete(received)
        run.folder.record_result(result)
        figures = [result.scalars.get(name) for name in ("loss", "accuracy")]
        if result.finished and all(isinstance(figure, (int, float)) for figure in figures):
            told.append((result.client, *figures))
    if not told:
        return None
    _, losses, accuracies = zip(*sorted(told), strict=True)
    return Quality(sum(losses) / len(told), sum(accuracies) / len(told), len(run.held_out))


def _evaluation_job(run: Run, progress: Progress, index: int, order: Order, shard: str) -> Job:
    """A job after the round's own, whose shard is the held-out set."""
    job = _job(run, replace(progress, next_round=index), replace(order, kind=EVALUATE), 0.0)
    return replace(job, id=f"{job.id}-{EVALUATE}", shard=shard)


def _held_out_content(run: Run) -> str:
    """The held-out set as devices are sent it: by hash, like everything that they keep."""
    partial = run.store.folder / "held-out.partial"
    run.held_out.save(partial)
    return run.store.put_file(partial)


def _checkpoint(run: Run, progress: Progress) -> None:
    extra: dict[str, Any] = {
        "kept": dict(progress.kept),
        "refitted": [client.to_json() for client in progress.refitted],
        "empty_rounds": progress.empty_rounds,
    }
    run.folder.save_checkpoint(progress.state, progress.next_round, extra)


def _mean_loss(updates: Sequence[SpooledUpdate]) -> float | None:
    """Examples-weighted mean of the clients' training losses, where their method reports one."""
    losses = [(update.scalars["loss"], update.examples) for update in updates if "loss" in update.scalars]
    total = sum(examples for _, examples in losses)
    return sum(loss * examples for loss, examples in losses) / total if total else None
