"""Every figure of a run, derived again from its folder: never from the index, never from a watcher.

`summarise` gives plain dataclasses; `testbed.report_tables` prints them.  `None` means not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from testbed.costs import round_costs
from testbed.energy_summary import EnergySummary, device_energy, run_energy
from testbed.job import REFUSED, Result
from testbed.run_record import finite, name_of
from testbed.stopping import first_reaching

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from testbed.run_record import RoundRecord
    from testbed.store import RunFolder

#: Phases of every job, whatever its method; all others are the method's own work.
PLUMBING = frozenset({"receive", "load", "send", "idle"})


@dataclass(frozen=True)
class Reference:
    """What the quality stands beside."""

    majority: float | None = None
    bag_of_words: float | None = None
    no_fine_tuning: float | None = None


@dataclass(frozen=True)
class Target:
    """When the accuracy reached `accuracy` for the first time; None: it did not."""

    accuracy: float
    rounds: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Refusal:
    """A client that the plan, or its node, let take no part."""

    client: int
    device: str
    reason: str | None
    needed_bytes: int | None = None
    budget_bytes: int | None = None


@dataclass(frozen=True)
class Failure:
    """A job that did not finish."""

    client: int
    device: str
    round: int
    outcome: str
    phase: str | None
    error: str | None


@dataclass(frozen=True)
class DeviceSummary:
    """One device over all jobs of its clients.

    peak_median_bytes and peak_worst_bytes are estimates over the finished jobs; the bounds are those of the worst job,
    and the prediction error is prediction / worst peak - 1 for that job (positive: predicted too high).
    """

    device: str
    kind: str | None
    profile: str | None
    clients: int
    refused: int
    jobs: int
    finished: int
    budget_bytes: int | None = None
    predicted_bytes: int | None = None
    peak_median_bytes: float | None = None
    peak_worst_bytes: int | None = None
    peak_lower_bytes: int | None = None
    peak_upper_bytes: int | None = None
    peak_source: str | None = None
    prediction_error: float | None = None
    headroom_bytes: int | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    tokens_per_second: float | None = None
    energy: EnergySummary | None = None
    accelerator_peak_bytes: int | None = None  # part of the peaks, as far as it is known apart
    highest_celsius: float | None = None
    agent_cpu_share: float | None = None  # of one core, over its jobs: what measuring and talking took
    agent_pss_bytes: int | None = None
    uncapped: bool | None = None
    phase_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def energy_joules(self) -> float | None:
        """Gross, of all its jobs."""
        return self.energy.gross.joules if self.energy else None

    @property
    def emulated(self) -> bool | None:
        return None if self.kind is None else self.kind == "emulated"


@dataclass(frozen=True)
class RunSummary:
    """One run.  Qualities are at the end and at the best evaluated round; seconds are the sum over rounds."""

    run: str
    method: str
    state: str
    data: str | None
    model: str | None
    task: str | None
    seed: int | None
    rounds: int
    rounds_planned: int | None
    seconds: float | None
    accuracy: float | None
    accuracy_best: float | None
    loss: float | None
    loss_best: float | None
    reference: Reference
    target: Target | None
    devices: tuple[DeviceSummary, ...]
    clients: int
    refusals: tuple[Refusal, ...]
    failures: tuple[Failure, ...]
    bytes_down: int | None
    bytes_up: int | None
    measurement_bytes: int | None  # what telling the measurements took, on the way up beside the updates
    deployed_bytes: int | None  # beside the jobs: configuration, blocks and shards that devices lacked
    tokens_per_second: float | None
    phase_seconds: Mapping[str, float]
    energy: EnergySummary | None = None
    uncapped: bool | None = None
    emulated: bool | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)  # what must be the same for a fair comparison

    @property
    def energy_joules(self) -> float | None:
        """Gross, of all devices; None where one of them has no meter."""
        return self.energy.gross.joules if self.energy else None

    @property
    def peak_worst_bytes(self) -> int | None:
        """The worst peak of any device."""
        peaks = [device.peak_worst_bytes for device in self.devices if device.peak_worst_bytes is not None]
        return max(peaks, default=None)

    @property
    def prediction_error_worst(self) -> float | None:
        """The prediction error farthest from zero."""
        known = [device.prediction_error for device in self.devices if device.prediction_error is not None]
        return max(known, key=abs, default=None)

    @property
    def headroom_least_bytes(self) -> int | None:
        known = [device.headroom_bytes for device in self.devices if device.headroom_bytes is not None]
        return min(known, default=None)


def summarise(folder: RunFolder, target: float | None = None) -> RunSummary:
    """Everything the report says of one run."""
    record, status = folder.record, folder.status
    rounds, results = folder.rounds(), folder.results()
    config, plan = record.config, record.plan
    rests = folder.rests()
    devices = tuple(
        replace(device, energy=_energy(folder, device.device, results, rests))
        for device in _devices(plan, record.inventory, results)
    )
    accuracies, losses = _qualities(rounds, "accuracy"), _qualities(rounds, "loss")
    return RunSummary(
        run=folder.run_id,
        method=str(config.get("method", "")),
        state=status.state,
        data=name_of(config.get("data")),
        model=name_of(config.get("model")) or name_of(plan.get("model")),
        task=config.get("task"),
        seed=config.get("seed"),
        rounds=len(rounds),
        rounds_planned=config.get("rounds"),
        seconds=sum(record.seconds for record in rounds) if rounds else None,
        accuracy=accuracies[-1] if accuracies else None,
        accuracy_best=_largest(accuracies),
        loss=losses[-1] if losses else None,
        loss_best=min((loss for loss in losses if loss is not None), default=None),
        reference=_reference(folder.reference),
        target=None if target is None else _target(folder, target),
        devices=devices,
        clients=len(plan.get("clients", ())),
        refusals=_refusals(plan, results),
        failures=_failures(results),
        bytes_down=_total(result.measurement.bytes_down for result in results),
        bytes_up=_total(result.measurement.bytes_up for result in results),
        measurement_bytes=_total(result.measurement.measurement_bytes for result in results),
        deployed_bytes=sum(record.deployed_bytes for record in rounds) if rounds else None,
        tokens_per_second=_tokens_per_second(results),
        phase_seconds=_phase_seconds(results),
        energy=run_energy({device.device: device.energy for device in devices if device.jobs}),
        uncapped=_uncapped(results, config.get("capped")),
        emulated=_all_same(device.emulated for device in devices),
        error=status.error,
        notes=(*_notes(losses), *plan.get("promises", ())),
        conditions=_conditions(folder),
    )


def _target(folder: RunFolder, accuracy: float) -> Target:
    """Rounds and seconds, without evaluation, until it was reached for the first time, within the run's own budgets."""
    found = first_reaching(accuracy, round_costs(folder), folder.config.get("until"))
    return Target(accuracy) if found is None else Target(accuracy, found.round + 1, found.seconds)


