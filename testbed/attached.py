"""An agent as the controller sees it: a channel, the job it has, and what came back, checked before it is believed."""

from __future__ import annotations

import hashlib
import select
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import DeviceError, StoreError, TestbedError, WireError
from testbed.job import FAILED, OUTCOMES, TIMED_OUT, UNREACHABLE, Job, Result, TensorSpec
from testbed.node.frames import PROTOCOL, Channel, Header, NoSink, Sink
from testbed.node.spool import FileSink
from testbed.node.tensors import read_tensor_header

if TYPE_CHECKING:
    from testbed.devices import Node

#: The first word of an agent that lives takes milliseconds; one that is frozen takes for ever.
WELCOME_SECONDS = 15.0
#: How long an agent that listens no more takes to be gone altogether.
GONE_SECONDS = 5.0
PING_SECONDS = 5.0
LOST_SECONDS = 60.0
#: A cancelled job's result takes as long as killing a trainer does.
CANCEL_SECONDS = 15.0

#: device, client, phase, progress
EventListener = Callable[[str, "int | None", "str | None", "Mapping[str, Any] | None"], None]


class UpdateSink(FileSink):
    """Takes an update into its file, and counts and hashes it on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(self.partial)
        self.digest = hashlib.sha256()

    def write(self, data: memoryview) -> None:
        self.digest.update(data)
        super().write(data)

    def keep(self) -> None:
        """The update is what it should be."""
        self.partial.rename(self.path)

    def discard(self) -> None:
        """The update is of no use."""
        self.partial.unlink(missing_ok=True)


class Assigned:
    """A job on its way: what was sent, what has come."""

    def __init__(self, job: Job, payload: Path | None, update_path: Path, timeout_seconds: float | None) -> None:
        self.job = job
        self.payload = payload
        self.update_path = update_path
        self.payload_hash = _file_hash(payload) if payload is not None else None
        self.deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
        self.cancelled_at: float | None = None
        self.reattached = False
        self.bytes_down = 0
        self.bytes_up = 0
        self.sink: UpdateSink | None = None

    def ended(self, device: str, outcome: str, error: str) -> Result:
        """A result that the controller has to give, because the agent did not."""
        return Result(self.job.id, self.job.client, self.job.round, outcome, device, self.job.kind, error)


class AttachedNode:
    """One device's agent over the whole run, whichever of its lives it is in."""

    def __init__(self, node: Node, run: str, listener: EventListener) -> None:
        self.node = node
        self.run = run
        self.listener = listener
        self.channel: Channel | None = None
        self.welcome: Header | None = None
        self.current: Assigned | None = None
        self.unloading = False
        self.ended: list[tuple[Result, Path | None]] = []
        self._starting = False
        self._superseded = False
        self._last_heard = 0.0
        self._pinged = False

    # ── contact ────────────────────────────────────────────────────────────────────────────────────────────────────
    def begin(self) -> None:
        """Start an agent where none lives; `connect` waits for it."""
        if self.channel is None and not self._starting and not self.node.alive():
            self.node.begin_start()
            self._starting = True

    def connect(self) -> None:
        """Be in contact with a living agent; raises DeviceError, or LimitError when it cannot cap its trainer."""
        if self.channel is not None:
            return
        self.begin()
        self._finish_start()
        try:
            self._attach()
        except OSError:  # it is just ending: its socket is closed before its lock is free
            self.node.wait_gone(GONE_SECONDS)
            self.begin()
            self._finish_start()
            self._attach_or_tell()
        self._greet()

    def _finish_start(self) -> None:
        if self._starting:
            self._starting = False
            self.node.finish_start()

    def _attach(self) -> None:
        self.channel, self.welcome = Channel(self.node.attach(), self._open_sink, self._take_frame), None

    def _attach_or_tell(self) -> None:
        try:
            self._attach()
        except OSError as error:
            raise DeviceError(f"device {self.node.name}: its agent cannot be reached: {error.strerror}") from None

    def _greet(self) -> None:
        self._superseded = False
        if self.channel is not None:
            self.channel.send({"type": "hello", "run": self.run, "version": PROTOCOL})
        self._await(lambda: self.welcome is not None, WELCOME_SECONDS)

    def _await(self, condition: Callable[[], bool], patience_seconds: float) -> None:
        deadline = time.monotonic() + patience_seconds
        while not condition():
            problem = self._hear_once(deadline)
            if problem is not None:
                self.hang_up()
                raise DeviceError(f"device {self.node.name}: {problem}")

    def _hear_once(self, deadline: float) -> str | None:
        if self.channel is None or not _readable(self.channel, deadline):
            return "its agent does not answer"
        try:
            return None if self.channel.receive() else "its agent hung up"
        except WireError as error:
            return str(error)

    def hang_up(self) -> None:
        if self.channel is not None:
            self.channel.close()
        self.channel = None
        self.unloading = False

    def receive(self) -> None:
        """Take in what has come; an end of the channel is dealt with here."""
        if self.channel is None:
            return
        self._last_heard, self._pinged = time.monotonic(), False
        try:
            alive = self.channel.receive()
        except WireError as error:
            self._lost(str(error))
            return
        if not alive:
            self._lost("the connection to its agent ended")

    def keep_contact(self) -> None:
        """Ask an agent that has been silent for long whether it lives."""
        silent = time.monotonic() - self._last_heard
        if self.channel is None or silent < PING_SECONDS:
            return
        if silent > LOST_SECONDS:
            self._give_up(f"its agent has not answered for {silent:.0f} s")
        elif not self._pinged:
            self._pinged = True
            self.channel.send({"type": "ping"})

    def next_due(self) -> float:
        """When `keep_contact` or `check_time` want to be called, on the monotonic clock."""
        due = [self._last_heard + (LOST_SECONDS if self._pinged else PING_SECONDS)]
        current = self.current
        if current is not None and current.cancelled_at is not None:
            due.append(current.cancelled_at + CANCEL_SECONDS)
        elif current is not None and current.deadline is not None:
            due.append(current.deadline)
        return min(due)

    def _lost(self, cause: str) -> None:
        """Try to be in contact again, once: the job may go on all the while.  Else it ends as unreachable."""
        self.hang_up()
        current = self.current
        if current is None:
            return
        if not current.reattached and not self._superseded and self.node.alive():
            current.reattached = True
            try:
                self._attach_or_tell()
                self._greet()
                self._send(current)
            except DeviceError:
                self.hang_up()
            else:
                return
        outcome = TIMED_OUT if current.cancelled_at is not None else UNREACHABLE
        self._end(current.ended(self.node.name, outcome, f"device {self.node.name}: {cause}"))

    def _give_up(self, cause: str) -> None:
        """An agent that is there and does not answer is of no use: the next job gets a fresh one."""
        if self.current is not None:
            self.current.reattached = True
        self._lost(cause)
        with suppress(DeviceError):
            self.node.kill()

    # ── jobs ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def assign(self, assigned: Assigned) -> None:
        """Send a job; an agent that cannot be had ends it as unreachable.  Raises LimitError."""
        self.current = assigned
        try:
            self.connect()
        except DeviceError as error:
            self._end(assigned.ended(self.node.name, UNREACHABLE, str(error)))
            return
        self._last_heard = time.monotonic()
        self._send(assigned)

    def _send(self, assigned: Assigned) -> None:
        job = assigned.job
        header = {"type": "job", "id": job.id, "job": job.to_json(), "hash": assigned.payload_hash}
        try:
            if self.channel is not None:
                assigned.bytes_down = self.channel.send(header, assigned.payload)
        except WireError as error:
            self._end(assigned.ended(self.node.name, FAILED, str(error)))

    def check_time(self) -> None:
        """Cancel a job that takes too long; give up an agent that does not manage even that."""
        current, now = self.current, time.monotonic()
        if current is None or self.channel is None:
            return
        if current.cancelled_at is None:
            if current.deadline is not None and now >= current.deadline and not self.channel.reader.inside_payload:
                current.cancelled_at = now
                self.channel.send({"type": "cancel", "id": current.job.id, "outcome": TIMED_OUT})
        elif now >= current.cancelled_at + CANCEL_SECONDS:
            self._give_up("it took too long, and its agent did not cancel it")

    def abandon(self) -> None:
        """Nobody waits for the current job any more."""
        if self.current is not None and self.channel is not None:
            self.channel.send({"type": "cancel", "id": self.current.job.id, "outcome": FAILED})
        self.current = None

    def stored(self, job: str) -> None:
        """The result is safe on the controller: the agent may forget it."""
        if self.channel is not None:
            self.channel.send({"type": "stored", "id": job})

    def unload(self) -> None:
        """Ask for the trainer's memory back; `unloading` is False again when that is done."""
        if self.channel is not None:
            self.unloading = True
            self._last_heard = time.monotonic()
            self.channel.send({"type": "unload"})

    def stop(self) -> None:
        """Ask the agent to end."""
        if self.channel is None and (self._starting or self.node.alive()):
            try:
                self.connect()
            except TestbedError:  # it has not started, or will be killed
                return
        if self.channel is not None:
            self.channel.send({"type": "stop"})

    def _end(self, result: Result, update: Path | None = None) -> None:
        self.current = None
        self.ended.append((result, update))

    # ── frames ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def _open_sink(self, header: Header, _: int) -> Sink:
        current = self.current
        if header["type"] != "update" or current is None or header.get("id") != current.job.id:
            return NoSink()
        current.sink = UpdateSink(current.update_path)
        return current.sink

    def _take_frame(self, header: Header, frame_bytes: int, _: Sink | None) -> None:
        kind, current = header["type"], self.current
        if kind == "welcome":
            self.welcome = header
        elif kind == "unloaded":
            self.unloading = False
        elif kind == "superseded":
            self._superseded = True
        elif kind == "refused":
            raise WireError(f"its agent refused: {str(header.get('error'))[:1000]}")
        elif current is not None and header.get("id") == current.job.id:
            if kind in ("update", "result"):
                current.bytes_up += frame_bytes
            self._take_news(kind, header, current)

    def _take_news(self, kind: str, header: Header, current: Assigned) -> None:
        if kind == "event":
            self.listener(self.node.name, current.job.client, header.get("phase"), header.get("progress"))
        elif kind == "result":
            self._end(*accept(header.get("result"), current, self.node.name))


