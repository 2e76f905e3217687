"""Samples of a machine's meters as they are taken, for whoever watches them beside a run.

Called in this process for the meters that the controller reads.  On another machine, over SSH, it is a process of its
own, which tells every event as a line of JSON until its input ends:

    python -I -S -c PROGRAM CODE METERS        (METERS: JSON, a list as `testbed.node.metering.open_meter` takes them)

Events, all with the meter's place in that list:

    {"meter": 0, "opened": {…}}                what is known of it (`described`), or {"meter": 0, "error": why not}
    {"meter": 0, "at": 12.3, "watts": [4.5]}   a sample, by this machine's monotonic clock
    {"meter": 0, "error": "no answer in time"} one that failed

and of a process, "now": its clock as it told the event.  Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from testbed.errors import MeterError
from testbed.meters._power_log import FIRST_RAIL, SECONDS, PowerLog
from testbed.meters._sampler import Sampler, described
from testbed.node.metering import open_meter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from testbed.meters import Meter
    from testbed.meters._power_log import Row

    Tell = Callable[[dict[str, Any]], None]

#: Run on another machine; our code is where it is known to be by its hash.
PROGRAM = """\
import os, sys
sys.path.insert(0, os.path.expanduser(sys.argv[1]))
from testbed.node.meter_stream import main
sys.exit(main(sys.argv[2]))
"""
_INTERVAL_SECONDS = 0.1


class Streams:
    """The meters of one machine, each sampled in a thread of its own, from `open` to `close`."""

    def __init__(self, choices: Sequence[dict[str, Any]], tell: Tell, first: int = 0) -> None:
        self._choices, self._tell, self._first = choices, tell, first
        self._samplers: list[Sampler] = []

    def open(self) -> None:
        """Open every meter, tell of each whether it can be read, and begin to sample."""
        for number, choice in enumerate(self._choices, self._first):
            try:
                meter = open_meter(choice)
            except MeterError as error:
                self._tell({"meter": number, "error": str(error)})
                continue
            self._tell({"meter": number, "opened": described(meter)})
            self._samplers.append(_Telling(meter, number, self._tell))
        for sampler in self._samplers:
            sampler.start()

    def close(self) -> None:
        for sampler in self._samplers:
            sampler.stop()


class _Telling(Sampler):
    """Tells a sample that failed, too."""

    def __init__(self, meter: Meter, number: int, tell: Tell) -> None:
        super().__init__(meter, _Told(len(meter.rails), number, tell), _INTERVAL_SECONDS)
        self._number, self._told = number, tell

    def sample(self) -> None:
        before = self.failures
        super().sample()
        if self.failures != before:
            with contextlib.suppress(OSError):  # whoever listened has gone
                self._told({"meter": self._number, "error": self.error})


class _Told(PowerLog):
    """Rows that are told instead of kept."""

    def __init__(self, rails: int, number: int, tell: Tell) -> None:
        self._rails, self._number, self._tell = rails, number, tell
        self.count = 0

    def append(self, row: Row) -> None:
        self.count += 1
        watts = list(row[FIRST_RAIL : FIRST_RAIL + self._rails])
        self._tell({"meter": self._number, "at": row[SECONDS], "watts": watts})

    def close(self) -> None:
        """There is no file."""


def main(text: str) -> int:
    """Stream the meters of this machine until the input ends."""
    lock = threading.Lock()

    def tell(event: dict[str, Any]) -> None:
        with lock:
            print(json.dumps({**event, "now": time.monotonic()}), flush=True)

    streams = Streams(json.loads(text), tell)
    streams.open()
    sys.stdin.buffer.read()
    streams.close()
    return 0
