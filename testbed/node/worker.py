"""The jobs on a node: queued, handed to the trainer one after another, measured, and their results kept."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from testbed.errors import WireError
from testbed.node import accelerator_memory
from testbed.node.child import Child
from testbed.node.memory import PhaseMeter
from testbed.node.pace import Pace
from testbed.node.rest import COOL, Rest
from testbed.node.spool import PAYLOAD_FILE, UPDATE_FILE, FileSink, Spool
from testbed.node.task import FAILED, FINISHED, Task, unmetered

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from testbed.node.disturbed import Disturbed
    from testbed.node.frames import Header, Sink
    from testbed.node.limits import Group
    from testbed.node.metering import Metering

#: As `testbed.job.REST`, which an agent does without.
_REST = "rest"
#: A trainer that has closed its end of the pipe is given so long to end by itself.
_FAREWELL_SECONDS = 5.0
#: The empty folders of stored jobs are cleared away when nothing has happened for so long.
_IDLE_SECONDS = 0.05
#: A machine that goes down asks every process to end, the trainer perhaps a little earlier than the agent.
_GOING_DOWN_SECONDS = 1.0
#: A result that the controller stores at once is never written here; one that waits longer is.
_SAVE_SECONDS = 0.2


class Outbox(Protocol):
    """The way to the controller; what is said while none is there is lost, and results wait."""

    def tell(self, header: Header) -> None: ...

    def tell_if_it_listens(self, header: Header) -> None:
        """For what may be dropped when the controller does not read."""

    def pace(self, pace: Pace | None) -> None:
        """Hold back what is sent from now on; None: no more."""

    def send_update(self, header: Header, update: Path, then: Callable[[], None]) -> None:
        """Send tensors, and call `then` when the last byte is out."""

    def asked_to_end(self, patience_seconds: float) -> bool:
        """Whether the agent has been asked to end, or is within that time."""


class Worker:
    """The trainer, its queue, its measurement and the results that wait."""

    def __init__(
        self, spool: Spool, settings: dict[str, Any], group: Group | None, metering: Metering, outbox: Outbox
    ) -> None:
        self.spool = spool
        self.settings = settings
        self.group = group
        self.metering = metering
        self.outbox = outbox
        self.results = spool.read_waiting()
        spool.remove_all_but(self.results)
        self._unsaved: dict[str, float] = {}  # job → when its result must be on the disk, if it is not stored by then
        self.queue: deque[Task] = deque()
        self.current: Task | None = None
        self._rest: Rest | None = None  # the current task asks for no trainer
        self._begun: dict[str, float] = {}  # job of this life → when its first byte came
        self._disturbed: Disturbed | None = None  # once a job undergoes something
        self._paced: tuple[str, Pace] | None = None  # the job that has a slow link, until its result is stored
        self.child: Child | None = None
        self._accelerator = accelerator_memory.find(
            settings["accelerator"], settings.get("accelerator_charged"), root=settings.get("root") or "/"
        )
        self._baseline_bytes: int | None = None
        self._next_sample = 0.0
        self._idle_since = 0.0
        self._meter = PhaseMeter(None, None)
        self._meter.begin("idle")

    # ── jobs ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def knows(self, job: str) -> bool:
        """Whether a job is here already: running, queued, or its result waiting."""
        here = [task.id for task in (self.current, *self.queue) if task is not None]
        return job in here or job in self.results

    def take(self, header: Header, sink: Sink | None, since: float) -> None:
        """Queue a job; one that is known runs once, and its result is sent again if it waits."""
        job = header["id"]
        if self.knows(job):
            self.deliver(job)
            return
        if not isinstance(header.get("job"), dict):
            raise WireError(f"job {job}: its description is missing")
        task = Task(header, since, time.monotonic())
        try:
            self._put_down(task, sink)
        except OSError as error:
            self.spool.remove(job)  # what has come of it takes the space that others need
            self._finish(task, FAILED, self._disk_error(error))
            return
        self.queue.append(task)
        self._start_next()

    def cancel(self, job: str, outcome: str) -> None:
        """End a job before its end, with this outcome; only killing stops a trainer for certain."""
        for task in [task for task in self.queue if task.id == job]:
            self.queue.remove(task)
            self._finish(task, outcome, "it was cancelled before it began")
        if self.current is None or self.current.id != job:
            return
        if self._rest is not None:
            self._finish(self.current, outcome, "it was cancelled while the node rested")
        elif self.child is not None:
            self.current.cancelled = outcome
            self.child.kill()

    def drop(self, job: str) -> None:
        """Forget a job, whatever became of it."""
        for task in [task for task in self.queue if task.id == job]:
            self.queue.remove(task)
            self.spool.remove(job)
        if self.current is not None and self.current.id == job:
            self.current.dropped = True
            if self._rest is not None:
                self._finish(self.current, FAILED, "nobody asks for it any more")
            elif self.child is not None:
                self.child.kill()
        self.forget(job)

    def deliver(self, job: str) -> None:
        """Send a result that waits: its update first, so that the time of sending can stand in the result."""
        result = self.results.get(job)
        if result is None:
            return
        update = self.spool.job_folder(job) / UPDATE_FILE
        if (undergone := result["measurement"].get("disturbances") or {}).get("slow_link"):
            self._pace(job, undergone)  # also of an agent's life before
        if result["outcome"] != FINISHED or not update.exists():
            self.outbox.tell({"type": "result", "id": job, "result": self._with_link(result)})
            return
        begun = time.monotonic()

        def then() -> None:
            now, since = time.monotonic(), self._begun.get(job)
            measured = self.metering.measured(since, now) if since is not None else {}
            sent = Task.sent(result, begun, now - begun, measured)
            self.outbox.tell({"type": "result", "id": job, "result": self._with_link(sent)})

        self.outbox.send_update({"type": "update", "id": job}, update, then)

    def forget(self, job: str) -> None:
        """The controller has stored a result."""
        self._unsaved.pop(job, None)
        self._begun.pop(job, None)
        if self._paced is not None and self._paced[0] == job:
            self._pace(job, {})
        if self.results.pop(job, None) is not None:
            self.spool.retire(job)
            self._idle_since = time.monotonic()

    @property
    def _limit_bytes(self) -> int | None:
        return self.group.limit_bytes if self.group is not None else None

    @property
    def _left_bytes(self) -> int | None:
        """Of the limit, what a background load leaves the trainer."""
        held = self._disturbed.held_bytes if self._disturbed is not None else 0
        return None if self._limit_bytes is None else self._limit_bytes - held

    def told(self) -> dict[str, Any]:
        """How the node stands now, for whoever watches."""
        return {
            **self.metering.told(),
            "memory_bytes": self._meter.unreclaimable_bytes,
            "accelerator_bytes": self._meter.accelerator_bytes,
        }

    def save(self, due: float | None = None) -> None:
        """Write down the results that are not stored yet: those that are due, or all of them."""
        for job in [job for job, at in self._unsaved.items() if due is None or at <= due]:
            del self._unsaved[job]
            with contextlib.suppress(OSError):  # on a full disk it waits in memory
                self.spool.keep_outcome(job, self.results[job])

    def unload(self) -> None:
        """Ask the trainer to give its memory back; it may stay, empty, or end."""
        if self.child is None:
            self.outbox.tell({"type": "unloaded"})
        elif self.current is None:
            self.child.unloading = True
            self.child.send({"unload": True})

    def _put_down(self, task: Task, sink: Sink | None) -> None:
        if isinstance(sink, FileSink) and sink.error is not None:
            raise sink.error
        if sink is None:
            self.spool.make_folder(task.id)

    def _disk_error(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left in {self.spool.folder}"
        return f"{self.spool.folder}: {error.strerror}"

    def _start_next(self) -> None:
        if self.current is not None or not self.queue:
            return
        task = self.current = self.queue.popleft()
        task.phases[:0] = [self._meter.end(at=min(time.monotonic(), task.since))]
        self._begun[task.id] = task.since
        self.metering.begin()
        if task.who["kind"] == _REST:
            self._begin_rest(task)
            return
        if not self._undergo(task):
            return
        if self.child is None:
            if self._accelerator is not None:
                self._accelerator.take_baseline()
            try:
                self.child = Child(self.settings, self.spool.folder, self.group)
            except OSError as error:
                self._finish(task, FAILED, self._disk_error(error))
                return
            self._watch(self.child.pid)
            self._disturb_trainer(self.child)
            self._open_phase(task, "start")
        else:
            self._disturb_trainer(self.child)
        if self.child.ready:
            self._hand_over(task, self.child)
        self._next_sample = time.monotonic()

    # ── what a run declares that jobs undergo ──────────────────────────────────────────────────────────────────────
    def _undergo(self, task: Task) -> bool:
        """Begin what the job undergoes; False where it has ended, because that cannot be had."""
        declared = task.job.get("disturbances") or {}
        self._pace(task.id, declared)
        if not declared and self._disturbed is None:
            return True
        if self._disturbed is None:
            from testbed.node.disturbed import Disturbed  # most agents never need it

            self._disturbed = Disturbed(self.settings, self.spool.folder, self.group)
        begun = time.monotonic()
        problem = self._disturbed.begin(declared)
        if self._disturbed.shares_group:
            task.phases.append(unmetered("background_load", time.monotonic() - begun, begun))
        if problem is not None:
            self._finish(task, FAILED, problem)
        return problem is None

    def _disturb_trainer(self, child: Child) -> None:
        if self._disturbed is not None:
            self._disturbed.take_trainer(child.pid)
            self._meter.alone = not self._disturbed.shares_group

    def _undisturb(self, *, finished: bool = False) -> dict[str, Any]:
        """End what the current job has undergone, and tell it."""
        self._meter.alone = True
        return self._disturbed.end(finished=finished) if self._disturbed is not None else {}

    def _pace(self, job: str, declared: dict[str, Any]) -> None:
        """The link of a job: from here on until its result is stored."""
        if self._paced is not None and self._paced[0] == job and declared:
            return
        pace = Pace.of(declared)
        if pace is not None or self._paced is not None:
            self._paced = (job, pace) if pace is not None else None
            self.outbox.pace(pace)

    def _with_link(self, result: dict[str, Any]) -> dict[str, Any]:
        """A result with what its slow link has let pass, up to now."""
        measurement = result["measurement"]
        link = (measurement.get("disturbances") or {}).get("slow_link")
        if link is None or self._paced is None:
            return result
        told = {**measurement["disturbances"], "slow_link": {**link, **self._paced[1].told("up")}}
        return {**result, "measurement": {**measurement, "disturbances": told}}

    def _drop_out(self, task: Task, child: Child, progress: dict[str, Any] | None) -> bool:
        """Whether the job's client drops out now: its trainer is killed, and nothing more of the job is heard."""
        task.dropped_out = self._disturbed.drops_out(progress) if self._disturbed is not None else None
        if task.dropped_out is not None:
            child.kill()
        return task.dropped_out is not None

    def _begin_rest(self, task: Task) -> None:
        self._rest = Rest(task.job.get("scalars") or {}, time.monotonic())
        self.outbox.tell({"type": "event", "id": task.id, "phase": self._rest.phase})
        self._continue_rest(task, self._rest, time.monotonic())

    def _continue_rest(self, task: Task, rest: Rest, now: float) -> None:
        if rest.phase == COOL:
            self.metering.on_time(now)
            if not rest.is_cool(self.metering.celsius, now):
                return
            rest.begin_window(now)
            self.metering.begin(too_hot=rest.too_hot)
            self.outbox.tell({"type": "event", "id": task.id, "phase": rest.phase})
        if rest.is_over(now):
            task.phases += rest.phases(now)
            self._finish(task, FINISHED)

    def _hand_over(self, task: Task, child: Child) -> None:
        self._open_phase(task, "load")
        child.send({"job": task.id, "content": task.job, "folder": f"jobs/{task.id}", "hash": task.hash})

    def _finish(
        self, task: Task, outcome: str, error: str | None = None, produced: dict[str, Any] | None = None
    ) -> None:
        """Write down how a job ended, tell the controller, and go on with the next."""
        undergone: dict[str, Any] = {}
        if task is self.current:
            if error is not None and self._disturbed is not None and task.dropped_out is None:
                error += self._disturbed.note
            undergone = self._undisturb(finished=outcome == FINISHED)
            self.current = self._rest = None
            self._meter.begin("idle")
        if task.dropped:
            self.spool.remove(task.id)
            self._start_next()
            return
        where = {
            "device": self.settings["device"],
            "limit_bytes": self._limit_bytes,
            "baseline_bytes": self._baseline_bytes,
        }
        measured = self.metering.measured(task.since, time.monotonic())
        result = task.result(where, outcome, error, produced or {}, measured, undergone)
        self.results[task.id] = result
        self.spool.free(task.id, PAYLOAD_FILE, *(() if outcome == FINISHED else (UPDATE_FILE,)))
        self._unsaved[task.id] = time.monotonic() + _SAVE_SECONDS
        self.deliver(task.id)
        self._start_next()

    # ── the trainer ────────────────────────────────────────────────────────────────────────────────────────────────
    def next_due(self) -> float | None:
        """When `on_time` wants to be called, on the monotonic clock."""
        due = list(self._unsaved.values())
        if self._disturbed is not None and (disturbing := self._disturbed.next_due()) is not None:
            due.append(disturbing)
        if self._rest is not None:
            due.append(self._rest.due(time.monotonic()))
        if self.child is not None and self.child.farewell is not None:
            due.append(self.child.farewell)
        elif self.child is not None and self.current is not None and self._rest is None:
            due.append(self._next_sample)
        if self.spool.spare and self.current is None:
            due.append(self._idle_since + _IDLE_SECONDS)
        return min(due, default=None)

    def on_time(self) -> None:
        """Save and sample what is due; kill what should have ended."""
        child, now = self.child, time.monotonic()
        self.save(now)
        if self._disturbed is not None:
            self._disturbed.on_time(now)
        if self.current is None and now >= self._idle_since + _IDLE_SECONDS:
            self.spool.clear()
        if self._rest is not None and self.current is not None:
            self._continue_rest(self.current, self._rest, now)
        if child is None:
            return
        if child.farewell is not None and now >= child.farewell:
            child.kill()
        if self.current is not None and self._rest is None and now >= self._next_sample:
            self._sample(child, now)

    def hear(self, child: Child) -> None:
        """Take what the trainer says; one that does not keep to its protocol is of no use any more."""
        try:
            messages = child.receive()
            for message in messages or []:
                self._take_message(child, message)
        except WireError as error:
            self._break_off(child, str(error))
            return
        if messages is None:
            child.farewell = time.monotonic() + _FAREWELL_SECONDS

    def look_after(self) -> None:
        """A child process may have ended: say how that ends its job; what it still had to say is heard first."""
        child = self.child
        ended = child.reap() if child is not None else None
        if child is None or ended is None:
            return
        with contextlib.suppress(WireError):
            for message in child.receive() or []:
                self._take_message(child, message)
        task = self.current if self._rest is None else None  # a node that rests needs no trainer
        phase = self._meter.end(dead=ended[1]) if task is not None else None
        killed_for_memory, tail = child.out_of_memory(), child.log_tail()
        self._drop(child)
        if child.unloading:
            self.outbox.tell({"type": "unloaded"})
        if task is None or phase is None:
            return
        if child.unloading:  # it was handed a job while it was leaving
            self._undisturb()
            self.current = None
            self.queue.appendleft(task)
            self._start_next()
            return
        task.phases.append(phase)
        if (stopped := task.stopped()) is not None:
            self._finish(task, *stopped)
        elif killed_for_memory:
            self._finish(task, *task.out_of_memory(self.group))
        elif ended[0] == -signal.SIGTERM and self.outbox.asked_to_end(_GOING_DOWN_SECONDS):
            return  # the job has not failed: it is given again when the machine is back
        else:
            self._finish(task, FAILED, task.death(ended[0], tail))

    def stop(self) -> None:
        """Kill the trainer, and remove its group."""
        self.save()
        self.spool.clear()
        self._undisturb()
        if self.child is not None:
            self.child.kill()
            self.child.reap(block=True)
            self._drop(self.child)
        if self.group is not None:
            self.group.remove()

    def _sample(self, child: Child, now: float) -> None:
        self._meter.sample()
        self.metering.on_time(now)
        if child.out_of_memory():  # the victim may have been a process of the trainer's own: it would wait for ever
            child.kill()
        elif self.current is not None and (why := self._meter.over_budget(self._left_bytes)) is not None:
            self.current.exceeded = why  # what the kernel cannot hold it to
            child.kill()
        jitter = 0.5 + os.urandom(1)[0] / 255
        self._next_sample = now + self.settings["sample_seconds"] * jitter

    def _watch(self, pid: int | None) -> None:
        self._meter.close()
        self._meter = PhaseMeter(pid, self.group, accelerator=self._accelerator)

    def _break_off(self, child: Child, cause: str) -> None:
        task = self.current
        if task is not None:
            task.phases.append(self._meter.end())
        child.kill()
        child.reap(block=True)
        self._drop(child)
        if task is not None:
            self._finish(task, FAILED, cause)

    def _take_message(self, child: Child, message: dict[str, Any]) -> None:
        task = self.current
        if task is not None and task.dropped_out is not None:
            return  # it has been killed: what it had still said is lost with it
        if "unloaded" in message:
            child.unloading = False
            self.outbox.tell({"type": "unloaded"})
        elif "ready" in message:
            self._take_ready(child, task)
        elif task is None:
            raise WireError(f"the trainer sent {str(message)[:200]} between two jobs")
        elif message.get("done", message.get("failed")) == task.id:
            self._take_end(child, task, message)
        elif "phase" in message:
            self._begin_phase(child, task, str(message["phase"])[:100], _count(message.get("accelerator_bytes")))
        elif "progress" in message:
            self._pass_on(task, message["progress"])
        else:
            raise WireError(f"the trainer sent {str(message)[:200]}, which means nothing here")

    def _take_ready(self, child: Child, task: Task | None) -> None:
        child.ready = True
        started = self._meter.end()
        self._baseline_bytes = self._meter.anonymous_bytes
        if task is not None:
            task.phases.append(started)
            self._hand_over(task, child)

    def _begin_phase(self, child: Child, task: Task, name: str, reserved: int | None) -> None:
        if name != self._meter.name:
            task.phases.append(self._meter.end(reserved=reserved))
            self._open_phase(task, name)
        child.send({"go": True})

    def _open_phase(self, task: Task, name: str) -> None:
        self._meter.begin(name)
        self.outbox.tell({"type": "event", "id": task.id, "phase": name})

    def _pass_on(self, task: Task, progress: Any) -> None:
        if not isinstance(progress, dict):
            raise WireError("the trainer sent progress that is not an object")
        if self.child is not None and self._drop_out(task, self.child, progress):
            return
        progress = {"peak_bytes": self._meter.estimate_bytes, **progress}
        self.outbox.tell_if_it_listens({"type": "event", "id": task.id, "progress": progress})

    def _take_end(self, child: Child, task: Task, message: dict[str, Any]) -> None:
        if "done" in message and self._drop_out(task, child, None):
            return
        task.phases.append(self._meter.end())
        if "done" in message:
            self._take_done(task, message)
        elif child.out_of_memory():
            child.kill()  # it may have lost a process of its own, and is not to be trusted with another job
            child.reap(block=True)
            self._drop(child)
            self._finish(task, *task.out_of_memory(self.group))
        else:
            task.phase = str(message.get("phase") or task.phases[-1]["name"])
            self._finish(task, str(message.get("outcome") or FAILED), str(message.get("error"))[:4000])

    def _take_done(self, task: Task, message: dict[str, Any]) -> None:
        produced = message.get("result")
        if isinstance(produced, dict):
            self._finish(task, FINISHED, None, {**produced, "hash": message.get("hash")})
        else:
            self._finish(task, FAILED, "the trainer said it was done, and gave no result")

    def _drop(self, child: Child) -> None:
        if self._disturbed is not None:
            self._disturbed.lose_trainer()
        child.close()
        self.child = None
        self._watch(None)
        if self.group is not None:
            self.group.kill()  # what the trainer had started itself


def _count(value: Any) -> int | None:
    return value if type(value) is int else None