def fairness(runs: Sequence[RunSummary]) -> list[str]:
    """One note for everything that should be the same in all runs and is not."""
    names = dict.fromkeys(name for run in runs for name in run.conditions)
    return [note for name in names if (note := _difference(name, runs))]


# ── devices ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _devices(
    plan: Mapping[str, Any], inventory: Mapping[str, Any], results: Sequence[Result]
) -> tuple[DeviceSummary, ...]:
    known = {device["name"]: device for device in inventory.get("devices", ())}
    names = dict.fromkeys([*known, *(client["device"] for client in plan.get("clients", ()))])
    return tuple(_device(name, known.get(name, {}), plan, results) for name in names)


def _device(name: str, stored: Mapping[str, Any], plan: Mapping[str, Any], results: Sequence[Result]) -> DeviceSummary:
    clients = [client for client in plan.get("clients", ()) if client["device"] == name]
    jobs = [result for result in results if result.device == name]
    finished = [result for result in jobs if result.finished]
    peaks = [peak for result in finished if (peak := result.measurement.peak.estimate_bytes) is not None]
    worst = _worst(finished)
    budget = _budget(stored, clients)
    bounds = worst.measurement.peak if worst else None
    return DeviceSummary(
        device=name,
        kind=stored.get("kind"),
        profile=name_of(stored.get("profile")),
        clients=len(clients),
        refused=sum(client["outcome"] == REFUSED for client in clients),
        jobs=len(jobs),
        finished=len(finished),
        budget_bytes=budget,
        predicted_bytes=_largest(client.get("predicted_peak_bytes") for client in clients),
        peak_median_bytes=median(peaks) if peaks else None,
        peak_worst_bytes=bounds.estimate_bytes if bounds else None,
        peak_lower_bytes=bounds.lower_bytes if bounds else None,
        peak_upper_bytes=bounds.upper_bytes if bounds else None,
        peak_source=bounds.sources.get("estimate") if bounds else None,
        prediction_error=_prediction_error(worst, plan),
        headroom_bytes=_difference_of(budget, bounds.estimate_bytes if bounds else None),
        bytes_down=_total(result.measurement.bytes_down for result in jobs),
        bytes_up=_total(result.measurement.bytes_up for result in jobs),
        tokens_per_second=_tokens_per_second(jobs),
        accelerator_peak_bytes=_largest(result.measurement.peak.accelerator_bytes for result in jobs),
        highest_celsius=_largest(result.measurement.conditions.highest_celsius for result in jobs),
        agent_cpu_share=_agent_share(jobs),
        agent_pss_bytes=_largest(result.measurement.agent_pss_bytes for result in jobs),
        uncapped=_uncapped(jobs, None),
        phase_seconds=_phase_seconds(jobs),
    )


