"""A run under way, told by the round loop and the engine, as series."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from testbed.exporter.figures import Figures, registry_of
from testbed.exporter.totals import Totals
from testbed.job import FINISHED, OUTCOMES, REFUSED, UNREACHABLE
from testbed.live_view import IDLE, LINK_LOST
from testbed.run_record import RUNNING, name_of

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from testbed.job import Result
    from testbed.live import Evaluation, Watcher


class RunMetrics:
    """A Watcher, of one run or of several, one after another: each begins with nothing that the last one said."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.figures = Figures()
        self._clock, self._now = clock, wall_clock
        self._config: Mapping[str, Any] = {}
        self._begin("", 0)

    def about(self, config: Mapping[str, Any]) -> None:
        """What the run that starts next is: the content of its config.json (method, data, model, task, seed).

        Without it, what its id and its plan tell of that is said, and no more.
        """
        self._config = config

    def _begin(self, run_id: str, rounds: int) -> None:
        self.figures.become(Figures())
        self._run, self._rounds = run_id, rounds
        self._facts: dict[str, str | None] = {}
        self._round_began: float | None = None
        self._at_work: set[str] = set()  # devices with a job
        self._losses: dict[int, float] = {}  # of the clients that finished this round
        self._totals = Totals(self.figures)

    def registry(self) -> CollectorRegistry:
        """What `testbed.exporter.serving.serve` takes."""
        return registry_of(self.figures)

    # ── the run ────────────────────────────────────────────────────────────────────────────────────────────────────
    def run_started(self, run_id: str, plan: Mapping[str, Any], rounds: int) -> None:
        with self.figures.lock:
            self._begin(run_id, rounds)
            self._facts, self._config = _facts(run_id, plan, self._config), {}
            self._say_state(RUNNING)
            self.figures.set("testbed_run_rounds_planned", rounds)
            self._went_on()
            for name in dict.fromkeys(client["device"] for client in plan.get("clients", ())):
                self._plan_device(name, [client for client in plan["clients"] if client["device"] == name])

    def round_started(self, i: int, participants: int, lr: float) -> None:
        with self.figures.lock:
            self._end_round(done=i)
            self._losses.clear()
            self._round_began = self._clock()
            self.figures.set("testbed_run_round", i + 1)
            self.figures.set("testbed_run_participants", participants)
            self.figures.set("testbed_run_learning_rate", lr)
            self._went_on()

    def evaluated(self, i: int, quality: Evaluation) -> None:
        del i  # before the first round too, it is the newest
        with self.figures.lock:
            self.figures.set("testbed_run_loss", quality.loss)
            self.figures.set("testbed_run_accuracy_ratio", quality.accuracy)
            self._went_on()

    def run_ended(self, status: str) -> None:
        with self.figures.lock:
            if status == FINISHED:
                self._end_round(done=self._rounds)
            for each in self.figures.labels("testbed_device_held"):
                self.figures.set("testbed_device_held", 0, **each)
                self._say_device_state(each["device"], IDLE)
            self._say_state(status)
            self._went_on()

    # ── its devices ────────────────────────────────────────────────────────────────────────────────────────────────
    def event(
        self, device: str, client: int | None, phase: str | None = None, progress: Mapping[str, Any] | None = None
    ) -> None:
        with self.figures.lock:
            self._heard_of(device, up=phase != LINK_LOST)
            if client is not None and device not in self._at_work:
                self._at_work.add(device)
                self.figures.set("testbed_device_peak_bytes", None, device=device)
                self.figures.set("testbed_device_loss", None, device=device)
            if phase is not None:
                self._say_device_state(device, phase)
            if progress:
                self._progress(device, progress)
            self._went_on()

    def telemetry(self, device: str, figures: Mapping[str, Any]) -> None:
        with self.figures.lock:
            self._heard_of(device, up=True)
            self.figures.set("testbed_device_memory_bytes", figures.get("memory_bytes"), device=device)
            self.figures.set("testbed_device_accelerator_bytes", figures.get("accelerator_bytes"), device=device)
            self.figures.set("testbed_device_temperature_celsius", figures.get("celsius"), device=device)
            self._throttled(device, figures.get("throttled"))
            self._totals.tell(device, figures.get("meters") or ())

    def job_ended(self, result: Result) -> None:
        device = result.device
        with self.figures.lock:
            self._at_work.discard(device)
            self._heard_of(device, up=result.outcome != UNREACHABLE)
            self._say_device_state(device, IDLE if result.finished else result.outcome)
            self.figures.add("testbed_run_jobs_total", 1, device=device, kind=result.kind, outcome=result.outcome)
            self._measured(result)
            self._train_loss(result)
            self._went_on()

    # ── parts of that ──────────────────────────────────────────────────────────────────────────────────────────────
    def _plan_device(self, name: str, clients: list[Mapping[str, Any]]) -> None:
        taking_part = any(client["outcome"] != REFUSED for client in clients)
        self._say_device_state(name, IDLE if taking_part else REFUSED)
        for family, key in (("budget_bytes", "budget_bytes"), ("predicted_peak_bytes", "predicted_peak_bytes")):
            known = [client[key] for client in clients if client.get(key) is not None]
            self.figures.set(f"testbed_device_{family}", max(known, default=None), device=name)
        if taking_part:  # nothing has ended yet: here 0 is what is known
            for outcome in OUTCOMES:
                self.figures.add("testbed_run_jobs_total", 0, device=name, kind="train", outcome=outcome)

    def _say_state(self, state: str) -> None:
        self.figures.forget("testbed_run_info")
        self.figures.set("testbed_run_info", 1, run=self._run, state=state, **self._facts)

    def _say_device_state(self, device: str, state: str) -> None:
        self.figures.forget("testbed_device_state", device=device)
        self.figures.set("testbed_device_state", 1, device=device, state=state)

    def _heard_of(self, device: str, *, up: bool) -> None:
        self.figures.set("testbed_device_up", up, device=device)
        if up:
            self.figures.set("testbed_device_held", 1, device=device)
            self.figures.set("testbed_device_last_contact_timestamp_seconds", self._now(), device=device)

    def _went_on(self) -> None:
        self.figures.set("testbed_run_last_event_timestamp_seconds", self._now())

    def _end_round(self, done: int) -> None:
        self.figures.set("testbed_run_rounds_done", done)
        if self._round_began is not None:
            self.figures.set("testbed_run_round_seconds", self._clock() - self._round_began)

    def _progress(self, device: str, progress: Mapping[str, Any]) -> None:
        if progress.get("loss") is not None:
            self.figures.set("testbed_device_loss", progress["loss"], device=device)
        peak = progress.get("peak_bytes")
        if peak is not None:
            before = self.figures.get("testbed_device_peak_bytes", device=device) or 0
            self.figures.set("testbed_device_peak_bytes", max(before, peak), device=device)

    def _measured(self, result: Result) -> None:
        measured, device = result.measurement, result.device
        if measured.peak.estimate_bytes is not None:
            self.figures.set("testbed_device_peak_bytes", measured.peak.estimate_bytes, device=device)
        for phase in measured.phases:
            self.figures.add("testbed_run_phase_seconds_total", phase.seconds, device=device, phase=phase.name)
        for direction, count in (("up", measured.bytes_up), ("down", measured.bytes_down)):
            self.figures.add("testbed_run_traffic_bytes_total", count, device=device, direction=direction)
        if result.finished:
            self.figures.add("testbed_run_tokens_total", result.tokens, device=device)

    def _train_loss(self, result: Result) -> None:
        loss = result.scalars.get("loss")
        if result.finished and isinstance(loss, (int, float)):
            self._losses[result.client] = float(loss)
            self.figures.set("testbed_run_train_loss", sum(self._losses.values()) / len(self._losses))

    def _throttled(self, device: str, reasons: list[str] | None) -> None:
        held_back = None if reasons is None else bool(reasons)
        self.figures.set("testbed_device_throttled", held_back, device=device)
        if reasons is None:
            self.figures.forget("testbed_device_throttled_by", device=device)
            return
        before = (labels["reason"] for labels in self.figures.labels("testbed_device_throttled_by", device=device))
        for reason in {*before, *reasons}:
            self.figures.set("testbed_device_throttled_by", reason in reasons, device=device, reason=reason)


