"""Watching a run: a live table on a terminal, plain lines everywhere else.

The round loop and the engine tell a Watcher what happens, from any thread.  Nothing a watcher does reaches the run:
what breaks in it ends the watching, with one line that says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from testbed.job import REFUSED
from testbed.live_table import render
from testbed.live_view import LINK_LOST, POWER_CYCLE, RunView
from testbed.quantities import bytes_text, number_text, seconds_text
from testbed.run_record import INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from testbed.job import Result

REFRESHES_PER_SECOND = 4


class Evaluation(Protocol):
    """Quality of a model, as `testbed.task.Quality` tells it."""

    @property
    def loss(self) -> float: ...

    @property
    def accuracy(self) -> float | None: ...


class Watcher(Protocol):
    """Who is told what happens in a run.  Rounds count from 0; `plan` is the content of plan.json."""

    def run_started(self, run_id: str, plan: Mapping[str, Any], rounds: int) -> None: ...

    def round_started(self, i: int, participants: int, lr: float) -> None: ...

    def event(
        self, device: str, client: int | None, phase: str | None = None, progress: Mapping[str, Any] | None = None
    ) -> None:
        """A device began a phase, or a job is further on: step, steps, loss, peak_bytes, as far as they are known."""

    def telemetry(self, device: str, figures: Mapping[str, Any]) -> None:
        """How a device stands: meters, memory, temperature and throttling, as `testbed.node.metering` tells them."""

    def job_ended(self, result: Result) -> None: ...

    def evaluated(self, i: int, quality: Evaluation) -> None: ...

    def run_ended(self, status: str) -> None: ...


def make_watcher(console: Console) -> Watcher:
    """A live table where the console is a terminal that can be redrawn, plain lines otherwise."""
    if console.is_terminal and not console.is_dumb_terminal:
        return Guarded(LiveWatcher(console), console)
    return Guarded(PlainWatcher(console), console)


class Silent:
    """A watcher that says nothing."""

    def run_started(self, run_id: str, plan: Mapping[str, Any], rounds: int) -> None: ...

    def round_started(self, i: int, participants: int, lr: float) -> None: ...

    def event(
        self, device: str, client: int | None, phase: str | None = None, progress: Mapping[str, Any] | None = None
    ) -> None: ...

    def telemetry(self, device: str, figures: Mapping[str, Any]) -> None: ...

    def job_ended(self, result: Result) -> None: ...

    def evaluated(self, i: int, quality: Evaluation) -> None: ...

    def run_ended(self, status: str) -> None: ...


class PlainWatcher:
    """One line per round and per notable outcome, each written out at once."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._view = RunView(clock)
        self._told = -1  # the last round that has its line
        self._lock = threading.RLock()

    def run_started(self, run_id: str, plan: Mapping[str, Any], rounds: int) -> None:
        with self._lock:
            self._view.run_started(run_id, plan, rounds)
            clients = plan.get("clients", ())
            devices = {client["device"] for client in clients}
            who = f"{_counted(len(clients), 'client')} on {_counted(len(devices), 'device')}"
            self._say(f"run {run_id}: {who}, {_counted(rounds, 'round')}")
            for client in clients:
                if client["outcome"] == REFUSED:
                    reason = client.get("reason") or "no reason given"
                    self._say(f"refused: client {client['index']} on {client['device']}: {reason}")

    def round_started(self, i: int, participants: int, lr: float) -> None:
        with self._lock:
            self._tell_round()
            self._view.round_started(i, participants, lr)

    def event(
        self, device: str, client: int | None, phase: str | None = None, progress: Mapping[str, Any] | None = None
    ) -> None:
        with self._lock:
            self._view.event(device, client, phase, progress)
            if phase == LINK_LOST:
                self._say(f"{LINK_LOST}: {device} is looked for again")
            if phase == POWER_CYCLE:
                self._say(f"{POWER_CYCLE}: {device} does not come back, and is switched off and on")

    def telemetry(self, device: str, figures: Mapping[str, Any]) -> None:
        with self._lock:
            self._view.telemetry(device, figures)

    def job_ended(self, result: Result) -> None:
        with self._lock:
            self._view.job_ended(result)
            if not result.finished:
                self._say(outcome_line(result))

    def evaluated(self, i: int, quality: Evaluation) -> None:
        with self._lock:
            self._view.evaluated(i, quality.loss, quality.accuracy)
            if i == self._view.round:
                self._tell_round()
            else:
                self._say(f"before the first round  {self._view.quality_text()}")

    def run_ended(self, status: str) -> None:
        with self._lock:
            if status != INTERRUPTED or self._view.round_over:
                self._tell_round()
            self._view.run_ended(status)
            self._say(f"run {self._view.run_id} {status}, {seconds_text(self._view.elapsed)}")

    def _tell_round(self) -> None:
        view = self._view
        if view.round is not None and view.round > self._told:
            self._told = view.round
            self._say(round_line(view))

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()