def accept(data: Any, assigned: Assigned, device: str) -> tuple[Result, Path | None]:
    """What an agent says about its job, believed only as far as it can be checked.

    Raises StoreError when the controller's own disk did not take the update.
    """
    sink = assigned.sink
    if sink is not None and sink.error is not None:
        raise StoreError(f"{sink.path}: {sink.error.strerror}; free some space, then continue with --resume")
    try:
        result = _result(data, assigned, device)
    except WireError as error:
        result = assigned.ended(device, FAILED, str(error))
    try:
        if result.finished:
            _check_update(result, data.get("hash"), sink)
    except WireError as error:
        result = replace(result, outcome=FAILED, phase="send", error=str(error))
    if sink is not None and not result.finished:
        sink.discard()
    if sink is None or not result.finished:
        return result, None
    sink.keep()
    return result, sink.path


def _result(data: Any, assigned: Assigned, device: str) -> Result:
    job = assigned.job
    try:
        result = Result.from_json({key: value for key, value in data.items() if key != "hash"})
        numbers_fit = all(type(count) is int and count >= 0 for count in (result.examples, result.tokens))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WireError(f"the result of job {job.id} cannot be read: {type(error).__name__}: {error}") from None
    same = (result.job, result.client, result.round, result.kind) == (job.id, job.client, job.round, job.kind)
    plain = isinstance(result.scalars, dict) and isinstance(result.state, str | None)
    if not same or result.outcome not in OUTCOMES or not numbers_fit or not plain:
        raise WireError(f"the result of job {job.id} is not what was asked for: {str(data)[:500]}")
    counted = replace(result.measurement, bytes_down=assigned.bytes_down, bytes_up=assigned.bytes_up)
    return replace(result, device=device, measurement=counted)