def _facts(run_id: str, plan: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str | None]:
    """What the run is; an id ends in date, time and a random word."""
    told = {"method": run_id.rsplit("-", 3)[0], "model": plan.get("model"), "task": plan.get("work", {}).get("task")}
    known = {**told, **config}
    return {name: name_of(known.get(name)) for name in ("method", "model", "data", "task", "seed")}


class Tee:
    """A watcher that tells several, each whatever the others make of it (wrap one that may break in `Guarded`)."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def run_started(self, run_id: str, plan: Mapping[str, Any], rounds: int) -> None:
        for watcher in self._watchers:
            watcher.run_started(run_id, plan, rounds)

    def round_started(self, i: int, participants: int, lr: float) -> None:
        for watcher in self._watchers:
            watcher.round_started(i, participants, lr)

    def event(
        self, device: str, client: int | None, phase: str | None = None, progress: Mapping[str, Any] | None = None
    ) -> None:
        for watcher in self._watchers:
            watcher.event(device, client, phase, progress)

    def telemetry(self, device: str, figures: Mapping[str, Any]) -> None:
        for watcher in self._watchers:
            watcher.telemetry(device, figures)

    def job_ended(self, result: Result) -> None:
        for watcher in self._watchers:
            watcher.job_ended(result)

    def evaluated(self, i: int, quality: Evaluation) -> None:
        for watcher in self._watchers:
            watcher.evaluated(i, quality)

    def run_ended(self, status: str) -> None:
        for watcher in self._watchers:
            watcher.run_ended(status)