class LiveWatcher:
    """A table of the devices that is redrawn a few times a second; notable outcomes scroll by above it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live

        self._console = console
        self._view = RunView(clock)
        self._lock = threading.RLock()
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=REFRESHES_PER_SECOND)

    def run_started(self, run_id: str, plan: Mapping[str, Any], rounds: int) -> None:
        with self._lock:
            self._view.run_started(run_id, plan, rounds)
        self._live.start(refresh=True)

    def round_started(self, i: int, participants: int, lr: float) -> None:
        with self._lock:
            self._view.round_started(i, participants, lr)

    def event(
        self, device: str, client: int | None, phase: str | None = None, progress: Mapping[str, Any] | None = None
    ) -> None:
        with self._lock:
            self._view.event(device, client, phase, progress)

    def telemetry(self, device: str, figures: Mapping[str, Any]) -> None:
        with self._lock:
            self._view.telemetry(device, figures)

    def job_ended(self, result: Result) -> None:
        with self._lock:
            self._view.job_ended(result)
        if not result.finished:
            self._console.print(outcome_line(result), markup=False, highlight=False, style="yellow")

    def evaluated(self, i: int, quality: Evaluation) -> None:
        with self._lock:
            self._view.evaluated(i, quality.loss, quality.accuracy)

    def run_ended(self, status: str) -> None:
        with self._lock:
            self._view.run_ended(status)
        self.stop()

    def stop(self) -> None:
        """Give the terminal back: the last picture stays, the cursor is shown."""
        self._live.stop()

    def _draw(self) -> RenderableType:
        with self._lock:
            try:
                return render(self._view, self._console.width)
            except Exception as error:  # noqa: BLE001 -- drawn in a thread of its own, where nobody could catch it
                return f"the live view cannot be drawn ({type(error).__name__}: {error}); the run goes on"


class Guarded:
    """Keeps whatever goes wrong in a watcher away from the run: it is told once, then the watcher is left alone."""

    def __init__(self, watcher: Watcher, console: Console) -> None:
        self._watcher: Watcher = watcher
        self._console = console

    def run_started(self, run_id: str, plan: Mapping[str, Any], rounds: int) -> None:
        self._try(lambda watcher: watcher.run_started(run_id, plan, rounds))

    def round_started(self, i: int, participants: int, lr: float) -> None:
        self._try(lambda watcher: watcher.round_started(i, participants, lr))

    def event(
        self, device: str, client: int | None, phase: str | None = None, progress: Mapping[str, Any] | None = None
    ) -> None:
        self._try(lambda watcher: watcher.event(device, client, phase, progress))

    def telemetry(self, device: str, figures: Mapping[str, Any]) -> None:
        self._try(lambda watcher: watcher.telemetry(device, figures))

    def job_ended(self, result: Result) -> None:
        self._try(lambda watcher: watcher.job_ended(result))

    def evaluated(self, i: int, quality: Evaluation) -> None:
        self._try(lambda watcher: watcher.evaluated(i, quality))

    def run_ended(self, status: str) -> None:
        self._try(lambda watcher: watcher.run_ended(status))

    def _try(self, tell: Callable[[Watcher], None]) -> None:
        try:
            tell(self._watcher)
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- a broken terminal must not cost a run; rich wants to
            broken, self._watcher = self._watcher, Silent()  # exit when the reader of a pipe is gone
            self._give_up(broken, error)

    def _give_up(self, broken: Watcher, error: BaseException) -> None:
        try:
            if isinstance(broken, LiveWatcher):
                broken.stop()
            line = f"not watching any more ({type(error).__name__}: {error}); the run goes on"
            self._console.print(line, markup=False, highlight=False)
        except (Exception, SystemExit):  # noqa: BLE001, S110 -- the terminal itself is gone: nobody is left to tell
            pass


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def outcome_line(result: Result) -> str:
    """out_of_memory: client 3 on nano-1, round 2, in train, peak 480 MiB of 480 MiB: …"""
    peak, limit = result.measurement.peak, result.measurement.limit_bytes
    parts = [f"{result.outcome}: client {result.client} on {result.device or '?'}, round {result.round + 1}"]
    parts += [f"in {result.phase}"] if result.phase else []
    highest = peak.upper_bytes if peak.upper_bytes is not None else peak.estimate_bytes
    if highest is not None:
        parts.append(f"peak {bytes_text(highest)}" + (f" of {bytes_text(limit)}" if limit is not None else ""))
    return ", ".join(parts) + (f": {result.error}" if result.error else "")


def round_line(view: RunView) -> str:
    """Round 3/10  4 of 4 finished  train loss 1.234  loss 1.100  accuracy 0.612  12.3 s  1 min 05 s left"""
    parts = [f"round {(view.round or 0) + 1}/{view.rounds}", f"{view.finished} of {view.participants} finished"]
    if view.train_loss is not None:
        parts.append(f"train loss {number_text(view.train_loss)}")
    if view.quality_round == view.round:
        parts.append(view.quality_text())
    parts.append(seconds_text(view.round_seconds))
    left = view.seconds_left(done=(view.round or 0) + 1)
    return "  ".join([*parts, f"{seconds_text(left)} left"] if left else parts)
