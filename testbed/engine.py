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
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from testbed.attached import Assigned, AttachedNode, EventListener
from testbed.devices import Node, NodeSettings, make_node
from testbed.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from typing import Self

    from testbed.inventory import Device
    from testbed.job import Job, Result

_STOP_SECONDS = 10.0
#: What is left of the free memory for the controller and the page cache, when devices stand side by side.
_MEMORY_SHARE = 0.8


class _Line:
    """A device with the jobs that wait for it."""

    def __init__(self, attached: AttachedNode) -> None:
        self.attached = attached
        self.jobs: deque[Callable[[], Assigned]] = deque()
        self.active = False

    @property
    def busy(self) -> bool:
        return self.attached.current is not None or self.attached.unloading or bool(self.attached.ended)


class Engine:
    """Runs jobs on the agents of a run's devices.

    `parallel`: devices at work at the same time (None: as many as cores); `unload_between`: a trainer gives its memory
    back before the next device begins (None: where the budgets do not fit into memory side by side).
    """

    def __init__(  # noqa: PLR0913 -- settings of a run, each by name
        self,
        devices: Iterable[Device],
        folder: Path,
        run: str,
        *,
        update_path: Callable[[str], Path] | None = None,
        settings: NodeSettings | None = None,
        on_event: EventListener = lambda *_: None,
        job_timeout_seconds: float | None = None,
        parallel: int | None = None,
        unload_between: bool | None = None,
    ) -> None:
        """`update_path(job id)` says where an update is put (default: below folder/updates)."""
        known = tuple(devices)
        self.settings = settings or NodeSettings(run, folder / "nodes")
        self._update_path = update_path or (lambda job: folder / "updates" / f"{job}.safetensors")
        self._timeout = job_timeout_seconds
        self._parallel = parallel or max(1, os.cpu_count() or 1)
        self._unload = unload_between if unload_between is not None else not fit_side_by_side(known)
        self._lines = {
            device.name: _Line(AttachedNode(make_node(device, self.settings), run, on_event)) for device in known
        }
        for line in self._lines.values():
            line.attached.node.prepare()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def node(self, device: str) -> Node:
        """The node of a device, for deploy; raises UsageError for a device that the run does not have."""
        return self._line(device).attached.node

    def caps(self) -> dict[str, dict[str, object]]:
        """Device → version, path and limit of its cgroup, of every agent that has been in contact."""
        told = {name: line.attached.welcome for name, line in self._lines.items()}
        return {name: welcome["cap"] for name, welcome in told.items() if welcome is not None}

    def run(self, jobs: Iterable[tuple[str, Job, Path | None]]) -> Iterator[tuple[Result, Path | None]]:
        """Each job's result as it comes, with the path of its update; jobs of a device keep their order.

        A result counts as stored, and its node forgets it, when the next one is asked for.  Raises LimitError when a
        device's memory cannot be capped, StoreError when the controller's own disk is full.
        """
        for device, job, payload in jobs:
            self._line(device).jobs.append(self._assigner(job, payload))
        try:
            yield from self._results()
        finally:
            for line in self._lines.values():
                line.jobs.clear()
                line.active = False
                line.attached.abandon()
                line.attached.ended.clear()

    def close(self) -> None:
        """Stop every agent, and wait until nothing is left but the spools; raises DeviceError when one cannot be."""
        nodes = [line.attached for line in self._lines.values()]
        for attached in nodes:
            attached.stop()
        problems = []
        for attached in nodes:
            try:
                if not attached.node.wait_gone(_STOP_SECONDS):
                    attached.node.kill()
            except DeviceError as error:
                problems.append(str(error))
            attached.hang_up()
        if problems:
            raise DeviceError("; ".join(problems))

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _results(self) -> Iterator[tuple[Result, Path | None]]:
        while any(line.jobs or line.busy for line in self._lines.values()):
            self._begin_jobs()
            self._listen()
            for line in self._lines.values():
                while line.attached.ended:
                    result, update = line.attached.ended.pop(0)
                    yield result, update
                    line.attached.stored(result.job)

    def _begin_jobs(self) -> None:
        """Let devices begin, as many as may work side by side; all that must be started start at once."""
        for line in self._lines.values():
            if line.active and not line.jobs and not line.busy:
                line.active = False
        active = [line for line in self._lines.values() if line.active]
        waiting = [line for line in self._lines.values() if line.jobs and not line.active]
        for line in waiting[: max(0, self._parallel - len(active))]:
            line.active = True
        ready = [line for line in self._lines.values() if line.active and line.jobs and not line.busy]
        for line in ready:
            with suppress(DeviceError):  # told again, and then with its job, when it is assigned
                line.attached.begin()
        for line in ready:
            line.attached.assign(line.jobs.popleft()())

    def _listen(self) -> None:
        """One look at every channel; where all is silent, at the clock."""
        lines = [line for line in self._lines.values() if line.attached.channel is not None]
        if any(line.attached.ended for line in self._lines.values()):
            return
        if not self._take_in(lines):
            for line in lines:
                if line.busy:
                    line.attached.check_time()
                    line.attached.keep_contact()
        for line in lines:
            self._unload_when_done(line)

    def _take_in(self, lines: list[_Line]) -> bool:
        poll, by_fd = select.poll(), {}
        for line in lines:
            if (channel := line.attached.channel) is not None:
                poll.register(channel, select.POLLIN | (select.POLLOUT if channel.writer else 0))
                by_fd[channel.fileno()] = line.attached
        due = [line.attached.next_due() for line in lines if line.busy]
        patience = max(0, int((min(due) - time.monotonic()) * 1000) + 1) if due else 0
        happened = poll.poll(patience)
        for fd, what in happened:
            if what & select.POLLOUT and (channel := by_fd[fd].channel) is not None:
                channel.flush()
            if what & ~select.POLLOUT:
                by_fd[fd].receive()
        return bool(happened)

    def _unload_when_done(self, line: _Line) -> None:
        attached = line.attached
        done = line.active and not line.jobs and attached.current is None and bool(attached.ended)
        if done and self._unload and not attached.unloading:
            attached.unload()

    def _assigner(self, job: Job, payload: Path | None) -> Callable[[], Assigned]:
        return lambda: Assigned(job, payload, self._update_path(job.id), self._timeout)

    def _line(self, device: str) -> _Line:
        if device not in self._lines:
            raise UsageError(f"there is no device {device!r} in this run; there are {', '.join(self._lines)}")
        return self._lines[device]


def fit_side_by_side(devices: Iterable[Device]) -> bool:
    """Whether the budgets of all devices on this machine fit into what is free of its memory now."""
    needed = sum(device.budget.memory_bytes for device in devices if device.kind == "emulated")
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    return needed <= _MEMORY_SHARE * available