def _worst(finished: Iterable[Result]) -> Result | None:
    known = [result for result in finished if result.measurement.peak.estimate_bytes is not None]
    return max(known, key=lambda result: result.measurement.peak.estimate_bytes or 0, default=None)


def _budget(stored: Mapping[str, Any], clients: Sequence[Mapping[str, Any]]) -> int | None:
    budget = stored.get("budget") or {}
    bytes_: int | None = budget.get("memory_bytes")
    return bytes_ if bytes_ is not None else _largest(client.get("budget_bytes") for client in clients)


def _prediction_error(worst: Result | None, plan: Mapping[str, Any]) -> float | None:
    if worst is None:
        return None
    predicted, peak = _predicted(plan, worst), worst.measurement.peak.estimate_bytes
    return None if predicted is None or not peak else predicted / peak - 1


def _predicted(plan: Mapping[str, Any], result: Result) -> int | None:
    """What was predicted for a job: by the plan, or by the last refit of its client before it."""
    entries = [client for client in plan.get("clients", ()) if client["index"] == result.client]
    refits = [c for c in plan.get("refits", ()) if c["index"] == result.client and c["from_round"] <= result.round]
    latest = [*entries, *refits][-1:]
    return latest[0].get("predicted_peak_bytes") if latest else None


def _energy(folder: RunFolder, device: str, results: Sequence[Result], rests: Sequence[Result]) -> EnergySummary | None:
    jobs, rested = ([each for each in found if each.device == device] for found in (results, rests))
    return device_energy(folder, jobs, rested)


def _agent_share(jobs: Sequence[Result]) -> float | None:
    """Processor seconds of the agent over the seconds of its jobs."""
    known = [job.measurement for job in jobs if job.measurement.agent_cpu_seconds is not None]
    seconds = sum(measured.seconds or 0.0 for measured in known)
    return sum(measured.agent_cpu_seconds or 0.0 for measured in known) / seconds if seconds else None


# ── outcomes ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _refusals(plan: Mapping[str, Any], results: Sequence[Result]) -> tuple[Refusal, ...]:
    planned = [
        Refusal(c["index"], c["device"], c.get("reason"), c.get("needed_bytes"), c.get("budget_bytes"))
        for c in plan.get("clients", ())
        if c["outcome"] == REFUSED
    ]
    on_node = {r.client: Refusal(r.client, r.device, r.error) for r in results if r.outcome == REFUSED}
    return (*planned, *on_node.values())


def _failures(results: Sequence[Result]) -> tuple[Failure, ...]:
    return tuple(
        Failure(r.client, r.device, r.round, r.outcome, r.phase, r.error)
        for r in results
        if not r.finished and r.outcome != REFUSED
    )


