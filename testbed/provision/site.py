"""Contents by way of another device of the same site (`via`), while devices are made ready.

The controller sends what a device lacks to the other one, once, and it is fetched from there, as in a run
(`testbed.devices._site`).  The other one may be in the middle of a visit of its own, or have none: some Python ≥ 3.10
is all that it needs.  Where that way fails, contents come from the controller.

Nobody waits for a visit, only for a turn: one at a time sends to a machine, because the same file sent twice at once is
refused there.  Whoever has a turn waits for no other.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.devices import _board
from testbed.devices._agent_node import PROVISION
from testbed.devices._machine import OtherMachine
from testbed.devices._site import Side, carry
from testbed.errors import DeviceError, LockedError, TestbedError
from testbed.provision import board
from testbed.provision.environment_facts import FACTS_PART, parse
from testbed.provision.facts import gather
from testbed.provision.part import Part
from testbed.provision.step import Problem
from testbed.quantities import bytes_text

if TYPE_CHECKING:
    from testbed.connection import Connection
    from testbed.inventory import Device
    from testbed.provision.step import Facts, Say

logger = logging.getLogger(__name__)

_OLDEST = (3, 10)
_PARTS = (board.PART, Part("environment", lambda answer: parse(answer.output), script=FACTS_PART))
#: How often whoever waits says so: that it is to end, it learns from the answer.
_SAY_SECONDS = 0.2
#: Machine → held by whoever sends to it.
_turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


@dataclass(frozen=True)
class Way:
    """How contents come to a device.

    python     an interpreter there
    through    the device that has them first; None: they come from the controller
    """

    to: Device
    python: str
    through: Device | None = None

    def bring(self, connection: Connection, contents: Mapping[str, Path], say: Say) -> None:
        """Have the contents (hash → file) there; raises DeviceError."""
        side = _side(self.to, connection, self.python)
        missing = _missing(connection, side.content, contents)
        if self.through is not None and missing:
            try:
                _bring_through(self.through, side, missing, say)
            except DeviceError as error:
                logger.warning("device %s: sent directly, because its way through another failed: %s", side.name, error)
        with _turn(self.to, say):
            send(connection, side.content, missing, say)


def way_to(device: Device, python: str, others: Iterable[Device]) -> Way:
    """The way to a device, as the inventory says it; `others`: all that may be named there."""
    via = device.access.via if device.access is not None else None
    return Way(device, python, next((other for other in others if other.name == via), None))


def send(connection: Connection, folder: str, contents: Mapping[str, Path], say: Say) -> None:
    """Have the contents in a device's folder: those that it lacks travel, until `say` raises."""
    missing = _missing(connection, folder, contents)
    with ThreadPoolExecutor(1) as pool:
        for number, (content, path) in enumerate(missing.items(), 1):
            words = f"sending {path.name} ({bytes_text(path.stat().st_size)}), {number} of {len(missing)}"
            say(words)
            transfer = pool.submit(connection.put, path, Path(folder, content))
            _finish(transfer, connection, partial(say, words))


def _finish(transfer: Future[int], connection: Connection, say: Callable[[], None]) -> None:
    """Wait for its end.  The connection may be another device's than the one that is visited: nobody else ends it."""
    try:
        while wait([transfer], _SAY_SECONDS).not_done:
            say()
    except TestbedError:
        connection.close()
        raise
    transfer.result()


def _missing(connection: Connection, folder: str, contents: Mapping[str, Path]) -> dict[str, Path]:
    gone = connection.missing(Path(folder, content) for content in contents)
    return {path.name: contents[path.name] for path in gone}


@contextmanager
def _turn(device: Device, say: Say) -> Iterator[None]:
    """Alone in sending to the device's machine."""
    turn = _turns[device.name if device.access is None else f"{device.access.host}:{device.access.port}"]
    while not turn.acquire(timeout=_SAY_SECONDS):
        say(f"waiting for what is being sent to {device.name}")
    try:
        yield
    finally:
        turn.release()


# ── the device in between ────────────────────────────────────────────────────────────────────────────────────────────
def _bring_through(other: Device, to: Side, contents: Mapping[str, Path], say: Say) -> None:
    with _kept(other, contents, say) as source:
        say(f"fetching from {other.name}")
        carry(source, to, contents)


@contextmanager
def _kept(other: Device, contents: Mapping[str, Path], say: Say) -> Iterator[Side]:
    """The other device's side, where the contents are now."""
    with ExitStack() as stack:
        with _turn(other, say):  # to log in, too: a server refuses many at once
            connection = stack.enter_context(closing(_board.connect_to(other)))
            source = _side(other, connection, _interpreter(other, gather(connection, other, _PARTS)))
            send(connection, source.content, contents, lambda words: say(f"{words}, to {other.name}"))
        yield source


def _interpreter(other: Device, facts: Facts) -> str:
    """One that will do there; raises DeviceError where there is none, or the device is not to be touched."""
    wrong = board.Identity().check(facts, other) if other.kind != "emulated" else None
    if isinstance(wrong, Problem):
        raise DeviceError(wrong.text)
    lock = facts["lock"]
    if lock is not None and lock["run"] != PROVISION:  # a run's measurements would suffer; a visit has none
        raise LockedError(f"device {other.name} is held by run {lock['run'] or '(its lock cannot be read)'}")
    python = facts["python"]
    for found in (python["given"], *python["candidates"]):
        if found and found["version"] and tuple(map(int, found["version"].split(".")[:2])) >= _OLDEST:
            return str(found["path"])
    raise DeviceError(f"device {other.name} has no Python of at least {_OLDEST[0]}.{_OLDEST[1]}")


def _side(device: Device, connection: Connection, python: str) -> Side:
    return Side(device.name, OtherMachine(device.name, lambda: connection, python, ""), _folder(device))


def _folder(device: Device) -> str:
    return f"{_board.folder(device)}/content"
