"""An agent as the controller sees it, over all its lives: a channel, the job it has, and contact lost and found again.

Everything here happens in the engine's loop and waits for nothing; what may wait is an errand.  A job's way:

    reach the agent ─► hello, welcome ─► deploy what is lacking ─► send ─► events, update, result
         ▲                                                          │
         └───────────── after a pause, for a while ◄─── link lost ──┘

The welcome says what the agent has.  A job that it knows is not sent again, one whose result waits is collected.  An
agent that is another one than before has lost the job: where the device was restarted the job is sent again, once;
where the agent was killed it ends as unreachable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.assigned import Assigned, UpdateSink, accept
from testbed.clock_offset import ClockOffset
from testbed.errors import DeviceError, DiskError, LockedError, TestbedError, WireError
from testbed.job import FAILED, TIMED_OUT, UNREACHABLE, Result
from testbed.live_view import LINK_LOST, POWER_CYCLE
from testbed.node.frames import PROTOCOL, Channel, Header, NoSink, Sink
from testbed.pulse import Pulse

if TYPE_CHECKING:
    import socket

    from testbed.devices import Node
    from testbed.errands import Errands, Outcome

#: A cancelled job's result takes as long as killing a trainer does.
CANCEL_SECONDS = 15.0
#: Between two attempts to be in contact again: from the first to the second number, doubling.
PAUSE_SECONDS = (0.25, 4.0)

#: A node's clock that is known less well than this is asked for before the next job.
_CLOCK_SECONDS = 0.01

#: device, client, phase, progress
EventListener = Callable[[str, "int | None", "str | None", "Mapping[str, Any] | None"], None]
#: device, figures
TelemetryListener = Callable[[str, "Mapping[str, Any]"], None]
#: What costs a device its job.  Whatever else keeps it from its first one (a lock, a host key, a right, a cap that
#: cannot be had) a person must see to before the run makes sense.
COSTS_A_JOB = (DeviceError, DiskError)


class AttachedNode:
    """One device's agent over the whole run, whichever of its lives it is in."""

    def __init__(
        self, node: Node, run: str, listener: EventListener, on_telemetry: TelemetryListener, errands: Errands
    ) -> None:
        self.node = node
        self.run = run
        self.listener = listener
        self.on_telemetry = on_telemetry
        self.clock = ClockOffset()
        self.channel: Channel | None = None
        self.welcome: Header | None = None  # the newest
        self.current: Assigned | None = None
        self.unloading = False
        self.ended: list[tuple[Result, Path | None]] = []
        self.fatal: TestbedError | None = None
        self.late = False  # it was out of reach when the run began: what keeps it away then costs its jobs only
        self.errand = False  # one at a time
        self._errands = errands
        self._greeted = False
        self._given_up: set[str] = set()  # jobs that ended here, and perhaps go on there
        self._hangs = False  # an agent is there, and of no use
        self._refused = False  # it will be so at the next attempt too
        self._lost_at: float | None = None
        self._lost_idle = False  # while there was no job: the next one begins with looking for the agent
        self._cause = ""
        self._attempts = 0
        self._next_attempt: float | None = None
        self._pulse = Pulse(node.silence_seconds)

    @property
    def busy(self) -> bool:
        return self.current is not None or self.unloading or bool(self.ended)

    # ── jobs ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def assign(self, assigned: Assigned) -> None:
        """Take a job; how it ends shows in `ended`."""
        self.current = assigned
        self._given_up.discard(assigned.job.id)
        self._attempts, self._lost_at = 0, None
        if self._lost_idle:
            self._lost_idle = False
            self._look_again(assigned)
        self._advance()

    def _look_again(self, current: Assigned) -> None:
        """From now on, for as long as the node has patience."""
        self._lost_at = time.monotonic()
        if self.node.reconnect_seconds:
            self.listener(self.node.name, current.job.client, LINK_LOST, None)

    def _advance(self) -> None:
        """Do what the current job needs next; errands, welcomes and timers come back here."""
        current = self.current
        if current is None or self.errand or self._next_attempt is not None:
            return
        if self.channel is None:
            self._reach(current)
        elif self._greeted and not current.sent:
            if self.node.holds(current.contents):
                self._send(current)
            else:
                self._deploy(current)

    def _send(self, current: Assigned, *, payload: bool = True) -> None:
        """Send a job, or where the agent knows it only its name: what waits is answered then."""
        job = current.job
        header = {"type": "job", "id": job.id, "job": job.to_json(), "hash": current.payload_hash}
        self._pulse.heard()  # from here on
        if self.clock.half_width_seconds > _CLOCK_SECONDS:
            self._ping()
        try:
            if self.channel is not None:
                self.channel.writer.pace = current.pace
                current.bytes_down += self.channel.send(header, current.payload if payload else None)
        except (WireError, OSError) as error:
            self._end(current.ended(self.node.name, FAILED, str(error)))
            return
        current.sent = True
        if not current.delivered:
            current.delivered = True
            current.start_clock()

    def abandon(self) -> None:
        """Nobody waits for the current job any more."""
        if self.current is not None:
            self._disown(self.current.job.id)
        self.current = None
        self._next_attempt = None

    def _disown(self, job: str) -> None:
        """Have the agent forget a job, now or when it is in contact again."""
        self._given_up.add(job)
        if self.channel is not None and self._greeted:
            self.channel.send({"type": "cancel", "id": job, "outcome": None})

    def stored(self, job: str) -> None:
        """The result is safe on the controller: the agent may forget it."""
        if self.channel is not None:
            self.channel.send({"type": "stored", "id": job})

    def unload(self) -> None:
        """Ask for the trainer's memory back; `unloading` is False again when that is done."""
        if self.channel is not None:
            self.unloading = True
            self._pulse.heard()
            self.channel.send({"type": "unload"})

    def _end(self, result: Result, update: Path | None = None) -> None:
        if result.outcome == FAILED:
            self.node.forget()
        if self.channel is not None:
            self.channel.writer.pace = None
        self.current = None
        self.ended.append((result, update))

    # ── errands ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _reach(self, current: Assigned) -> None:
        node, again = self.node, self._lost_at is not None

        def reach() -> socket.socket:
            if again:
                node.hang_up()  # that a connection has broken may not have shown in it yet
            return node.reach(current.files())

        self._attempts += 1
        self.errand = True
        self._errands.send(reach, self._reached)

    def _reached(self, outcome: Outcome[socket.socket]) -> None:
        self.errand = False
        if outcome.error is not None:
            self._not_reached(outcome.error)
            return
        self._hangs = self._greeted = False
        self.channel = Channel(outcome.answer, self._open_sink, self._take_frame)
        self._pulse.heard()
        self.clock.ask()
        self.channel.send({"type": "hello", "run": self.run, "version": PROTOCOL})

    def _deploy(self, current: Assigned) -> None:
        self.errand = True
        self._errands.send(lambda: self.node.deploy(current.files()), self._deployed)

    def _deployed(self, outcome: Outcome[None]) -> None:
        self.errand = False
        if isinstance(outcome.error, DiskError):
            self._not_reached(outcome.error)
        elif outcome.error is not None:
            self._lost(str(outcome.error))
        else:
            self._pulse.heard()
            self._advance()

    def _not_reached(self, error: TestbedError) -> None:
        """Try again where the link was there before and its time is not over; else the job ends."""
        current, first_time = self.current, self.welcome is None
        if first_time and not self.late and type(error) not in COSTS_A_JOB:
            self.fatal = error
        elif current is not None and self._may_try_again() and not isinstance(error, (DiskError, LockedError)):
            low, high = PAUSE_SECONDS
            self._next_attempt = time.monotonic() + min(high, low * 2 ** (self._attempts - 1))
        elif current is not None and self.node.power_cycle is not None and not current.power_cycled:
            self._power_cycle(current, self.node.power_cycle)
        elif current is not None:
            lost = f"{self._cause}; " if self._lost_at is not None else ""
            self._give_up(FAILED if isinstance(error, DiskError) else UNREACHABLE, f"{lost}{error}")

    def _power_cycle(self, current: Assigned, power_cycle: Callable[[], None]) -> None:
        """Switch the device off and on, once a job, and look for it again as after a restart."""
        current.power_cycled = True
        self.listener(self.node.name, current.job.client, POWER_CYCLE, None)
        self.errand = True
        self._errands.send(power_cycle, self._power_cycled)

    def _power_cycled(self, outcome: Outcome[None]) -> None:
        self.errand = False
        if outcome.error is not None:
            self._give_up(UNREACHABLE, f"{self._cause}; it could not be switched off and on: {outcome.error}")
            return
        now = time.monotonic()
        self._lost_at, self._attempts = now, 1
        self._next_attempt = now + PAUSE_SECONDS[1]

    def _may_try_again(self) -> bool:
        lost_at = self._lost_at if not self._refused else None
        return lost_at is not None and time.monotonic() < lost_at + self.node.reconnect_seconds

    # ── contact lost ───────────────────────────────────────────────────────────────────────────────────────────────
    def hang_up(self) -> None:
        if self.channel is not None:
            self.channel.close()
        self.channel = None
        self._greeted = self.unloading = False

    def _lost(self, cause: str) -> None:
        """Look for the agent again: the job may go on all the while."""
        was_greeted = self._greeted
        self.hang_up()
        current = self.current
        if current is None:
            self._lose_idle(cause)
        elif self._refused:
            self._give_up(UNREACHABLE, cause)
        elif self._lost_at is None and (was_greeted or self._attempts < 2):
            self._cause, self._attempts = cause, 0 if was_greeted else self._attempts
            current.sent = False
            self._look_again(current)
            self._advance()
        else:
            self._not_reached(DeviceError(f"device {self.node.name}: {cause}"))

    def _lose_idle(self, cause: str) -> None:
        """Nobody waits for it now; the connection, which may not know yet that it has broken, is not used again."""
        self._lost_idle, self._cause = True, cause
        if not self.errand:
            self.errand = True
            self._errands.send(self.node.hang_up, self._errand_done)

    def _give_up(self, outcome: str, cause: str) -> None:
        """End the current job here; an agent that is there and does not answer is ended too."""
        current = self.current
        self.hang_up()
        self._next_attempt = None
        if current is not None:
            timed_out = current.cancelled_at is not None
            self._given_up.add(current.job.id)
            name = self.node.name
            text = cause if cause.startswith((f"device {name}", f"{name}:")) else f"device {name}: {cause}"
            self._end(current.ended(name, TIMED_OUT if timed_out else outcome, text))
        if self._hangs and not self.errand:
            self.errand, self._hangs = True, False
            self._errands.send(self.node.kill, self._errand_done)

    def _errand_done(self, _: Outcome[None]) -> None:
        self.errand = False
        self._advance()

    # ── the clock ──────────────────────────────────────────────────────────────────────────────────────────────────
    def next_due(self) -> float | None:
        """When `on_time` wants to be called, on the monotonic clock."""
        if self._next_attempt is not None:
            return self._next_attempt
        if self.channel is None or self.errand:
            return None
        due = (self._pulse.due, self._job_due(), self.channel.writer.due)
        return min(at for at in due if at is not None)

    def on_time(self) -> None:
        """Try again, ask whether the agent lives, cancel a job that takes too long: whatever is due."""
        now = time.monotonic()
        if self._next_attempt is not None:
            if now >= self._next_attempt:
                self._next_attempt = None
                self._advance()
        elif self.channel is not None and not self.errand:  # an errand has the line, and its own limits
            self._check_job(now)
            self._check_contact(now)

    def _check_contact(self, now: float) -> None:
        if self.channel is None or now < self._pulse.due:
            return
        if not self._pulse.awaiting:
            self._pulse.asked()
            if self._greeted and not self.channel.writer:  # else what is on its way there is asking enough
                self._ping()
            return
        self._hangs = not self.node.reconnect_seconds or not self._greeted
        silent = f"its agent has not answered for {self._pulse.silent_seconds:.0f} s"
        if self.node.reconnect_seconds:
            self._lost(silent)
        else:
            self._give_up(UNREACHABLE, silent)

    def _ping(self) -> None:
        if self.channel is not None:
            self.clock.ask()
            self.channel.send({"type": "ping"})

    def _job_due(self) -> float | None:
        current = self.current
        if current is None or not current.sent:
            return None
        return current.cancelled_at + CANCEL_SECONDS if current.cancelled_at is not None else current.deadline

    def _check_job(self, now: float) -> None:
        """Cancel a job that takes too long; give up an agent that does not manage even that."""
        current, due = self.current, self._job_due()
        if current is None or due is None or now < due or self.channel is None or self.channel.reader.inside_payload:
            return
        if current.cancelled_at is None:
            current.cancelled_at = now
            self._cancel(current)
        else:
            self._hangs = True
            self._give_up(TIMED_OUT, f"it took too long{current.limit_text}, and its agent did not cancel it")

    def _cancel(self, current: Assigned) -> None:
        if self.channel is not None:
            self.channel.send({"type": "cancel", "id": current.job.id, "outcome": TIMED_OUT})

    # ── the channel ────────────────────────────────────────────────────────────────────────────────────────────────
    def flush(self) -> None:
        """Send what the channel takes; that it takes something is a sign of life."""
        if self.channel is None:
            return
        before = self.channel.writer.sent_bytes
        self.channel.flush()
        if self.channel.writer.sent_bytes > before:
            self._pulse.heard()

    def receive(self) -> None:
        """Take in what has come; an end of the channel is dealt with here."""
        if self.channel is None:
            return
        self._pulse.heard()
        try:
            alive = self.channel.receive()
        except WireError as error:
            self._misread(str(error))
            return
        if not alive:
            self._lost("the connection to its agent ended")

    def _misread(self, cause: str) -> None:
        """What came was no frame: once that may be the way, twice it is the agent."""
        current = self.current
        self._refused = self._refused or (current is not None and current.misread)
        if current is not None:
            current.misread = True
        self._lost(cause)

    def _open_sink(self, header: Header, _: int) -> Sink:
        current = self.current
        if header["type"] != "update" or current is None or header.get("id") != current.job.id:
            return NoSink()
        current.sink = UpdateSink(current.update_path)
        return current.sink

    def _take_frame(self, header: Header, frame_bytes: int, _: Sink | None) -> None:
        kind, current = header["type"], self.current
        if kind == "welcome":
            self._take_welcome(header)
        elif kind == "pong" and "clock" in header:
            self.clock.answered(header["clock"])
        elif kind == "telemetry":
            self.on_telemetry(self.node.name, header.get("figures") or {})
        elif kind == "unloaded":
            self.unloading = False
        elif kind == "superseded":
            self._refused = True
        elif kind == "refused":
            self._refused = True
            raise WireError(f"its agent refused: {str(header.get('error'))[:1000]}")
        elif current is not None and header.get("id") == current.job.id:
            if kind in ("update", "result"):
                current.bytes_up += frame_bytes
            self._take_news(kind, header, current)

    def _take_welcome(self, header: Header) -> None:
        """The agent says which one it is, and what it has."""
        before, self.welcome = self.welcome, header
        if before is not None and before.get("boot") != header.get("boot"):
            self.clock.forget()
        elif "clock" in header:
            self.clock.answered(header["clock"])
        has = {header.get("running"), *header.get("queued", ()), *header.get("waiting", ())}
        self._greeted, self._refused, self._lost_at, self._attempts = True, False, None, 0
        for job in self._given_up & has:
            self._disown(job)
        self._given_up.clear()
        current = self.current
        if current is None:
            return
        if current.job.id in has:
            self._take_up(current)
        elif current.delivered and before is not None and before.get("life") != header.get("life"):
            self._begin_again(current, restarted=before.get("boot") != header.get("boot"))
        else:
            self._advance()

    def _take_up(self, current: Assigned) -> None:
        """The agent has the job, or its result."""
        self._send(current, payload=False)
        if current.cancelled_at is not None:
            self._cancel(current)
        elif current.phase is not None:
            self.listener(self.node.name, current.job.client, current.phase, None)

    def _begin_again(self, current: Assigned, *, restarted: bool) -> None:
        """Another agent than the one that had the job: what became of that one says what becomes of the job."""
        if restarted and not current.restarts:
            current.restarts += 1
            current.delivered, current.cancelled_at = False, None
            self.node.forget()
            self._advance()
            return
        how = "the device was restarted again" if restarted else "its agent was killed"
        self._end(current.ended(self.node.name, UNREACHABLE, f"device {self.node.name}: {how} while it had the job"))

    def _take_news(self, kind: str, header: Header, current: Assigned) -> None:
        if kind == "event":
            current.phase = header.get("phase") or current.phase
            self.listener(self.node.name, current.job.client, header.get("phase"), header.get("progress"))
        elif kind == "result":
            result, update = accept(header.get("result"), current, self.node.name)
            self._end(self._dated(result), update)

    def _dated(self, result: Result) -> Result:
        """With the time of its beginning by the controller's clock, as far as that is known."""
        begun = result.measurement.begun_monotonic_seconds
        unix = self.clock.to_unix(begun) if begun is not None else None
        if unix is None:
            return result
        measured = replace(result.measurement, begun_unix_seconds=unix, clock_seconds=self.clock.half_width_seconds)
        return replace(result, measurement=measured)
