"""A node of any kind: an agent on a machine, its spool and its content, and the lock that keeps other runs away."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.devices._machine import CodeMissingError
from testbed.errors import BoardError, DeviceError, LockedError, MeterError
from testbed.meters import BOARD, meter_class
from testbed.process_identity import login_name
from testbed.quantities import seconds_text
from testbed.switching import power_cycle, power_switch

if TYPE_CHECKING:
    from testbed.code_wheel import CodeWheel
    from testbed.devices import NodeSettings
    from testbed.devices._machine import Machine
    from testbed.devices._site import Site
    from testbed.inventory import Device

logger = logging.getLogger(__name__)

#: Stands in the lock for the run, where a device is held to be made ready.
PROVISION = "provision"
#: How an inventory does without a meter.
NO_METER = "`meter: none`"
#: How long an agent that listens no more takes to be gone altogether.
_GONE_SECONDS = 5.0
#: Machine → held by the node that sends content to it.
_turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


@dataclass(frozen=True)
class Place:
    """Where a node's things are on its machine; paths may begin with "~/"."""

    spool: str
    content: str
    code: str  # the folder that holds our packages
    python: str
    lock: str | None = None  # of the machine; None: nobody else comes here
    shared: bool = False  # with other devices: a run looks whether the machine is held, and does not hold it
    remote: bool = False


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds."""

    orphan_seconds: float
    reconnect_seconds: float
    silence_seconds: float


class AgentNode:
    """A node; `testbed.devices.Node` says what each verb does."""

    def __init__(
        self,
        device: Device,
        settings: NodeSettings,
        on: Machine,
        place: Place,
        patience: Patience,
        *,
        machine: str,
    ) -> None:
        self.name = device.name
        self.machine = machine
        self.reconnect_seconds = _first(settings.reconnect_seconds, patience.reconnect_seconds)
        self.orphan_seconds = _first(settings.orphan_seconds, patience.orphan_seconds)
        self.silence_seconds = patience.silence_seconds
        self.deployed_bytes = 0
        self.site: Site | None = None  # the way of what many devices are sent
        may_cycle = settings.power_cycle and power_switch(device) is not None
        self.power_cycle = partial(power_cycle, device) if may_cycle else None
        self.place = place
        self.on = on
        self._device = device
        self._settings = settings
        self._there: set[str] = set()  # contents that are known to be on the device
        self._content = place.content
        self._touched = False  # something of the run may be there

    # ── contact ────────────────────────────────────────────────────────────────────────────────────────────────────
    def hold(self) -> None:
        self.on.connect()
        before, self._touched = self._touched, True  # also where it breaks off, and is not known to have been held
        try:
            self._check_free(self._claim())
        except (BoardError, LockedError):
            self._touched = before
            raise

    def _check_free(self, claim: Mapping[str, Any] | None) -> None:
        """Hold the device with a claim; without one see that nobody else does."""
        if self.place.lock is not None:
            self._check_held(self.on.ask_early("hold", lock=self.place.lock, claim=claim))

    def try_meters(self) -> None:
        meters = board_meters(self._device)
        if not meters:
            return
        try:
            self._try_meters(meters)
        except CodeMissingError:
            self._send_code()
            self._try_meters(meters)

    def _try_meters(self, meters: list[dict[str, Any]]) -> None:
        try:
            self.on.ask("try_meters", meters=meters)
        except MeterError as error:
            raise MeterError(meter_text(self.name, str(error))) from None

    def reach(self, contents: Mapping[str, Path]) -> socket.socket:
        self._ready(contents)
        try:
            return self.on.attach(self.place.spool)
        except OSError:  # it is just ending: its socket is closed before its lock is free
            self.on.ask("wait_gone", spool=self.place.spool, patience_seconds=_GONE_SECONDS)
        self._ready({})
        try:
            return self.on.attach(self.place.spool)
        except OSError as error:
            raise DeviceError(f"device {self.name}: its agent cannot be reached: {error.strerror}") from None

    def alive(self) -> bool:
        """Whether an agent is at work on the run's spool."""
        return bool(self.on.ask("alive", spool=self.place.spool))

    def wait_gone(self, patience_seconds: float) -> bool:
        """Whether the agent has ended within that time; what it could not remove itself is removed then."""
        return bool(self.on.ask("wait_gone", spool=self.place.spool, patience_seconds=patience_seconds))

    def kill(self) -> None:
        self.on.ask("kill", spool=self.place.spool)

    def leave(self, patience_seconds: float) -> None:
        try:
            if self._touched or not self.place.remote:
                self._leave(patience_seconds)
        except DeviceError:
            if self.on.connected:
                raise
            self._leave(patience_seconds)  # the link had broken, unnoticed: over a new one
        finally:
            self.on.close()

    def _leave(self, patience_seconds: float) -> None:
        lock, run = None if self.place.shared else self.place.lock, self._settings.run
        try:
            self.on.ask("leave", spool=self.place.spool, patience_seconds=patience_seconds, lock=lock, run=run)
        except CodeMissingError:  # it was held, and nothing more
            if lock is not None:
                self.on.ask_early("release", lock=lock, run=run)

    def hang_up(self) -> None:
        self.on.close()

    def _ready(self, contents: Mapping[str, Path]) -> None:
        try:
            answer = self._ask_ready(contents)
        except CodeMissingError:
            self._send_code()
            answer = self._ask_ready(contents)
        self._check_held(answer.get("holder"))
        self._content = answer["content"]
        self._put(contents, answer["missing"])

    def _ask_ready(self, contents: Iterable[str]) -> dict[str, Any]:
        place = self.place
        self.on.connect()
        self._touched = True
        answer: dict[str, Any] = self.on.ask(
            "ready",
            spool=place.spool,
            settings=self._agent_settings(),
            code=place.code,
            contents=[content for content in contents if content not in self._there],
            lock=place.lock,
            claim=self._claim(),
        )
        return answer

    # ── content ────────────────────────────────────────────────────────────────────────────────────────────────────
    def holds(self, contents: Iterable[str]) -> bool:
        return self._there.issuperset(contents)

    def deploy(self, contents: Mapping[str, Path]) -> None:
        unknown = [content for content in contents if content not in self._there]
        if unknown:
            self._put(contents, self.on.ask("missing", content=self._content, contents=unknown))

    def lacks(self, contents: Iterable[str]) -> tuple[bool, tuple[str, ...]]:
        """Whether our code is lacking, and which of the contents are; one round trip, and nothing is touched."""
        place = self.place
        gone = set(self.on.missing([place.code, *(f"{place.content}/{content}" for content in contents)]))
        return place.code in gone, tuple(content for content in contents if f"{place.content}/{content}" in gone)

    def seed(self, contents: Mapping[str, Path]) -> None:
        """Make our code and the contents present, without an agent, and without a lock that could be left behind."""
        self.on.connect()
        self._check_free(None)
        code, missing = self.lacks(contents)
        if code:
            self._unpack_code()
        self._put(contents, missing)

    def forget(self) -> None:
        self._there.clear()

    def _put(self, contents: Mapping[str, Path], missing: Collection[str]) -> None:
        if missing:
            site = self._ready_site({content: contents[content] for content in missing})
            with self._turn() as waited:  # then another device of the machine may have been sent the same
                unsent = self.lacks(missing)[1] if waited else missing
                self._transfer({content: contents[content] for content in unsent}, site)
        self._there.update(contents)

    def _ready_site(self, contents: Mapping[str, Path]) -> Site | None:
        """The way through another device that has the contents now; None where there is none.

        Before our own turn: whoever holds one turn and waits for another may wait for ever.
        """
        shared = self._shared(contents)
        if self.site is None or not shared:
            return None
        try:
            self.site.keep(shared)
        except DeviceError as error:
            self._warn_way_failed(error)
            return None
        return self.site

    def _shared(self, contents: Mapping[str, Path]) -> dict[str, Path]:
        """Without each client's own data, which comes from the controller."""
        return {content: path for content, path in contents.items() if content not in self._settings.private}

    def _transfer(self, contents: Mapping[str, Path], site: Site | None) -> None:
        """By way of the site's device where it is ready, else directly."""
        left, shared = dict(contents), self._shared(contents)
        if site is not None and shared:
            try:
                self.deployed_bytes += site.bring(self, shared)
            except DeviceError as error:
                self._warn_way_failed(error)
            else:
                left = {content: path for content, path in contents.items() if content not in shared}
        for content, path in left.items():
            self.deployed_bytes += self.on.put(path, f"{self._content}/{content}")

    def _warn_way_failed(self, error: DeviceError) -> None:
        logger.warning("device %s: sent directly, because its way through another failed: %s", self.name, error)

    def keep(self, contents: Mapping[str, Path]) -> None:
        """Have the contents here for the other devices of the site, sent by the controller itself."""
        self.hold()
        with self._turn():
            for content in self.lacks(contents)[1]:
                self.deployed_bytes += self.on.put(contents[content], f"{self.place.content}/{content}")

    def _send_code(self) -> None:
        self.hold()  # before anything else
        self._unpack_code()

    def _unpack_code(self) -> None:
        """The wheel lies among the content, so that a broken transfer goes on where it stopped."""
        wheel = self._wheel()
        target = f"{self.place.content}/{wheel.sha256}"
        site = self._ready_site({wheel.sha256: wheel.path})
        with self._turn():  # a second time nothing travels
            self._transfer({wheel.sha256: wheel.path}, site)
            self.on.ask_early("unpack", wheel=target, sha256=wheel.sha256, target=self.place.code)

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Devices of one machine are sent content one after another; whether another one came first."""
        turn = _turns[self.machine]
        waited = not turn.acquire(blocking=False)
        if waited:
            turn.acquire()
        try:
            yield waited
        finally:
            turn.release()

    def _wheel(self) -> CodeWheel:
        if self._settings.wheel is None:
            raise DeviceError(f"device {self.name}: our code is not there, and no wheel of it was built for this run")
        return self._settings.wheel

    # ── the lock ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _claim(self) -> dict[str, Any] | None:
        if self.place.lock is None or self.place.shared:
            return None
        return {
            "run": self._settings.run,
            "device": self.name,
            "owner": f"{login_name()}@{socket.gethostname()}:{os.getpid()}",
            "since": time.time(),
            "spool": self.place.spool,
            "orphan_seconds": self.orphan_seconds,
        }

    def _check_held(self, holder: Mapping[str, Any] | None) -> None:
        if holder is not None and "barred" in holder:
            raise LockedError(
                f"device {self.name} was taken from run {holder['barred']} with `testbed unlock`; this run goes on "
                f"without it, and has it again when it is resumed (--resume {holder['barred']})"
            )
        if holder is not None:
            raise LockedError(locked_text(self.name, self._settings.run, holder))

    # ── the agent's settings ───────────────────────────────────────────────────────────────────────────────────────
    def _agent_settings(self) -> dict[str, Any]:
        device, settings, place = self._device, self._settings, self.place
        return {
            "run": settings.run,
            "device": device.name,
            "trainer": settings.trainer,
            "python": place.python,
            "code": [place.code, *settings.code] if place.remote else list(settings.code),
            "memory_bytes": device.budget.memory_bytes if settings.capped else None,
            "cores": device.budget.cores,
            "threads": device.threads,
            "may_be_slowed": device.name in settings.slowed,
            "accelerator": device.accelerator,
            "accelerator_charged": settings.facts.get(self.name, {}).get("cuda_charged_to_cgroup"),
            "cgroup_parent": self._cgroup_parent(),
            "orphan_seconds": self.orphan_seconds,
            "remote": place.remote,
            "sample_seconds": settings.sample_seconds,
            "content": place.content,
            "environment": dict(settings.environment),
            "meters": board_meters(device),
            "power_seconds": settings.power_seconds,
            "root": settings.root,
            "telemetry_seconds": settings.telemetry_seconds,
        }

    def _cgroup_parent(self) -> str | None:
        """Given by hand, or found when the device was provisioned; None: the agent looks for one."""
        if self._settings.cgroup_parent is not None:
            return str(self._settings.cgroup_parent)
        known = self._settings.facts.get(self.name, {}).get("memory_cgroup") or {}
        return known.get("parent")


def meter_text(device: str, error: str) -> str:
    """That a meter of a device cannot be read, and the way out."""
    told = f"device {device}: {error.removeprefix(f'device {device}: ')}"
    way_out = "" if NO_METER in told else f"; choose another meter for it in the inventory, or {NO_METER}"
    return told + way_out


def board_meters(device: Device) -> list[dict[str, Any]]:
    """The meters that are read on the device itself, as its agent is told of them."""
    profile = device.profile
    return [
        {
            "name": meter.name,
            "settings": dict(meter.settings),
            "point": meter.point,
            "total_rails": list(profile.total_rails),
        }
        for meter in device.meters
        if meter_class(meter.name).where == BOARD
    ]


def locked_text(device: str, run: str, holder: Mapping[str, Any]) -> str:
    """Who holds the device, for how long, and the way out."""
    if holder["run"] is None:
        return f"device {device} has a lock that cannot be read; remove it with: testbed unlock {device}"
    if holder["run"] == PROVISION:
        return _visited_text(device, holder)
    if holder["run"] == run:
        return f"device {device} is the same machine and folder as device {holder['device']}: leave one of them out"
    age, owner = seconds_text(holder["age_seconds"]), holder["owner"]
    if holder["stale"]:
        return (
            f"device {device} is held by run {holder['run']} of {owner}, but no agent of it lives there, and it was "
            f"last taken {age} ago: the lock is stale; remove it with `testbed unlock {device}`, or go on "
            f"with that run (--resume {holder['run']})"
        )
    force = " --force" if holder["agent_alive"] else ""
    return (
        f"device {device} is held by run {holder['run']} of {owner}, for {age}; wait for it, end it with "
        f"`testbed stop {holder['run']}`, or take the device from it with `testbed unlock {device}{force}`"
    )


def _visited_text(device: str, holder: Mapping[str, Any]) -> str:
    """The same where it is no run, but a visit that makes the device ready."""
    owner, age = holder["owner"], seconds_text(holder["age_seconds"])
    other = f" as device {holder['device']}" if holder["device"] != device else ""
    if holder["stale"]:
        return (
            f"device {device} was held{other} by a visit of `testbed provision` of {owner}, {age} ago, which has not "
            f"let go of it: the lock is stale; remove it with `testbed unlock {device}`"
        )
    return (
        f"device {device} is being made ready{other} by {owner}, for {age}; wait for it, or, if it is gone, remove its "
        f"lock with `testbed unlock {device}`"
    )


def _first(given: float | None, default: float) -> float:
    return default if given is None else given
