"""The agent: one process per run and device, which starts the trainer inside its limits and outlives it.

    python -I -S -c "…; from testbed.node.agent import main; sys.exit(main(sys.argv[1:]))" SPOOL

It listens on a Unix socket in its spool, takes jobs from one controller at a time (the newest wins), hands them to the
trainer one after another, measures every phase, and says how each ended, also when the kernel killed the trainer.
Results wait in the spool until the controller has stored them; a job that is delivered again runs once, and is
answered with the result that waits.  Standard library only, and little of it: what the agent holds, a board's trainer
cannot have.

    controller → agent   hello(run, version) · job(id, job, hash)+payload · stored(id) · cancel(id, outcome | None)
                         unload · stop · ping
    agent → controller   welcome(pid, life, boot, clock, cap, running, queued, waiting) · event(id, phase | progress)
                         update(id)+payload, then result(id, result) · unloaded · refused(error) · superseded
                         telemetry(figures), every few seconds where the settings ask for it
                         pong(clock) (the answer to a ping, and from time to time while a payload comes)

A welcome's `life` is another one for every agent, its `boot` for every start of the machine; a `clock` is the node's
monotonic one, by which the controller knows when a job's windows were.

Its first line on stdout is {"ready": pid} or {"error": text, "kind": name of the error}.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import DeviceError, TestbedError, WireError
from testbed.node import limits
from testbed.node.frames import PROTOCOL, Channel, Header, NoSink
from testbed.node.landing import AGENT_LOCK, boot
from testbed.node.metering import Metering
from testbed.node.spool import (
    PAYLOAD_FILE,
    SETTINGS_FILE,
    SOCKET_FILE,
    STATE_FILE,
    FileSink,
    Spool,
    is_job_id,
)
from testbed.node.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.node.frames import Sink
    from testbed.node.pace import Pace

#: Progress is dropped when a controller that does not read has so much waiting for it.
_MAX_WAITING_BYTES = 1 << 20
#: Over a thin link a payload takes minutes, and pings wait behind it.
_SIGN_OF_LIFE_SECONDS = 1.0


class Agent:
    """The loop over listener, signals, controller and trainer; it is the worker's outbox."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], group: limits.Group | None, metering: Metering, signals: int
    ) -> None:
        self.settings = settings
        self.signals = signals  # a descriptor that gets the number of every signal
        self.spool = Spool(folder)
        self.metering = metering
        self.worker = Worker(self.spool, settings, group, metering, self)
        self.controller: Channel | None = None
        self.greeted = False
        self.stopping = False
        self.life = os.urandom(8).hex()
        self.last_heard = time.monotonic()
        self._receiving: tuple[str, float] | None = None  # the job whose payload comes, and since when
        self._gave_sign = 0.0
        self._pace: Pace | None = None
        self._telemetry_seconds: float | None = settings.get("telemetry_seconds")
        self._next_telemetry = 0.0

    def serve(self, listener: socket.socket) -> None:
        """Work until told to stop, or until nobody has been in contact for too long."""
        while not self.stopping:
            poll = select.poll()
            poll.register(listener, select.POLLIN)
            poll.register(self.signals, select.POLLIN)
            if self.worker.child is not None and self.worker.child.farewell is None:
                poll.register(self.worker.child, select.POLLIN)
            if self.controller is not None:
                sending = select.POLLOUT if self.controller.writer.wants_to_send else 0
                poll.register(self.controller, select.POLLIN | sending)
            for fd, happened in poll.poll(self._patience_ms()):
                self._handle(fd, happened, listener)
            self.worker.on_time()
            self._tell_how_it_stands()
            self.stopping = self.stopping or time.monotonic() >= self._orphaned_at()

    def _tell_how_it_stands(self) -> None:
        now = time.monotonic()
        if not self.greeted or self._telemetry_seconds is None or now < self._next_telemetry:
            return
        self._next_telemetry = now + self._telemetry_seconds
        self.metering.on_time(now)
        self.tell_if_it_listens({"type": "telemetry", "figures": self.worker.told()})

    def tell(self, header: Header) -> None:
        """Send a frame; nobody there, nobody told."""
        if self.controller is not None and self.greeted:
            self.controller.send(header)

    def tell_if_it_listens(self, header: Header) -> None:
        if self.controller is not None and self.controller.writer.waiting_bytes < _MAX_WAITING_BYTES:
            self.tell(header)

    def pace(self, pace: Pace | None) -> None:
        """From now on nothing goes to the controller faster, whichever channel it comes by."""
        self._pace = pace
        if self.controller is not None:
            self.controller.writer.pace = pace

    def send_update(self, header: Header, update: Path, then: Callable[[], None]) -> None:
        if self.controller is not None and self.greeted:
            self.controller.writer.send(header, update)
            self.controller.writer.then(then)
            self.controller.flush()

    def _handle(self, fd: int, happened: int, listener: socket.socket) -> None:
        child = self.worker.child
        if fd == self.signals:
            self._take_signals()
        elif fd == listener.fileno():
            self._accept(listener)
        elif self.controller is not None and fd == self.controller.fileno():
            self._serve_controller(self.controller, happened)
        elif child is not None and fd == child.fileno():
            self.worker.hear(child)

    def _take_signals(self) -> None:
        self._hear_signals()
        if not self.stopping:  # else what became of the trainer is no job's end
            self.worker.look_after()

    def _hear_signals(self) -> None:
        numbers = os.read(self.signals, 64)
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self.stopping = True

    def asked_to_end(self, patience_seconds: float) -> bool:
        deadline = time.monotonic() + patience_seconds
        while not self.stopping and (left := deadline - time.monotonic()) > 0:
            if select.select([self.signals], [], [], left)[0]:
                self._hear_signals()
        return self.stopping

    def _orphaned_at(self) -> float:
        """When to give up waiting for a controller.

        A channel of this machine ends with its controller.  One over a network may stand open for hours after that:
        there, what counts is when anything was heard.
        """
        if self.controller is not None and not self.settings["remote"]:
            return math.inf
        return self.last_heard + float(self.settings["orphan_seconds"])

    def _patience_ms(self) -> int | None:
        telemetry = self._next_telemetry if self.greeted and self._telemetry_seconds is not None else math.inf
        sending = self.controller.writer.due if self.controller is not None else None
        due = min(self.worker.next_due() or math.inf, self._orphaned_at(), telemetry, sending or math.inf)
        return max(0, int((due - time.monotonic()) * 1000) + 1) if due < math.inf else None

    # ── the controller ─────────────────────────────────────────────────────────────────────────────────────────────
    def _accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        self.tell({"type": "superseded"})
        self._hang_up()
        self.controller = Channel(sock, self._open_sink, self._take_frame)
        self.controller.writer.pace = self._pace

    def _serve_controller(self, channel: Channel, happened: int) -> None:
        if happened & select.POLLOUT:
            channel.flush()
        self.last_heard = time.monotonic()
        try:
            if happened & ~select.POLLOUT and not channel.receive():
                self._hang_up()
        except WireError as error:
            channel.send({"type": "refused", "error": str(error)})
            self._hang_up()
        if self._receiving is not None and self.last_heard >= self._gave_sign + _SIGN_OF_LIFE_SECONDS:
            self._gave_sign = self.last_heard
            self.tell({"type": "pong"})

    def _hang_up(self) -> None:
        if self.controller is not None:
            self.controller.close()
        if self._receiving is not None:
            self.spool.remove(self._receiving[0])  # cut off in its payload, and so not a job yet
        self.controller = self._receiving = None
        self.greeted = False
        self.last_heard = time.monotonic()
        self.worker.save()

    def _open_sink(self, header: Header, _: int) -> Sink:
        job = header.get("id")
        if not self.greeted or header["type"] != "job" or not is_job_id(job) or self.worker.knows(str(job)):
            return NoSink()
        self._receiving = (str(job), time.monotonic())
        return FileSink(self.spool.make_folder(str(job)) / PAYLOAD_FILE)

    def _take_frame(self, header: Header, _: int, sink: Sink | None) -> None:
        kind, job = header["type"], header.get("id")
        if kind == "hello":
            self._greet(header)
        elif not self.greeted:
            raise WireError("the first message must be hello")
        elif kind in ("job", "cancel", "stored") and not is_job_id(job):
            raise WireError(f"{kind}: {str(job)[:200]!r} cannot be the id of a job")
        elif (action := self._actions(sink).get(kind)) is not None:
            action(header)
        else:
            raise WireError(f"there is no message {kind[:200]!r}")

    def _actions(self, sink: Sink | None) -> dict[str, Callable[[Header], None]]:
        worker = self.worker
        return {
            "job": lambda header: self._take_job(header, sink),
            "cancel": lambda header: self._cancel(header["id"], header.get("outcome")),
            "stored": lambda header: worker.forget(header["id"]),
            "unload": lambda _: worker.unload(),
            "ping": lambda _: self.tell({"type": "pong", "clock": time.monotonic()}),
            "stop": lambda _: self._stop(),
        }

    def _cancel(self, job: str, outcome: str | None) -> None:
        """End a job with an outcome; without one nobody asks for it any more, and nothing of it stays."""
        if outcome is None:
            self.worker.drop(job)
        else:
            self.worker.cancel(job, str(outcome))

    def _take_job(self, header: Header, sink: Sink | None) -> None:
        since = self._receiving[1] if self._receiving is not None else time.monotonic()
        self._receiving = None
        self.worker.take(header, sink, since)

    def _stop(self) -> None:
        self.stopping = True

    def _greet(self, header: Header) -> None:
        if header.get("run") != self.settings["run"] or header.get("version") != PROTOCOL:
            raise WireError(
                f"this agent serves run {self.settings['run']!r} with protocol {PROTOCOL}, and was asked for run "
                f"{str(header.get('run'))[:200]!r} with protocol {str(header.get('version'))[:20]!r}"
            )
        self.greeted = True
        worker = self.worker
        self.tell(
            {
                "type": "welcome",
                "pid": os.getpid(),
                "life": self.life,
                "boot": boot(),
                "clock": time.monotonic(),
                "cap": _describe(worker.group),
                "running": worker.current.id if worker.current is not None else None,
                "queued": [task.id for task in worker.queue],
                "waiting": list(worker.results),
            }
        )

    def stop(self) -> None:
        """Leave only the spool behind; hanging up last tells the controller that it is done."""
        try:
            self.worker.stop()
        finally:
            self._hang_up()