# ── over jobs ───────────────────────────────────────────────────────────────────────────────────────────────────────
def _phase_seconds(results: Iterable[Result]) -> dict[str, float]:
    """Seconds by phase, summed over jobs, in the order the phases came."""
    seconds: dict[str, float] = {}
    for result in results:
        for phase in result.measurement.phases:
            seconds[phase.name] = seconds.get(phase.name, 0.0) + phase.seconds
    return seconds


def _tokens_per_second(results: Sequence[Result]) -> float | None:
    """Tokens of the finished jobs over the seconds of their methods' own phases."""
    finished = [result for result in results if result.finished]
    tokens = sum(result.tokens for result in finished)
    seconds = sum(value for name, value in _phase_seconds(finished).items() if name not in PLUMBING)
    return tokens / seconds if tokens and seconds else None


def _uncapped(results: Sequence[Result], capped: bool | None) -> bool | None:
    """Whether any finished job ran without a limit; where none finished, what was asked for."""
    finished = [result for result in results if result.finished]
    if finished:
        return any(result.measurement.limit_bytes is None for result in finished)
    return None if capped is None else not capped


# ── over rounds ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _qualities(rounds: Sequence[RoundRecord], name: str) -> list[float | None]:
    """The figure at every evaluated round; None where it was not a finite number."""
    return [finite(record.quality.get(name)) for record in rounds if record.quality]


def _notes(losses: Sequence[float | None]) -> tuple[str, ...]:
    if losses and losses[-1] is None:
        return ("the loss of the last evaluation was not a finite number",)
    return ()


def _reference(stored: Mapping[str, float | None]) -> Reference:
    return Reference(stored.get("majority"), stored.get("bag_of_words"), stored.get("no_fine_tuning"))


# ── fairness ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _conditions(folder: RunFolder) -> dict[str, Any]:
    record, config = folder.record, folder.config
    plan, versions = record.plan, record.versions
    clients = plan.get("clients", ())
    return {
        "seed": config.get("seed"),
        "data": config.get("data_hash") or versions.get("data") or config.get("data"),
        "partition": config.get("partition"),
        "shards": config.get("shards") or [client.get("examples") for client in clients],
        "base model": plan.get("model") or versions.get("model") or config.get("model"),
        "initial state": folder.status.initial_state,
        "clients taking part": sum(client["outcome"] != REFUSED for client in clients),
        "participants per round": config.get("participants"),
        "rounds": config.get("rounds"),
        "local steps": config.get("steps"),
        "batch": [config.get("batch_size"), config.get("length"), config.get("dtype")],
        "learning rate": [config.get("learning_rate"), config.get("final_learning_rate"), config.get("schedule")],
        "budgets": {device["name"]: device.get("budget") for device in record.inventory.get("devices", ())},
        "memory cap": config.get("capped"),
        "machine (times)": (versions.get("machine") or {}).get("cpu"),
    }


def _difference(name: str, runs: Sequence[RunSummary]) -> str | None:
    values = [run.conditions.get(name) for run in runs]
    if all(value == values[0] for value in values):
        return None
    told = all(isinstance(value, (int, float, str)) and len(str(value)) <= 24 for value in values)
    if told:
        return f"{name}: " + ", ".join(f"{run.run} {value}" for run, value in zip(runs, values, strict=True))
    odd = [run.run for run, value in zip(runs, values, strict=True) if value != values[0]]
    return f"{name}: {', '.join(odd)} not as {runs[0].run}"


# ── numbers that may be missing ─────────────────────────────────────────────────────────────────────────────────────
def _largest(values: Iterable[Any]) -> Any:
    return max((value for value in values if value is not None), default=None)


def _total(values: Iterable[int]) -> int | None:
    """The sum, or None where there is nothing to add up."""
    known = list(values)
    return sum(known) if known else None


def _difference_of(whole: int | None, part: int | None) -> int | None:
    return None if whole is None or part is None else whole - part


def _all_same(values: Iterable[bool | None]) -> bool | None:
    """The one value that all have; None when they differ."""
    known = set(values)
    return known.pop() if len(known) == 1 else None
