"""One device made ready: its facts, every step's check, what is to be changed, and the proof that it has changed.

A visit is a few passes of "gather, check, change", until nothing is left to change: most devices need one, which
changes nothing.  A change that is asked for again in the same words has not taken, and is a problem.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING, Any, Self

from testbed.errors import DeviceError, DiskError, HostKeyError, LockedError, RightError, TestbedError
from testbed.provision import batch
from testbed.provision.facts import gather
from testbed.provision.hold import Hold
from testbed.provision.part import Part
from testbed.provision.step import LOST_LINK, Change, Finding, Note, Problem, Step

if TYPE_CHECKING:
    from testbed.connection import Connection
    from testbed.inventory import Device
    from testbed.provision.attestation import Drift

#: How a visit ended.
READY = "ready"  # nothing was to be changed
CHANGED = "changed"  # changed, and found so
DIFFERS = "differs"  # --check: this would be changed
REBOOT = "needs a reboot"
FAILED = "failed"
INTERRUPTED = "interrupted"

_MOST_PASSES = 6
_REBOOT_SECONDS = 300.0
_POLL_SECONDS = 0.5
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    check: bool = False  # look only
    reboot: bool = False  # … where a change needs it
    keep_swap: bool = False
    accept_drift: bool = False  # what was changed by hand is right from now on


@dataclass(frozen=True)
class Outcome:
    """What a visit found and did."""

    device: str
    status: str
    changes: tuple[Change, ...] = ()  # made; with --check: to be made
    problems: tuple[Problem, ...] = ()
    notes: tuple[Note, ...] = ()
    facts: Mapping[str, Any] | None = None  # None: it was not reached
    seconds: float = 0.0
    waiting: tuple[str, ...] = ()  # steps that hold from the next boot on
    drift: tuple[Drift, ...] = ()  # changed by hand since the last visit

    @property
    def failed(self) -> bool:
        return self.status in {FAILED, REBOOT, INTERRUPTED}


class InterruptedVisitError(TestbedError):
    """The user does not want to wait any longer."""


@dataclass
class Visit:
    """One device, from the first contact to the last.

    connect    opens a connection to it; called again after a reboot, or for new groups of the user
    say        is told in a few words what is being done
    stopped    set: end as soon as possible; what was begun is found at the next visit
    """

    device: Device
    steps: Sequence[Step]
    parts: Sequence[Part]
    connect: Callable[[], Connection]
    options: Options = Options()
    say: Callable[[str], None] = lambda _: None
    stopped: Event = field(default_factory=Event)
    reboot_seconds: float = _REBOOT_SECONDS

    first_facts: Mapping[str, Any] | None = field(default=None, init=False)  # before anything was changed
    _made: dict[str, Change] = field(default_factory=dict)  # since the last boot
    _all_made: list[Change] = field(default_factory=list)
    _problems: dict[str, Problem] = field(default_factory=dict)
    _findings: list[Finding] = field(default_factory=list)
    _facts: Mapping[str, Any] | None = None
    _lock: Mapping[str, Any] | None = None  # … of the device, as it was found with the facts
    _hold: Hold = field(init=False)
    _connection: Connection | None = None
    _broken: bool = False  # an action has failed: those that come after it would only fail again

    def __post_init__(self) -> None:
        self._hold = Hold(self.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def go(self) -> Outcome:
        """Make it ready; whatever goes wrong with the device is in the outcome."""
        begun = time.monotonic()
        try:
            status = self._status()
        except InterruptedVisitError:
            status = INTERRUPTED
        except TestbedError as error:
            name = "connection" if self._facts is None else LOST_LINK
            self._problems[name] = Problem(name, INTERRUPTED if self.stopped.is_set() else str(error), fatal=True)
            status = INTERRUPTED if self.stopped.is_set() else FAILED
        finally:
            self._let_go()
        return self._outcome(status, time.monotonic() - begun)

    def close(self) -> None:
        """Hang up; may be called from another thread, to end what is being waited for."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def put(self, path: str, text: str) -> None:
        """Write a file below the testbed's folder on the device, whole or not at all; a folder is the user's alone."""
        script = 'umask 077; mkdir -p "${1%/*}" && cat >"$1.new" && mv "$1.new" "$1"'
        folder = self.device.folder if self.device.folder.startswith(("/", "~/")) else f"~/{self.device.folder}"
        self._link().run(["sh", "-c", script, "sh", f"{folder}/{path}"], data=text.encode())

    # ── the way through ────────────────────────────────────────────────────────────────────────────────────────────
    def _status(self) -> str:
        self._look()
        if self.options.check:
            return FAILED if self._problems_now() else DIFFERS if self._changes() else READY
        self._converge()
        if self._waits_for_boot() and self.options.reboot and self._may_change():
            self._reboot()
            self._converge()
        if self._problems_now():
            return FAILED
        if self._waits_for_boot():
            return REBOOT
        return CHANGED if self._all_made else READY

    def _look(self) -> None:
        """Gather the facts, and let every step compare; after a fatal problem none of the later ones is asked."""
        if self._connection is None:
            self._say("connecting")  # to a board that is away it takes its time
        link = self._link()
        self._say("facts")
        facts = gather(link, self.device, self.parts)
        self._lock = facts.pop("lock", None)  # tomorrow it is another one's
        self._facts = facts
        self.first_facts = self.first_facts or facts
        self._findings = []
        for step in self.steps:
            finding = self._with_rights(step.check(self._facts, self.device))
            if finding is not None:
                self._findings.append(finding)
            if isinstance(finding, Problem) and finding.fatal:
                break

    def _with_rights(self, finding: Finding | None) -> Finding | None:
        """A change that needs root where `become: false` is said is for somebody else to make: as a whole, or not."""
        is_root = (self._facts or {}).get("login", {}).get("uid") == 0
        allowed = is_root or self.device.access is None or self.device.access.become
        if allowed or not isinstance(finding, Change) or not any(command.become for command in finding.commands):
            return finding
        return Problem(finding.step, _for_an_administrator(finding, "`become: false` in the inventory"))

    def _converge(self) -> None:
        """Change what is to be changed, and look again, until nothing more can be done."""
        for _ in range(_MOST_PASSES):
            changes = [change for change in self._changes() if self._untried(change)]
            if not changes or not self._may_change():
                return
            self._make(changes)
            if any(change.needs_login for change in changes):
                self.close()
            self._look()

    def _untried(self, change: Change) -> bool:
        """Whether it was not made since the last boot; one that is asked for again in the same words has not taken."""
        if change.step in self._problems or not (change.commands or (change.action and not self._broken)):
            return False
        before = self._made.get(change.step)
        if before is None or (before.found, before.commands) != (change.found, change.commands):
            return True
        text = f"was changed, and is found as before: {change.found}, not {change.wanted}"
        self._problems[change.step] = Problem(change.step, text)
        return False

    def _may_change(self) -> bool:
        """Nothing is changed under a run, or beside another visit: from the first change on, the device is held."""
        try:
            self._hold.take(self._link(), self._lock)
        except (LockedError, DiskError) as error:
            untouched = "" if self._all_made else "; nothing was changed"
            self._problems["lock"] = Problem("lock", f"{error}{untouched}", fatal=True)
            return False
        return True

    def _let_go(self) -> None:
        """Let go of the device, over a new link where the user has hung up.

        Where it is out of reach its lock stays, and our next visit takes that over.
        """
        if self._hold.taken:
            with contextlib.suppress(TestbedError):
                self._connection = self._connection or self.connect()
                self._hold.release(self._connection)

    def _make(self, changes: Sequence[Change]) -> None:
        """Make the changes in their order: neighbouring commands in one round trip, actions one by one."""
        waiting: list[Change] = []
        for change in changes:
            if change.action is None:
                waiting.append(change)
            elif not self._broken:
                self._run_commands(waiting)
                waiting = []
                self._act(change)
        self._run_commands(waiting)

    def _run_commands(self, changes: list[Change]) -> None:
        failures: dict[int, str] = {}
        for each in batch.batches(changes):
            left = tuple((index, command) for index, command in each.commands if index not in failures)
            if not left:
                continue
            self._say(", ".join(dict.fromkeys(changes[index].step for index, _ in left)))
            try:
                failures |= batch.run(self._link(), replace(each, commands=left))
            except RightError as error:
                failures |= {index: _for_an_administrator(changes[index], str(error)) for index, _ in left}
        for index, change in enumerate(changes):
            self._note(change, failures.get(index))

    def _act(self, change: Change) -> None:
        self._say(change.step)
        try:
            if change.action is not None:
                change.action(self._link(), lambda words: self._say(f"{change.step}: {words}"))
        except InterruptedVisitError:
            raise
        except TestbedError as error:
            if self.stopped.is_set():
                raise
            self._broken = True
            self._note(change, str(error))
        else:
            self._note(change, None)

    def _note(self, change: Change, failure: str | None) -> None:
        if failure is None:
            self._made[change.step] = change
            self._all_made.append(change)
        else:
            self._problems[change.step] = Problem(change.step, failure)

    # ── reboot ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def _reboot(self) -> None:
        """Restart the board and wait until it answers with another boot's id; then everything may be tried again."""
        before = (self._facts or {})["boot"]["id"]
        if not before:
            raise DeviceError(
                f"{self.device.name}: {_BOOT_ID} cannot be read, so nobody could tell when it is back; reboot it "
                "yourself, and make it ready again"
            )
        self._say("reboot")
        command = ["sh", "-c", "sync; (sleep 1; PATH=$PATH:/usr/sbin:/sbin; reboot) >/dev/null 2>&1 </dev/null &"]
        self._link().run(command, become=True)
        self.close()
        deadline = time.monotonic() + self.reboot_seconds
        while away := self._still_away(before):
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"{self.device.name}: not back {self.reboot_seconds:.0f} s after its reboot; look at it ({away})"
                )
            if self.stopped.wait(_POLL_SECONDS):
                raise InterruptedVisitError(self.device.name)
        self._all_made += self._waiting()
        self._made.clear()
        self._look()

    def _still_away(self, before: str) -> str | None:
        """Why it is not back from its reboot; None when it is.

        Another host key does not become the right one by waiting.  A refused login may: for a while before and after,
        only root is let in.
        """
        try:
            now = self._link().run(["cat", _BOOT_ID], 10.0).strip()
        except (HostKeyError, RightError):
            raise
        except DeviceError as error:
            self.close()
            return str(error)
        if now != before:
            return None
        self.close()
        return "it has not gone down"

    # ── what is known ──────────────────────────────────────────────────────────────────────────────────────────────
    def _changes(self) -> list[Change]:
        return [finding for finding in self._findings if isinstance(finding, Change)]

    def _waits_for_boot(self) -> bool:
        return any(_waits(change) for change in self._changes())

    def _problems_now(self) -> tuple[Problem, ...]:
        found = [finding for finding in self._findings if isinstance(finding, Problem)]
        return (*found, *self._problems.values())

    def _outcome(self, status: str, seconds: float) -> Outcome:
        changes = self._changes() if self.options.check else [*self._all_made, *self._waiting()]
        notes = tuple(finding for finding in self._findings if isinstance(finding, Note))
        name = self.device.name
        waiting = tuple(change.step for change in self._changes() if change.needs_reboot)
        return Outcome(name, status, tuple(changes), self._problems_now(), notes, self._facts, seconds, waiting)

    def _waiting(self) -> list[Change]:
        """What was made before this visit, and waited for this boot, or waits for the next."""
        made = {change.step for change in self._all_made}
        return [change for change in self._changes() if _waits(change) and change.step not in made]

    def _link(self) -> Connection:
        if self.stopped.is_set():
            raise InterruptedVisitError(self.device.name)
        if self._connection is None:
            self._connection = self.connect()
        return self._connection

    def _say(self, words: str) -> None:
        if self.stopped.is_set():
            raise InterruptedVisitError(self.device.name)
        self.say(words)


def _waits(change: Change) -> bool:
    """Whether it is made, and only a reboot is lacking."""
    return change.needs_reboot and not change.commands and change.action is None


def _for_an_administrator(change: Change, right: str) -> str:
    commands = " && ".join(batch.text_of(command) for command in change.commands)
    return f"{change.found}, not {change.wanted}; that needs root ({right}): let an administrator run {commands}"
