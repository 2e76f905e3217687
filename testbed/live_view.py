"""What is known of a running run: fed by a watcher, read by whoever draws it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from testbed.job import REFUSED
from testbed.quantities import number_text

if TYPE_CHECKING:
    from testbed.job import Result

IDLE = "idle"
#: A phase like any other to whoever watches: the device is out of reach, and its job may go on.
LINK_LOST = "link lost"
#: The same, while it is switched off and on.
POWER_CYCLE = "power cycle"


@dataclass
class DeviceView:
    """One device now.  `peak_bytes` is the highest that was seen in this run."""

    name: str
    budget_bytes: int | None
    state: str = IDLE
    client: int | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    peak_bytes: int | None = None
    watts: float | None = None  # of its first meter, now
    failed: int = 0

    def saw_peak(self, value: int | None) -> None:
        if value is not None:
            self.peak_bytes = max(self.peak_bytes or 0, value)


class RunView:
    """A run now.  Rounds count from 0; seconds are of the given clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = self._round_began = clock()
        self._first: int | None = None  # the first round that this controller ran: a resumed run has none before it
        self._losses: dict[int, float] = {}
        self.run_id, self.rounds, self.status = "", 0, "running"
        self.devices: dict[str, DeviceView] = {}
        self.round: int | None = None
        self.participants = self.finished = self.ended = 0
        self.learning_rate: float | None = None
        self.loss: float | None = None
        self.accuracy: float | None = None
        self.quality_round: int | None = None

    # ── what happens ───────────────────────────────────────────────────────────────────────────────────────────────
    def run_started(self, run_id: str, plan: Mapping[str, Any], rounds: int) -> None:
        self.run_id, self.rounds = run_id, rounds
        self._began = self._round_began = self._clock()
        for client in plan.get("clients", ()):
            refused = client["outcome"] == REFUSED
            device = self.devices.setdefault(
                client["device"], DeviceView(client["device"], client.get("budget_bytes"), REFUSED if refused else IDLE)
            )
            if not refused and device.state == REFUSED:
                device.state = IDLE

    def round_started(self, index: int, participants: int, learning_rate: float) -> None:
        self.round, self.participants, self.learning_rate = index, participants, learning_rate
        self.finished = self.ended = 0
        self._losses.clear()
        self._first = index if self._first is None else self._first
        self._round_began = self._clock()

    def event(self, device: str, client: int | None, phase: str | None, progress: Mapping[str, Any] | None) -> None:
        view = self._device(device)
        if client != view.client:
            view.client, view.step, view.steps, view.loss = client, None, None, None
        view.state = phase or view.state
        if progress:
            self._progress(view, progress)

    def telemetry(self, device: str, figures: Mapping[str, Any]) -> None:
        meters = figures.get("meters") or ()
        self._device(device).watts = meters[0].get("total_watts") if meters else None

    def job_ended(self, result: Result) -> None:
        view = self._device(result.device)
        view.saw_peak(result.measurement.peak.estimate_bytes)
        self.finished += result.finished
        self.ended += 1
        view.failed += not result.finished
        view.state = IDLE if result.finished else result.outcome
        loss = result.scalars.get("loss")
        if result.finished and isinstance(loss, (int, float)):
            self._losses[result.client] = float(loss)

    def evaluated(self, index: int, loss: float, accuracy: float | None) -> None:
        self.quality_round, self.loss, self.accuracy = index, loss, accuracy

    def run_ended(self, status: str) -> None:
        self.status = status
        for device in self.devices.values():
            device.state = device.state if device.state == REFUSED else IDLE

    # ── what can be said of it ─────────────────────────────────────────────────────────────────────────────────────
    @property
    def elapsed(self) -> float:
        return self._clock() - self._began

    @property
    def round_over(self) -> bool:
        """Whether every job of the current round has ended."""
        return self.round is not None and self.ended >= self.participants

    @property
    def round_seconds(self) -> float:
        return self._clock() - self._round_began

    @property
    def train_loss(self) -> float | None:
        """Mean over the clients that finished this round, or None."""
        return sum(self._losses.values()) / len(self._losses) if self._losses else None

    def seconds_left(self, done: int) -> float | None:
        """The rounds that are left at the mean speed of those this controller ran; None before the first is over.

        done    number of rounds of the run that are over
        """
        if self._first is None or done <= self._first:
            return None
        spent = self.elapsed if done > (self.round or 0) else self._round_began - self._began
        return max(0.0, spent / (done - self._first) * (self.rounds - done))

    def quality_text(self) -> str:
        """Loss and accuracy of the last evaluation."""
        accuracy = f"  accuracy {number_text(self.accuracy)}" if self.accuracy is not None else ""
        return f"loss {number_text(self.loss)}{accuracy}"

    def _device(self, name: str) -> DeviceView:
        return self.devices.setdefault(name, DeviceView(name, None))

    def _progress(self, view: DeviceView, progress: Mapping[str, Any]) -> None:
        view.step, view.steps = progress.get("step", view.step), progress.get("steps", view.steps)
        view.loss = progress.get("loss", view.loss)
        view.saw_peak(progress.get("peak_bytes"))
