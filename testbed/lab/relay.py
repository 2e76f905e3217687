"""Delay and loss where the kernel has no netem: a process between two TAP devices that passes Ethernet frames on.

One device is a port of the lab's bridge, the other is eth0 of the host.  A frame waits `delay_seconds` in each
direction, in order; a share `loss` is dropped, drawn from a seeded generator.

Tried on: Linux 6.18, x86-64.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import time
from collections import deque
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from testbed.lab.link import LinkShape

#: Frames that wait in one direction at most; what comes then is dropped, as by a router.
MOST_FRAMES = 10_000
_LARGEST_FRAME = 65_536
_FRAMES_AT_ONCE = 64
_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000


class DelayLine:
    """One direction.  Knows nothing of devices or clocks: a frame goes in at a time, and comes out at a time."""

    def __init__(self, shape: LinkShape, random: Random) -> None:
        self._shape = shape
        self._random = random
        self._waiting: deque[tuple[float, bytes]] = deque()

    def put(self, frame: bytes, now: float) -> None:
        """Take a frame, or lose it."""
        lost = self._random.random() < self._shape.loss
        if not lost and len(self._waiting) < MOST_FRAMES:
            self._waiting.append((now + self._shape.delay_seconds, frame))

    def due(self, now: float) -> list[bytes]:
        """The frames whose time has come, in the order in which they came."""
        found = []
        while self._waiting and self._waiting[0][0] <= now:
            found.append(self._waiting.popleft()[1])
        return found

    @property
    def next_at(self) -> float | None:
        """When the next frame is due; None when none waits."""
        return self._waiting[0][0] if self._waiting else None


def open_tap(name: str) -> int:
    """Make a TAP device; it is there for as long as the descriptor that this gives is open.  Raises OSError."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _TAP_WITHOUT_HEADER))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def relay(one: int, other: int, shape: LinkShape, seed: str) -> None:
    """Pass frames between two TAP devices, for ever."""
    lines = {
        one: (DelayLine(shape, Random(f"{seed} there")), other),
        other: (DelayLine(shape, Random(f"{seed} back")), one),
    }
    while True:
        next_at = min((line.next_at for line, _ in lines.values() if line.next_at is not None), default=None)
        patience = None if next_at is None else max(0.0, next_at - time.monotonic())
        readable, _, _ = select.select(list(lines), [], [], patience)
        for source in readable:
            _take_in(source, lines[source][0])
        now = time.monotonic()
        for line, target in lines.values():
            for frame in line.due(now):
                _pass_on(frame, target)


def _take_in(source: int, line: DelayLine) -> None:
    for _ in range(_FRAMES_AT_ONCE):
        try:
            frame = os.read(source, _LARGEST_FRAME)
        except OSError:  # no more, or the device is down
            return
        line.put(frame, time.monotonic())


def _pass_on(frame: bytes, target: int) -> None:
    """A device that is down, or whose queue is full, loses the frame, as a cable would."""
    try:
        os.write(target, frame)
    except OSError:
        return
