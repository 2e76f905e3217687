"""The meters of one device, watched from the controller, wherever they are read.

    with Watch(device) as watch:
        watch.meters                        # what is known of each, or why it cannot be read
        for sample in watch.samples(10.0):  # as they come; None about once a second
            ...

A meter of the controller is read here, in a thread.  A board's own is read on the board, by our code there, which is
sent if it is not (`testbed.node.meter_stream`); on a board that a run holds only where the code is there already.
Samples carry the controller's monotonic clock: a board's clock is set against it by the message that came the fastest.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from socket import SHUT_RDWR
from threading import Thread
from typing import TYPE_CHECKING, Any

from testbed.errors import DeviceError, MeterError, UsageError
from testbed.inventory import MeterChoice
from testbed.meters import BOARD, POINTS, Accuracy, Meter, check, make, meter_class
from testbed.meters._sampler import described
from testbed.node.meter_stream import PROGRAM, Streams
from testbed.node.metering import open_meter

if TYPE_CHECKING:
    import socket
    from typing import Self

    from testbed.inventory import Device

    _Tell = Callable[[Mapping[str, Any]], None]

_TICK_SECONDS = 1.0
#: Ticks between words of how long something takes yet.
_LEFT_EVERY = 10
#: Until a board's meters are open: jtop answers after seconds.
_OPEN_SECONDS = 30.0


@dataclass(frozen=True)
class WatchedMeter:
    """What is known of a meter that is watched, or why it cannot be read."""

    name: str
    point: str = ""
    rails: tuple[str, ...] = ()
    total_rails: tuple[str, ...] = ()
    accuracy: tuple[Accuracy, ...] = ()
    replayed: bool = False
    error: str | None = None

    def total(self, watts: Sequence[float]) -> float | None:
        """The whole at its point; None where no sum of rails is."""
        by_rail = dict(zip(self.rails, watts, strict=True))
        return sum(by_rail[rail] for rail in self.total_rails) if self.total_rails else None

    @property
    def total_accuracy(self) -> Accuracy:
        """Of the total: gains as the worst of its rails', the rest added up."""
        parts = [each for rail, each in zip(self.rails, self.accuracy, strict=True) if rail in self.total_rails]
        return Accuracy(
            max((part.gain for part in parts), default=0.0),
            sum(part.offset_watts for part in parts),
            sum(part.step_watts for part in parts),
            max((part.timing_seconds for part in parts), default=0.0),
        )


@dataclass(frozen=True)
class Sample:
    """What a meter said: power of its rails at a time of the controller's monotonic clock, or why it said nothing."""

    meter: int  # its place in `Watch.meters`
    seconds: float
    watts: tuple[float, ...] | None
    error: str | None = None


@dataclass
class Tally:
    """What came of one meter, rail by rail."""

    meter: WatchedMeter
    samples: int = 0
    failures: int = 0
    longest_gap_seconds: float | None = None
    last: tuple[float, ...] | None = None
    error: str | None = None  # of the last reading, where it failed
    lowest: list[float] = field(default_factory=list)
    highest: list[float] = field(default_factory=list)
    _sums: list[float] = field(default_factory=list)
    _at: float | None = None

    def add(self, sample: Sample) -> None:
        self.error = sample.error
        if sample.watts is None:
            self.failures += 1
            return
        values = self.values(sample.watts)
        if not self.samples:
            self.lowest, self.highest, self._sums = [*values], [*values], [0.0] * len(values)
        self.samples += 1
        self.last = sample.watts
        for index, value in enumerate(values):
            self.lowest[index] = min(self.lowest[index], value)
            self.highest[index] = max(self.highest[index], value)
            self._sums[index] += value
        if self._at is not None:
            self.longest_gap_seconds = max(self.longest_gap_seconds or 0.0, sample.seconds - self._at)
        self._at = sample.seconds

    @property
    def names(self) -> list[str]:
        """The rails, and "total" where a sum of several is the whole."""
        return [*self.meter.rails, *(["total"] if len(self.meter.total_rails) > 1 else [])]

    def values(self, watts: tuple[float, ...]) -> list[float]:
        """The power of `names`."""
        total = self.meter.total(watts)
        return [*watts, *([total] if total is not None and len(self.meter.total_rails) > 1 else [])]

    @property
    def means(self) -> list[float]:
        return [value / self.samples for value in self._sums]


