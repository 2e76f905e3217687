"""Many devices made ready side by side; one that fails, or does not answer, does not stop the others."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from testbed import fact_sheets
from testbed.devices._board import connect_to
from testbed.provision.attestation import Attestation, drift
from testbed.provision.board import Capacity
from testbed.provision.boot_script import BootHook
from testbed.provision.charge import CHARGE_PART, ChargeProbe
from testbed.provision.disk import DiskSpace
from testbed.provision.environment import EnvironmentOptions
from testbed.provision.environment import steps as environment_steps
from testbed.provision.environment_facts import FACTS_PART, parse
from testbed.provision.facts import FACTS_SCRIPT_PARTS
from testbed.provision.memory_cgroup import Delegation, MemoryCgroup
from testbed.provision.own_folder import PrivateFolder
from testbed.provision.part import Part
from testbed.provision.sheet import keep
from testbed.provision.step import Problem, Step
from testbed.provision.visit import FAILED, Options, Outcome, Visit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from testbed.connection import Connection
    from testbed.inventory import Device

#: Beside the parts of every device: Python, the environment, what was measured in it.
ENVIRONMENT_PARTS: tuple[Part, ...] = (
    Part("environment", lambda answer: parse(answer.output), script=FACTS_PART),
    CHARGE_PART,
)
Connect = Callable[["Device"], "Connection"]


class Watcher(Protocol):
    """Who is told what happens; from any thread."""

    def doing(self, device: str, words: str) -> None:
        """A device is now at this."""

    def ended(self, outcome: Outcome) -> None:
        """A device's visit is over."""


class Silent:
    """A watcher that says nothing."""

    def doing(self, device: str, words: str) -> None: ...

    def ended(self, outcome: Outcome) -> None: ...


def board_steps(device: Device, options: Options) -> tuple[Step, ...]:
    """What the device's kind asks of the machine; an emulated device is a guest on a host, and changes little there."""
    last: tuple[Step, ...] = (PrivateFolder(),)
    if device.kind == "emulated":
        steps: tuple[Step, ...] = (Capacity(), DiskSpace(), BootHook(), MemoryCgroup(), Delegation())
    else:
        steps = importlib.import_module(f"testbed.devices.{device.kind}").steps(device)
        last = (PrivateFolder(), Attestation())
    return tuple(step for step in (*steps, *last) if not (options.keep_swap and step.name == "swap"))


def all_steps(device: Device, options: Options, environment: EnvironmentOptions | None) -> tuple[Step, ...]:
    """The board's steps, then the environment's."""
    return (*board_steps(device, options), *environment_steps(device, environment), ChargeProbe())


class Provisioning:
    """Visits to some devices, a few at a time.  Two devices on one machine are visited one after the other."""

    def __init__(
        self,
        devices: Iterable[Device],
        options: Options,
        *,
        environment: EnvironmentOptions | None = None,
        jobs: int = 8,
        watcher: Watcher | None = None,
        connect: Connect = connect_to,
        steps: Callable[[Device], Sequence[Step]] | None = None,
        parts: Sequence[Part] = (*FACTS_SCRIPT_PARTS, *ENVIRONMENT_PARTS),
    ) -> None:
        self._options = options
        self._watcher = watcher or Silent()
        self._stopped = threading.Event()
        self._jobs = jobs
        chosen = steps or (lambda device: all_steps(device, options, environment))
        self._visits = [self._visit(device, chosen, parts, connect) for device in devices]

    def run(self) -> list[Outcome]:
        """All visits, in the devices' order; raises KeyboardInterrupt when every visit has been ended."""
        pool = ThreadPoolExecutor(self._jobs, thread_name_prefix="provision")
        futures = [pool.submit(self._one_after_the_other, visits) for visits in _by_machine(self._visits)]
        try:
            _wait_for(futures)
        except KeyboardInterrupt:
            self.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        ended = {outcome.device: outcome for future in futures for outcome in future.result()}
        return [ended[visit.device.name] for visit in self._visits]

    def stop(self) -> None:
        """End every visit now; what was begun is found at the next one."""
        self._stopped.set()
        for visit in self._visits:
            visit.close()

    def _visit(
        self, device: Device, steps: Callable[[Device], Sequence[Step]], parts: Sequence[Part], connect: Connect
    ) -> Visit:
        return Visit(
            device,
            steps(device),
            parts,
            connect=lambda: connect(device),
            options=self._options,
            say=lambda words: self._watcher.doing(device.name, words),
            stopped=self._stopped,
        )

    def _one_after_the_other(self, visits: Sequence[Visit]) -> list[Outcome]:
        outcomes = []
        for visit in visits:
            with visit:
                outcome = self._outcome(visit)
            self._watcher.ended(outcome)
            outcomes.append(outcome)
        return outcomes

    def _outcome(self, visit: Visit) -> Outcome:
        try:
            outcome = _with_drift(visit, visit.go())
            return outcome if self._options.check else keep(visit, outcome)
        except Exception as error:  # noqa: BLE001 -- what is wrong with one device, or with us, stops no other
            text = f"{type(error).__name__}: {error}; that is a fault of the testbed: please report it"
            return Outcome(visit.device.name, FAILED, problems=(Problem("provision", text),))


def _with_drift(visit: Visit, outcome: Outcome) -> Outcome:
    """With what was changed by hand since the last visit, as it was found before this one changed anything."""
    if visit.first_facts is None:
        return outcome
    return replace(outcome, drift=drift(fact_sheets.facts_of(visit.device), visit.first_facts, visit.device))


def _by_machine(visits: Sequence[Visit]) -> list[list[Visit]]:
    """Visits to the same machine together, because they would be in each other's way."""
    machines: dict[Any, list[Visit]] = {}
    for visit in visits:
        access = visit.device.access
        key = visit.device.name if access is None else (access.host, access.user, access.port)
        machines.setdefault(key, []).append(visit)
    return list(machines.values())


def _wait_for(futures: Sequence[Future[Any]]) -> None:
    """Until all are done; in short waits, because a Ctrl-C is only looked at between them."""
    left: set[Future[Any]] = set(futures)
    while left:
        _, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