def _create_group(settings: dict[str, Any]) -> limits.Group | None:
    if settings.get("memory_bytes") is None:
        return None
    name = f"{settings['run']}-{settings['device']}-{os.getpid()}"
    parent = settings.get("cgroup_parent")
    quota = bool(settings.get("may_be_slowed"))
    where = Path(parent) if parent else None
    return limits.create(name, settings["memory_bytes"], settings.get("cores"), where, quota=quota)


def _describe(group: limits.Group | None) -> dict[str, Any]:
    if group is None:
        return {"version": "none", "path": None, "limit_bytes": None}
    return {"version": group.version, "path": str(group.path), "limit_bytes": group.limit_bytes}


def clean_up_after(folder: Path) -> None:
    """Remove the cgroups of an agent that was killed; only call it when none is alive (the lock tells)."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        for path in json.loads((folder / STATE_FILE).read_text())["cgroups"]:
            limits.remove_path(Path(path))
    (folder / STATE_FILE).unlink(missing_ok=True)


def _lock(folder: Path) -> None:
    """One agent per spool: the lock is held until the kernel has closed our files, and so tells that we are gone."""
    fd = os.open(folder / AGENT_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DeviceError(f"{folder}: an agent is at work here already") from None


def _listen(folder: Path) -> socket.socket:
    """A socket for nobody but ourselves; bound through /proc, because a socket's path may have 107 bytes only."""
    (folder / SOCKET_FILE).unlink(missing_ok=True)
    here = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    mask = os.umask(0o177)
    try:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"/proc/self/fd/{here}/{SOCKET_FILE}")
        listener.listen(8)
    finally:
        os.umask(mask)
        os.close(here)
    return listener


