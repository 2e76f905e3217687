"""What a job shall undergo on its node, done to it; and what was done, for its measurement.

A job's header says what (`Job.disturbances`, in base units):

    {"dropout": {"at": 0.4}, "straggler": {"slowdown": 3}, "thermal_limit": {"after_seconds": 20, "slowdown": 2},
     "background_load": {"processes": 1, "memory_bytes": 67108864},
     "slow_link": {"bytes_per_second": 125000, "delay_seconds": 0.05}}

A slow link is held back where frames are sent (`testbed.node.pace`); all else is here.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from testbed.node.load import Load
from testbed.node.slowing import Slowing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from testbed.node.limits import Group


class Disturbed:
    """A node whose jobs undergo something; one job at a time."""

    def __init__(self, settings: Mapping[str, Any], spool: Path, group: Group | None) -> None:
        self._settings = settings
        self._spool = spool
        self._group = group
        self._slowing = Slowing(settings, group)
        self._declared: Mapping[str, Any] = {}
        self._load: Load | None = None
        self._dropped_out = False
        self._heat_seconds = 0.0  # of work that no rest has made up for
        self._looked = time.monotonic()
        self._working = False
        self._hot_seconds = 0.0  # of this job, in which the thermal limit held it back

    # ── a job ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def begin(self, declared: Mapping[str, Any]) -> str | None:
        """A job begins; gives the reason where its background load cannot be had."""
        self._heat(time.monotonic())
        self._declared, self._working = declared, True
        self._dropped_out, self._hot_seconds = False, 0.0
        self._slowing.begin()
        self._slow()
        return self._begin_load()

    def take_trainer(self, pid: int) -> None:
        """This process does the job."""
        self._slowing.take_trainer(pid)

    def lose_trainer(self) -> None:
        """It has ended."""
        self._slowing.lose_trainer()

    def drops_out(self, progress: Mapping[str, Any] | None) -> str | None:
        """Whether the client drops out at this progress, in words; with None the work is done: now at the latest."""
        dropout = self._declared.get("dropout")
        step, steps = (progress or {}).get("step"), (progress or {}).get("steps")
        if dropout is None or (progress is not None and not _is_far(step, steps, float(dropout["at"]))):
            return None
        self._dropped_out = True
        when = "with its work done" if progress is None else f"after step {step} of {steps}"
        return f"it dropped out {when}, as the run declares (dropout)"

    def end(self, *, finished: bool) -> dict[str, Any]:
        """The job has ended, and with it all that it underwent: what was done, by kind."""
        self._heat(time.monotonic())
        self._slowing.hold(1.0)
        load = self._load.stop() if self._load is not None else None
        if load is not None and not finished:
            load["ended_early"] = None  # whoever ended the trainer may have ended everything in its group
        done = {kind: {**values, **self._done(kind, load)} for kind, values in self._declared.items()}
        self._declared, self._load, self._working = {}, None, False
        return done

    @property
    def note(self) -> str:
        """The end of a message of a job that has failed: what it underwent meanwhile."""
        return f" (while it underwent, as the run declares: {', '.join(self._declared)})" if self._declared else ""

    @property
    def held_bytes(self) -> int:
        """What the background load holds of the device's budget."""
        return self._load.memory_bytes if self._load is not None else 0

    @property
    def shares_group(self) -> bool:
        """Whether the trainer is not alone in its group."""
        return self._load is not None

    # ── the clock ──────────────────────────────────────────────────────────────────────────────────────────────────
    def next_due(self) -> float | None:
        """When `on_time` wants to be called, on the monotonic clock."""
        limit = self._declared.get("thermal_limit")
        due = [self._slowing.next_due()]
        if limit is not None and self._heat_seconds < limit["after_seconds"]:
            due.append(self._looked + limit["after_seconds"] - self._heat_seconds)
        return min((at for at in due if at is not None), default=None)

    def on_time(self, now: float) -> None:
        """Do what is due."""
        self._heat(now)
        self._slow()
        self._slowing.on_time(now)

    # ── how ────────────────────────────────────────────────────────────────────────────────────────────────────────
    def _heat(self, now: float) -> None:
        """Work warms it up to its limit and no further, where it is held; rest cools it as fast."""
        passed, self._looked = now - self._looked, now
        if not self._working:
            self._heat_seconds = max(0.0, self._heat_seconds - passed)
            return
        limit = self._declared.get("thermal_limit")
        if limit is None:
            self._heat_seconds += passed
            return
        room = max(0.0, float(limit["after_seconds"]) - self._heat_seconds)
        self._hot_seconds += max(0.0, passed - room)
        self._heat_seconds += min(passed, room)

    def _slow(self) -> None:
        straggler, limit = self._declared.get("straggler"), self._declared.get("thermal_limit")
        factor = float(straggler["slowdown"]) if straggler is not None else 1.0
        if limit is not None and self._heat_seconds >= limit["after_seconds"]:
            factor *= float(limit["slowdown"])
        self._slowing.hold(factor)

    def _begin_load(self) -> str | None:
        declared = self._declared.get("background_load")
        if declared is None:
            return None
        before = self._group.oom_kills() if self._group is not None else 0
        try:
            self._load = Load(self._settings, self._spool, self._group, declared)
        except OSError as error:
            return f"its declared background load could not be started: {error.strerror}"
        if self._load.complete or (self._group is not None and self._group.oom_kills() > before):
            return None  # out of memory: that is for whoever looks after the trainer
        return "its declared background load could not be started: a process of it ended at once"

    def _done(self, kind: str, load: Mapping[str, Any] | None) -> dict[str, Any]:
        slowing = {"by": self._slowing.by, "stopped_seconds": round(self._slowing.stopped_seconds, 4)}
        done: dict[str, dict[str, Any]] = {
            "dropout": {"dropped_out": self._dropped_out},
            "straggler": {**slowing, "full_cores": self._slowing.full_cores},
            "thermal_limit": {**slowing, "slowed_seconds": round(self._hot_seconds, 4)},
            "background_load": dict(load or {}),
        }
        return done.get(kind, {})


def _is_far(step: Any, steps: Any, share: float) -> bool:
    numbers = isinstance(step, int) and isinstance(steps, int) and steps > 0
    return numbers and step / steps >= share