class Watch:
    """The meters of a device that can be read live, from `with` to its end."""

    def __init__(self, device: Device, choices: Sequence[MeterChoice] | None = None) -> None:
        """`choices`: other meters than all of the inventory's."""
        self.meters: list[WatchedMeter] = []
        self._device = device
        self._choices = tuple(device.meters if choices is None else choices)
        self._events: SimpleQueue[Sample | DeviceError] = SimpleQueue()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Open the meters; raises MeterError when none can be read, UsageError when there is none, and DeviceError."""
        if not self._choices:
            raise UsageError(
                f"device {self._device.name} has no meter: name one in the inventory (meter: …; docs/meters.md says "
                f"which), or leave it without energy"
            )
        self.meters = [WatchedMeter(choice.name) for choice in self._choices]
        with ExitStack() as undo:
            undo.callback(self._open.close)
            self._begin()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def samples(self, seconds: float | None = None) -> Iterator[Sample | None]:
        """What the meters say, for so long (None: for ever); None as often as a display wants to be drawn.

        Raises DeviceError when the connection to the board is lost.
        """
        begun = time.monotonic()
        tick = begun + _TICK_SECONDS
        while True:
            now = time.monotonic()
            if seconds is not None and now >= begun + seconds:
                return
            if now >= tick:
                tick += _TICK_SECONDS * (1 + (now - tick) // _TICK_SECONDS)
                yield None
            until = tick if seconds is None else min(tick, begun + seconds)
            try:
                event = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                continue
            if isinstance(event, DeviceError):
                raise event
            yield event

    def _begin(self) -> None:
        here, there = [], []
        for number, choice in enumerate(self._choices):
            if not can_be_read(choice.name):
                self._told({"meter": number, "error": f"meter {choice.name}: it is read after a run, not live"})
            elif self._device.access is not None and meter_class(choice.name).where == BOARD:
                there.append(number)
            else:
                here.append(number)
        if there:
            self._begin_there(there)
        for number in here:
            streams = Streams([self._asked(number)], self._told, first=number)
            self._open.callback(streams.close)
            streams.open()
        if all(meter.error is not None for meter in self.meters):
            raise MeterError(f"device {self._device.name}: " + "; ".join(str(meter.error) for meter in self.meters))

    def _begin_there(self, numbers: list[int]) -> None:
        channel = self._open.enter_context(board_channel(self._device, [self._asked(number) for number in numbers]))
        board = _Board(self._device.name, numbers, channel)
        self._open.callback(board.close)
        board.wait_open(self._told)
        board.start(self._told, self._events.put)

    def _asked(self, number: int) -> dict[str, Any]:
        return as_asked(self._device, self._choices[number])

    def _told(self, event: Mapping[str, Any]) -> None:
        number, meter = event["meter"], self.meters[event["meter"]]
        if "opened" in event:
            self.meters[number] = _known(event["opened"])
        elif not meter.rails:
            self.meters[number] = WatchedMeter(meter.name, error=event["error"])
        elif "watts" in event:
            self._events.put(Sample(number, event["at"], tuple(event["watts"])))
        else:
            self._events.put(Sample(number, time.monotonic(), None, event["error"]))


class _Board:
    """Events of a board's meters, with their places and times as they are here."""

    def __init__(self, device: str, numbers: Sequence[int], channel: socket.socket) -> None:
        self._device, self._numbers = device, numbers
        self._channel = channel
        self._lines = channel.makefile("r", encoding="utf-8", errors="replace")
        self._offset = float("inf")  # the least that an event took: its journey, and how far the clocks are apart
        self._thread: Thread | None = None

    def wait_open(self, tell: _Tell) -> None:
        """Pass on what is told of every meter; raises DeviceError when that takes too long, or breaks off."""
        self._channel.settimeout(_OPEN_SECONDS)
        for _ in self._numbers:
            tell(self._next())
        self._channel.settimeout(None)

    def start(self, tell: _Tell, fail: Callable[[DeviceError], None]) -> None:
        """Pass on samples, in a thread, until the channel ends."""
        self._thread = Thread(target=self._run, args=(tell, fail), name=f"meters-{self._device}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; what tells the samples on the board ends with its input."""
        with suppress(OSError):
            self._channel.shutdown(SHUT_RDWR)  # it may be reading: closing alone would not wake it
        if self._thread is not None:
            self._thread.join()
        self._lines.close()

    def _run(self, tell: _Tell, fail: Callable[[DeviceError], None]) -> None:
        try:
            while True:
                tell(self._next())
        except DeviceError as error:
            fail(error)

    def _next(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
            event: dict[str, Any] = json.loads(line)
            arrived = time.monotonic()
            self._offset = min(self._offset, arrived - event["now"])
        except TimeoutError:
            raise DeviceError(f"device {self._device}: its meters are not open after {_OPEN_SECONDS:.0f} s") from None
        except (OSError, ValueError, KeyError):
            raise DeviceError(
                f"device {self._device}: its meters tell nothing any more: the connection is lost, or what reads them "
                f"there has ended"
            ) from None
        at = {"at": event["at"] + self._offset} if "at" in event else {}
        return {**event, **at, "meter": self._numbers[event["meter"]]}


@contextmanager
def board_channel(device: Device, asked: Sequence[Mapping[str, Any]]) -> Iterator[socket.socket]:
    """A channel to `testbed.node.meter_stream` on the device's machine; raises DeviceError or one of its kinds."""
    from testbed import code_wheel
    from testbed.cache import cache_folder
    from testbed.devices import NodeSettings
    from testbed.devices._board import remote_node
    from testbed.fact_sheets import facts_of

    facts = facts_of(device)
    settings = NodeSettings(
        f"meter-{os.getpid()}",
        Path("unused"),
        wheel=code_wheel.build(cache_folder() / "wheels"),
        facts={} if facts is None else {device.name: facts},
    )
    node = remote_node(device, settings, board=device.kind != "emulated")
    try:
        node.on.ask_early("holder", lock=node.place.lock)  # is it that board, and is there an interpreter?
        if node.lacks(())[0]:
            node.seed({})
        with node.on.run_text(PROGRAM, node.place.code, json.dumps(asked)) as channel:
            yield channel
    finally:
        node.hang_up()


def as_asked(device: Device, choice: MeterChoice) -> dict[str, Any]:
    """A meter of a device as `testbed.node.metering.open_meter` takes it; the profile's total is a board's own."""
    own = meter_class(choice.name).where == BOARD
    total = list(device.profile.total_rails) if own else []
    return {"name": choice.name, "settings": dict(choice.settings), "point": choice.point, "total_rails": total}


def can_be_read(name: str) -> bool:
    """Whether a meter of that name tells the power now, and not only what it recorded."""
    return meter_class(name).read is not Meter.read


@dataclass(frozen=True)
class Seen:
    """A meter, and what it said for a while."""

    meter: WatchedMeter
    samples: tuple[Sample, ...]

    @property
    def totals(self) -> list[tuple[float, float]]:
        """(Seconds, watts) of the whole at its point; raises MeterError where no sum of rails is the whole."""
        if not self.meter.total_rails:
            raise MeterError(
                f"{self.meter.name}: no rail of it, or sum of rails, is the whole of the board "
                f"({', '.join(self.meter.rails)}): it cannot be set against another meter"
            )
        known = ((sample.seconds, self.meter.total(sample.watts)) for sample in self.samples if sample.watts)
        return [(at, total) for at, total in known if total is not None]


def watched_together(
    device: Device, choices: Sequence[MeterChoice], seconds: float, told_left: Callable[[float], None]
) -> list[Seen]:
    """Several meters over the same time; what is not read live is taken from its record when that is over.

    `told_left` hears now and then how many seconds are left.  Raises MeterError when one of them cannot be read.
    """
    live = [choice for choice in choices if can_be_read(choice.name)]
    if not live:
        raise UsageError(f"{' and '.join(choice.name for choice in choices)} are read after a run: none of them live")
    for choice in choices:
        if choice not in live:
            open_meter(as_asked(device, choice)).close()  # before the time is spent
    begun = time.monotonic()
    seen = dict(zip(map(id, live), _watched(device, live, seconds, told_left), strict=True))
    return [seen.get(id(choice)) or _recorded(device, choice, (begun, time.monotonic())) for choice in choices]


def _watched(
    device: Device, choices: Sequence[MeterChoice], seconds: float, told_left: Callable[[float], None]
) -> list[Seen]:
    samples: list[list[Sample]] = [[] for _ in choices]
    with Watch(device, choices) as watch:
        for meter in watch.meters:
            if meter.error is not None:
                raise MeterError(f"device {device.name}: {meter.error}")
        ticks = 0
        for sample in watch.samples(seconds):
            if sample is not None:
                samples[sample.meter].append(sample)
            elif (ticks := ticks + 1) % _LEFT_EVERY == 0:
                told_left(seconds - ticks * _TICK_SECONDS)
        return [Seen(meter, tuple(each)) for meter, each in zip(watch.meters, samples, strict=True)]


def _recorded(device: Device, choice: MeterChoice, seconds: tuple[float, float]) -> Seen:
    """What a meter recorded between two times of the monotonic clock."""
    meter = open_meter(as_asked(device, choice))
    try:
        offset = time.time() - time.monotonic()
        readings = meter.history(*(at + offset for at in seconds))
        known = _known(described(meter))
    finally:
        meter.close()
    return Seen(known, tuple(Sample(0, (each.unix_seconds or 0.0) - offset, each.watts) for each in readings))


def choice_from(text: str, device: Device) -> MeterChoice:
    """Another meter of the device by its name, or one that is described: `shelly:host=plug-1.lan,channel=1`.

    Raises UsageError for one that there is not, or that cannot be so.
    """
    name, _, rest = text.partition(":")
    known = next((choice for choice in device.meters if choice.name == text), None)
    if known is not None:
        return known
    settings: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f'"{text}": expected NAME or NAME:KEY=VALUE,KEY=VALUE, got "{pair}"')
        settings[key.strip()] = _value(value.strip())
    point = settings.pop("point", None)
    if point is not None and point not in POINTS:
        raise UsageError(f'"{text}": point: expected one of {", ".join(POINTS)}, got "{point}"')
    if isinstance(settings.get("file"), str):
        settings["file"] = str(Path(settings["file"]).expanduser().absolute())
    check(name, settings)
    make(name, settings)
    return MeterChoice(name, settings, point)


def _value(text: str) -> Any:
    """A number, true, false or null; else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _known(told: Mapping[str, Any]) -> WatchedMeter:
    return WatchedMeter(
        told["meter"],
        told["point"],
        tuple(told["rails"]),
        tuple(told["total_rails"]),
        tuple(Accuracy(*each) for each in told["accuracy"]),
        told["replayed"],
    )