def _check_update(result: Result, expected_hash: Any, sink: UpdateSink | None) -> None:
    """The tensors must be those that the result names, and arrive as they were written."""
    if sink is None:
        if result.tensors:
            raise WireError("the result names tensors, and none came")
        return
    if expected_hash is not None and expected_hash != sink.digest.hexdigest():
        raise WireError("the update is not what the trainer wrote: its hash differs")
    wrong = [spec.name for spec in result.tensors if not _ranges_fit(spec)]
    if wrong:
        raise WireError(f"the ranges of tensor {wrong[0]!r} do not have its shape")
    found = read_tensor_header(sink.partial, "the update")
    said = {spec.name: (spec.dtype, spec.shape) for spec in result.tensors}
    if found != said:
        odd = sorted(name for name in {*found, *said} if found.get(name) != said.get(name))
        described = ", ".join(f"{name}: said {said.get(name)}, found {found.get(name)}" for name in odd[:3])
        raise WireError(f"the update's tensors are not those that the result names ({len(odd)} differ: {described})")


def _ranges_fit(spec: TensorSpec) -> bool:
    """Whether the ranges cover exactly the tensor's shape."""
    if spec.ranges is None:
        return True
    edges = [edge for pair in spec.ranges for edge in pair]
    sizes = tuple(stop - start for start, stop in spec.ranges)
    return all(type(edge) is int and edge >= 0 for edge in edges) and sizes == spec.shape


def _readable(channel: Channel, deadline: float) -> bool:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(max(0, int((deadline - time.monotonic()) * 1000))))


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
