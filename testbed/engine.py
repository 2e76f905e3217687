"""The native engine: jobs out to agents and results back, each device at its own pace, one job at a time.

    with Engine(inventory, folder, run, update_path=...) as engine:
        for result, update in engine.run([("device", job, payload), ...]):
            ...

Failure is data: every job ends with a result.  A controller that is killed leaves agents that end by themselves when
nobody has contacted them for `orphan_seconds`; an engine that is started again on the same folder and given the same
jobs attaches to agents that still live, or starts new ones on their spools, and collects what waits there.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from testbed.assigned import Assigned, file_hash
from testbed.attached import COSTS_A_JOB, AttachedNode, EventListener, TelemetryListener
from testbed.devices import Node, NodeSettings, make_node
from testbed.errands import Errands
from testbed.errors import TestbedError, UsageError

if TYPE_CHECKING:
    from typing import Self

    from testbed.devices._agent_node import AgentNode
    from testbed.errands import Outcome
    from testbed.inventory import Device
    from testbed.job import Job, Result

_STOP_SECONDS = 10.0
#: What telling a device to stop, and letting go of it, may take over a slow link.
_LEAVE_SECONDS = 120.0
#: Devices that are connected to, sent to or started at the same time.
_MAX_ERRANDS = 32
#: What is left of the free memory for the controller and the page cache, when devices stand side by side.
_MEMORY_SHARE = 0.8


class _Line:
    """A device with the jobs that wait for it."""

    def __init__(self, attached: AttachedNode) -> None:
        self.attached = attached
        self.jobs: deque[Callable[[], Assigned]] = deque()
        self.active = False


class _Machine:
    """What devices share that are emulated on one machine: its cores, and its memory."""

    def __init__(self) -> None:
        self.lines: list[_Line] = []
        self.devices: list[Device] = []
        self.parallel = 1
        self.unload_between = False

    def share(self, facts: Mapping[str, Any], parallel: int | None, unload_between: bool | None) -> None:
        """Settle who may be at work and resident beside whom; without facts it is this machine."""
        board = facts.get("board") or {}
        cores = board.get("cores") if facts else os.cpu_count()
        self.parallel = parallel or max(1, cores or 1)
        available = int(_MEMORY_SHARE * (board.get("memory_bytes") or 0)) if facts else None
        fit = fit_side_by_side(self.devices, available)
        self.unload_between = unload_between if unload_between is not None else not fit


class Engine:
    """Runs jobs on the agents of a run's devices.

    `parallel`: devices of one machine at work at the same time (None: as many as it has cores); `unload_between`: a
    trainer gives its memory back before the next device of its machine begins (None: where the budgets do not fit into
    its memory side by side).  Boards are machines of their own.
    """

    def __init__(  # noqa: PLR0913 -- settings of a run, each by name
        self,
        devices: Iterable[Device],
        folder: Path,
        run: str,
        *,
        update_path: Callable[[str], Path] | None = None,
        content_path: Callable[[str], Path] | None = None,
        settings: NodeSettings | None = None,
        on_event: EventListener = lambda *_: None,
        on_telemetry: TelemetryListener = lambda *_: None,
        job_timeout_seconds: float | None = None,
        parallel: int | None = None,
        unload_between: bool | None = None,
    ) -> None:
        """`update_path(job id)` says where an update is put (default: below folder/updates).

        `content_path(hash)` says where the controller has a content (None: nothing is deployed).
        """
        known = tuple(devices)
        self.settings = settings or NodeSettings(run, folder / "nodes")
        self.problems: tuple[str, ...] = ()  # of `close`: what could not be ended
        self._update_path = update_path or (lambda job: folder / "updates" / f"{job}.safetensors")
        self._content_path = content_path
        self._timeout = job_timeout_seconds
        self._errands = Errands(max(1, min(_MAX_ERRANDS, len(known))))
        self._lines: dict[str, _Line] = {}
        self._machines: dict[str, _Machine] = {}
        self._payload_hashes: dict[Path, str] = {}
        for device in known:
            node = make_node(device, self.settings)
            line = self._lines[device.name] = _Line(AttachedNode(node, run, on_event, on_telemetry, self._errands))
            machine = self._machines.setdefault(node.machine, _Machine())
            machine.lines.append(line)
            machine.devices.append(device)
        self._beside = _wire(known, {name: line.attached.node for name, line in self._lines.items()}, self.settings)
        for name, machine in self._machines.items():
            machine.share(self._facts_of(name, machine), parallel, unload_between)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def node(self, device: str) -> Node:
        """The node of a device; raises UsageError for a device that the run does not have."""
        if device not in self._lines:
            raise UsageError(f"there is no device {device!r} in this run; there are {', '.join(self._lines)}")
        return self._lines[device].attached.node

    @property
    def deployed_bytes(self) -> int:
        """What deploying has sent so far: code, configuration, blocks and shards that devices lacked."""
        nodes = [*(line.attached.node for line in self._lines.values()), *self._beside]
        return sum(node.deployed_bytes for node in nodes)

    def caps(self) -> dict[str, dict[str, object]]:
        """Device → version, path and limit of its cgroup, of every agent that has been in contact."""
        told = {name: line.attached.welcome for name, line in self._lines.items()}
        return {name: welcome["cap"] for name, welcome in told.items() if welcome is not None}

    def hold(self) -> dict[str, TestbedError]:
        """Hold every device for the run, all at once; those out of reach, or with a full disk, each with its cause.

        Raises, in one message, what a person must see to first: devices that another run holds, host keys, rights,
        meters that cannot be read.
        Raises DeviceError too when there is no device at all that can take part.
        """
        found: dict[str, TestbedError] = {}

        def then(name: str) -> Callable[[Outcome[None]], None]:
            return lambda outcome: found.update({name: outcome.error} if outcome.error is not None else {})

        for name, line in self._lines.items():
            self._errands.send(partial(_hold, line.attached.node), then(name))
        while not self._errands.settle(1.0):
            pass
        stopping = [error for error in found.values() if type(error) not in COSTS_A_JOB]
        if stopping or (found and len(found) == len(self._lines)):
            told = stopping or list(found.values())
            raise type(told[0])("; ".join(dict.fromkeys(map(str, told))))
        for name in found:
            self._lines[name].attached.late = True
        return found

    def run(
        self, jobs: Iterable[tuple[str, Job, Path | None]], *, all_at_once: bool = False
    ) -> Iterator[tuple[Result, Path | None]]:
        """Each job's result as it comes, with the path of its update; jobs of a device keep their order.

        `all_at_once`: devices of one machine do not wait for its cores, because their jobs need none.

        A result counts as stored, and its node forgets it, when the next one is asked for.  Raises LimitError when a
        device's memory cannot be capped, StoreError when the controller's own disk is full.
        """
        for device, job, payload in jobs:
            self.node(device)
            self._lines[device].jobs.append(self._assigner(job, payload))
        try:
            yield from self._results(all_at_once=all_at_once)
        finally:
            self._payload_hashes.clear()
            for line in self._lines.values():
                line.jobs.clear()
                line.active = False
                line.attached.abandon()
                line.attached.ended.clear()

    def close(self) -> None:
        """Stop every agent, and wait until nothing is left but the spools; `problems` says where that failed."""
        with ExitStack() as steps:  # the last one first, and each whatever became of those before it
            steps.callback(self._errands.close)
            steps.callback(self._leave_all)
            self._end_errands()

    def _end_errands(self) -> None:
        for line in self._lines.values():
            line.attached.abandon()
        if not self._errands.settle(_STOP_SECONDS):
            for line in self._lines.values():
                if line.attached.errand:
                    line.attached.node.hang_up()  # and so end what is waited for
            self._errands.settle(_STOP_SECONDS)

    def _leave_all(self) -> None:
        """Let go of every device at once; a device that takes too long is hung up on, and told."""
        for line in self._lines.values():
            line.attached.hang_up()
        nodes = [*(line.attached.node for line in self._lines.values()), *self._beside]
        told: list[str] = []
        left: set[str] = set()
        for node in nodes:
            self._errands.send(partial(node.leave, _STOP_SECONDS), partial(_note_left, node.name, left, told))
        self._errands.wait(_LEAVE_SECONDS * ceil(len(nodes) / _MAX_ERRANDS))
        try:
            self._errands.take_in()
        finally:
            for node in nodes:
                if node.name not in left:
                    node.hang_up()
                    told.append(f"device {node.name}: it could not be let go of in time; see: testbed status")
            self.problems = tuple(told)

    def _facts_of(self, name: str, machine: _Machine) -> Mapping[str, Any]:
        """What provisioning found of a machine that is not this one; {} for this one."""
        known = [self.settings.facts.get(device.name) for device in machine.devices]
        return next((facts for facts in known if facts is not None), {"board": {}}) if name else {}

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _results(self, *, all_at_once: bool) -> Iterator[tuple[Result, Path | None]]:
        while any(line.jobs or line.attached.busy for line in self._lines.values()):
            self._begin_jobs(all_at_once=all_at_once)
            self._listen()
            for line in self._lines.values():
                if line.attached.fatal is not None:
                    raise line.attached.fatal
                while line.attached.ended:
                    result, update = line.attached.ended.pop(0)
                    yield result, update
                    line.attached.stored(result.job)

    def _begin_jobs(self, *, all_at_once: bool) -> None:
        """Let devices begin, as many as may work side by side."""
        for machine in self._machines.values():
            for line in machine.lines:
                line.active = line.active and bool(line.jobs or line.attached.busy)
            parallel = len(machine.lines) if all_at_once else machine.parallel
            room = parallel - sum(line.active for line in machine.lines)
            for line in [line for line in machine.lines if line.jobs and not line.active][: max(0, room)]:
                line.active = True
            for line in machine.lines:
                if line.active and line.jobs and not line.attached.busy:
                    line.attached.assign(line.jobs.popleft()())

    def _listen(self) -> None:
        """One look at every channel and errand; whoever was silent looks at the clock."""
        if any(line.attached.ended for line in self._lines.values()):
            return
        self._take_in()
        for machine in self._machines.values():
            for line in machine.lines:
                line.attached.on_time()
                if machine.unload_between:
                    self._unload_when_done(line)

    def _take_in(self) -> None:
        poll, by_fd = select.poll(), {}
        poll.register(self._errands, select.POLLIN)
        for line in self._lines.values():
            if (channel := line.attached.channel) is not None:
                poll.register(channel, select.POLLIN | (select.POLLOUT if channel.writer.wants_to_send else 0))
                by_fd[channel.fileno()] = line.attached
        for fd, happened in poll.poll(self._patience_ms()):
            if (attached := by_fd.get(fd)) is None:
                self._errands.take_in()
                continue
            if happened & select.POLLOUT:
                attached.flush()
            if happened & ~select.POLLOUT:
                attached.receive()

    def _patience_ms(self) -> int | None:
        due = [at for line in self._lines.values() if (at := line.attached.next_due()) is not None]
        return max(0, int((min(due) - time.monotonic()) * 1000) + 1) if due else None

    def _unload_when_done(self, line: _Line) -> None:
        attached = line.attached
        done = line.active and not line.jobs and attached.current is None and bool(attached.ended)
        if done and attached.channel is not None and not attached.unloading:
            attached.unload()

    def _assigner(self, job: Job, payload: Path | None) -> Callable[[], Assigned]:
        return lambda: Assigned(
            job, payload, self._update_path(job.id), self._timeout, self._content_path, self._payload_hash(payload)
        )

    def _payload_hash(self, payload: Path | None) -> str | None:
        """Several clients may be sent the same: it is read once in a round."""
        if payload is None:
            return None
        if payload not in self._payload_hashes:
            self._payload_hashes[payload] = file_hash(payload)
        return self._payload_hashes[payload]


def _hold(node: Node) -> None:
    node.hold()
    node.try_meters()


def _wire(devices: Sequence[Device], nodes: dict[str, Node], settings: NodeSettings) -> list[Node]:
    """Let content come through the device that `via` names; those among them that have no part in the run."""
    from testbed.devices._site import Site

    beside: dict[str, Node] = {}
    known = {device.name: device for device in settings.others}
    for device in devices:
        via = device.access.via if device.access is not None else None
        if via is None:
            continue
        if via not in nodes and via not in beside and via in known:
            beside[via] = make_node(known[via], settings)
        through = nodes.get(via) or beside.get(via)
        nodes[device.name].site = Site(cast("AgentNode", through)) if through is not None else None
    return list(beside.values())


def _note_left(name: str, left: set[str], told: list[str], outcome: Outcome[None]) -> None:
    left.add(name)
    if outcome.error is not None:
        text = str(outcome.error)
        told.append(text if name in text else f"device {name}: {text}")


def fit_side_by_side(devices: Sequence[Device], available_bytes: int | None = None) -> bool:
    """Whether the budgets of devices of one machine fit into its memory (None: into what is free of this one now)."""
    if len(devices) < 2:
        return True
    if available_bytes is None:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
        available_bytes = int(_MEMORY_SHARE * free)
    return sum(device.budget.memory_bytes for device in devices) <= available_bytes
