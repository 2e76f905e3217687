"""Hold a trainer back to a part of its processor: by a quota of the kernel, or by stopping and continuing it.

Quota        of the device's own group (cpu.cfs_quota_us of v1, cpu.max of v2), where the agent could make one: 1/f of
             what the trainer's threads can take.  Whatever else works inside the budget shares it.
Stop, go on  SIGSTOP and SIGCONT for the trainer's process group, ten times a second: it runs for 1/f of the time.

Sources: https://docs.kernel.org/scheduler/sched-bwc.html; https://docs.kernel.org/admin-guide/cgroup-v2.html.
Tried on: cgroup v1 as root, and stop and go on, on x86-64; v2 in a user's scope (systemd 257, Linux 6.12), on a virtual
arm64 board.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.node.limits import Group

QUOTA, STOP_CONTINUE = "cpu_quota", "stop_continue"
_PERIOD_SECONDS = 0.1


class Slowing:
    """Holds back one trainer at a time."""

    def __init__(self, settings: Mapping[str, Any], group: Group | None) -> None:
        threads = float(settings.get("threads") or 1)
        self.full_cores = min(threads, float(settings.get("cores") or threads), float(os.cpu_count() or threads))
        self.by: str | None = None  # QUOTA or STOP_CONTINUE, once it was held back
        self.stopped_seconds = 0.0
        self._group = group
        self._pid: int | None = None
        self._factor = 1.0
        self._stopped = False
        self._since = 0.0  # it runs, or stands, since then
        self._ran_seconds = 0.0  # since it is held back so
        self._stood_seconds = 0.0

    def take_trainer(self, pid: int) -> None:
        """Hold back this process, and whatever it has started in its process group."""
        self._pid, self._stopped, self._since = pid, False, time.monotonic()

    def lose_trainer(self) -> None:
        """It has ended: no signal goes to its number any more."""
        self._pid = None
        self._go_on()

    def hold(self, factor: float) -> None:
        """From now on it gets 1/factor; with 1 all."""
        if factor == self._factor:
            return
        self._go_on()
        self._factor, self._ran_seconds, self._stood_seconds = factor, 0.0, 0.0
        self._since = time.monotonic()
        cores = self.full_cores / factor if factor > 1 else None
        kept = self._group is not None and self._group.limit_cores(cores)
        if factor > 1:
            self.by = QUOTA if kept else STOP_CONTINUE

    def next_due(self) -> float | None:
        """When `on_time` wants to be called, on the monotonic clock."""
        if self._factor <= 1 or self.by != STOP_CONTINUE or self._pid is None:
            return None
        return self._since + (self._still_to_stand() if self._stopped else _PERIOD_SECONDS / self._factor)

    def on_time(self, now: float) -> None:
        """Stop it, or let it go on, when it is time."""
        due = self.next_due()
        if due is None or now < due:
            return
        if self._stopped:
            self._go_on()
        else:
            self._ran_seconds += now - self._since
            self._signal(signal.SIGSTOP)
            self._stopped, self._since = True, now

    def begin(self) -> None:
        """A job begins: nothing has been done to it yet."""
        self.by, self.stopped_seconds = None, 0.0

    def _still_to_stand(self) -> float:
        """How long this stop must be: one that was too long or too short is made up for."""
        return max(0.0, self._ran_seconds * (self._factor - 1) - self._stood_seconds)

    def _go_on(self) -> None:
        if not self._stopped:
            return
        self._signal(signal.SIGCONT)
        now = time.monotonic()
        self._stood_seconds += now - self._since
        self.stopped_seconds += now - self._since
        self._stopped, self._since = False, now

    def _signal(self, number: int) -> None:
        if self._pid is None:
            return
        try:
            os.killpg(self._pid, number)
        except ProcessLookupError:  # between fork and setpgid there is no group of that number
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)