def _listen_to_signals() -> int:
    """A file descriptor that gets the number of every signal."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return ours


def _say(message: dict[str, Any]) -> None:
    """The first and only line on stdout; whoever started us reads it and goes on."""
    os.write(1, json.dumps(message).encode() + b"\n")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def run(folder: Path) -> None:
    """Serve a spool until the end; raises TestbedError when it cannot begin."""
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    _lock(folder)
    clean_up_after(folder)
    signals = _listen_to_signals()
    metering = Metering(folder, settings)
    try:
        group = _create_group(settings)
    except BaseException:
        metering.close()
        raise
    agent = Agent(folder, settings, group, metering, signals)
    try:
        cgroups = [str(path) for path in group.paths] if group is not None else []
        (folder / STATE_FILE).write_text(json.dumps({"pid": os.getpid(), "cgroups": cgroups}))
        with _listen(folder) as listener:
            _say({"ready": os.getpid()})
            agent.serve(listener)
    finally:
        (folder / SOCKET_FILE).unlink(missing_ok=True)
        agent.stop()
        metering.close()
        (folder / STATE_FILE).unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    """The command line: one argument, the spool."""
    try:
        run(Path(arguments[0]).absolute())
    except (TestbedError, OSError, ValueError, KeyError) as error:
        _say({"error": str(error), "kind": type(error).__name__})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
