"""What an agent measures beside memory, for as long as it lives: the power of its board, its temperature, throttling.

metering = Metering(spool_folder, settings)     # raises MeterError when a meter cannot be read
metering.begin()                                # a window begins: a job, or rest
metering.measured(since, until)                 # its samples and conditions, as JSON
metering.told()                                 # how things stand now, for whoever watches
metering.close()
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import MeterError
from testbed.meters import make
from testbed.meters._power_log import PowerLog
from testbed.meters._sampler import Sampler, columns
from testbed.node.conditions import Conditions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.meters import Meter

#: Temperatures change slowly.
_CONDITIONS_SECONDS = 1.0
#: Of one window in one result: a frame's header is limited.  A job of hours tells every second sample, or every third.
_MOST_ROWS = 30_000


def open_meter(choice: Mapping[str, Any]) -> Meter:
    """A meter as the controller describes it: name, settings, and where the inventory or the profile knows better.

    Raises MeterError when it cannot be read, with the meter's name.
    """
    meter = make(choice["name"], choice["settings"])
    try:
        meter.open()
    except MeterError as error:
        raise MeterError(f"meter {choice['name']}: {error}") from None
    meter.point = choice.get("point") or meter.point
    stated = tuple(rail for rail in choice.get("total_rails") or () if rail in meter.rails)
    meter.total_rails = stated or meter.total_rails
    return meter


class Metering:
    """The samplers of a board's meters, and its conditions."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._conditions = Conditions(settings.get("root") or "/")
        self._celsius = self._begin_celsius = self._highest_celsius = self._conditions.celsius()
        self._next_look = 0.0
        self._too_hot = False
        self._cpu_seconds = 0.0
        self._samplers: list[Sampler] = []
        self._logs: list[Path] = []
        try:
            for number, choice in enumerate(settings.get("meters") or ()):
                meter = open_meter(choice)
                self._logs.append(folder / f"power-{number}.bin")
                log = PowerLog(self._logs[-1], columns(meter))
                self._samplers.append(Sampler(meter, log, settings.get("power_seconds")))
        except BaseException:
            self.close()
            raise
        for sampler in self._samplers:
            sampler.start()

    @property
    def celsius(self) -> float | None:
        """The hottest of the board's sensors, at the last look; None where there is none."""
        return self._celsius

    def next_due(self) -> float:
        """When `on_time` wants to be called, on the monotonic clock."""
        return self._next_look

    def on_time(self, now: float) -> None:
        """Look at the temperature, when it is time."""
        if now >= self._next_look:
            self._next_look = now + _CONDITIONS_SECONDS
            self._look()

    def begin(self, *, too_hot: bool = False) -> None:
        """A window begins: one sample at its edge, and the flags of the board as they are now."""
        self._sample()
        self._conditions.mark()
        self._look()
        self._begin_celsius = self._highest_celsius = self._celsius
        self._too_hot = too_hot
        self._cpu_seconds = time.process_time()

    def measured(self, since: float, until: float) -> dict[str, Any]:
        """What `testbed.measurement.Measurement` has of a window of the monotonic clock: power, conditions, our share.

        `since` lies at or before the last `begin`, of which conditions and share are.
        """
        self._sample()
        self._look()
        throttled = self._conditions.since_mark()
        return {
            "power": [windowed(sampler, since, until) for sampler in self._samplers],
            "conditions": {
                "begin_celsius": self._begin_celsius,
                "highest_celsius": self._highest_celsius,
                "throttled": None if throttled is None else list(throttled),
                "too_hot": self._too_hot,
            },
            "agent_cpu_seconds": round(time.process_time() - self._cpu_seconds, 4),
            "agent_pss_bytes": _own_pss_bytes(),
        }

    def told(self) -> dict[str, Any]:
        """Power and running totals by rail, temperature, throttling: how things stand."""
        throttled = self._conditions.throttled()
        return {
            "meters": [told_of(sampler) for sampler in self._samplers],
            "celsius": self._celsius,
            "throttled": None if throttled is None else list(throttled),
        }

    def close(self) -> None:
        """End the samplers, and remove their files: what belongs to a job is in its result."""
        for sampler in self._samplers:
            sampler.stop()
        for path in self._logs:
            path.unlink(missing_ok=True)

    def _sample(self) -> None:
        for sampler in self._samplers:
            sampler.sample()

    def _look(self) -> None:
        self._celsius = self._conditions.celsius()
        known = [each for each in (self._celsius, self._highest_celsius) if each is not None]
        self._highest_celsius = max(known, default=None)


def _own_pss_bytes() -> int | None:
    """Our memory, shared pages by their share; None where the kernel does not tell."""
    try:
        data = Path("/proc/self/smaps_rollup").read_bytes()
    except OSError:
        return None
    found = [line.split()[1] for line in data.splitlines() if line.startswith(b"Pss:")]
    return int(found[0]) * 1024 if found else None


def told_of(sampler: Sampler) -> dict[str, Any]:
    """What a meter said last, and the running totals of its rails since it was opened."""
    meter, watts = sampler.meter, sampler.watts
    known = dict(zip(meter.rails, watts, strict=True)) if watts is not None and sampler.error is None else None
    return {
        "meter": type(meter).__module__.rpartition(".")[2],
        "point": meter.point,
        "replayed": meter.replayed,
        "watts": known,
        "total_watts": sum(known[rail] for rail in meter.total_rails) if known and meter.total_rails else None,
        "joules": dict(zip(meter.rails, sampler.joules, strict=True)),
        "error": sampler.error,
    }


def windowed(sampler: Sampler, since: float, until: float) -> dict[str, Any]:
    """A window's samples; fewer where there are too many for a frame, and the interval between them says so."""
    trace = sampler.trace(since, until)
    rows = trace["rows"]
    every = -(-len(rows) // _MOST_ROWS)
    if every <= 1:
        return trace
    kept = rows[::every] if (len(rows) - 1) % every == 0 else [*rows[::every], rows[-1]]
    return {**trace, "rows": kept, "interval_seconds": trace["interval_seconds"] * every}
