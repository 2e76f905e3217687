"""Meters that the controller reads itself: plugs, switches, a lab's Prometheus, a bench instrument's export.

Their samples become part of the jobs' measurements as if the devices had taken them, by the clock offset that was
measured: `complete` adds a job's window as its result comes, `complete_later` what only a record of the meter tells.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.calibrations import calibration_of
from testbed.devices._agent_node import board_meters, meter_text
from testbed.errors import MeterError
from testbed.measurement import PowerTrace
from testbed.meters import CONTROLLER, meter_class
from testbed.meters._power_log import PowerLog
from testbed.meters._sampler import Sampler, columns, described
from testbed.node.host import try_meters
from testbed.node.metering import open_meter, told_of, windowed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Self

    from testbed.inventory import Device, MeterChoice
    from testbed.job import Result
    from testbed.measurement import Measurement
    from testbed.meters import Meter, Reading
    from testbed.store import RunFolder


def controller_meters(device: Device) -> list[MeterChoice]:
    """Those of a device's meters that the controller reads."""
    return [choice for choice in device.meters if meter_class(choice.name).where == CONTROLLER]


def try_meters_here(devices: Iterable[Device]) -> None:
    """Open every meter that is read on this machine once; raises MeterError for the first that cannot be read."""
    for device in devices:
        own = board_meters(device) if device.access is None else []
        try:
            try_meters([*own, *map(asdict, controller_meters(device))])
        except MeterError as error:
            raise MeterError(meter_text(device.name, str(error))) from None


class ControllerMeters:
    """The samplers of all devices' meters, from `open` to `close`."""

    def __init__(self, devices: Iterable[Device], folder: Path) -> None:
        self._devices = {device.name: device for device in devices}
        self._folder = folder
        self._samplers: dict[str, list[Sampler]] = {}
        self._recorded: dict[str, list[Meter]] = {}  # what cannot be read live
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Open every meter; raises MeterError when one cannot be read."""
        with ExitStack() as undo:
            undo.callback(self._open.close)
            for device in self._devices.values():
                for number, choice in enumerate(controller_meters(device)):
                    self._begin(device, choice, self._folder / f"{device.name}-{number}.bin")
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _begin(self, device: Device, choice: MeterChoice, path: Path) -> None:
        meter = open_meter(asdict(choice))
        if meter.retrospective:
            self._open.callback(meter.close)
            self._recorded.setdefault(device.name, []).append(meter)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        sampler = Sampler(meter, PowerLog(path, columns(meter)))
        self._open.callback(path.unlink, missing_ok=True)  # the jobs' records hold what counts
        self._open.callback(sampler.stop)
        self._samplers.setdefault(device.name, []).append(sampler)
        sampler.start()

    def told(self, device: str, figures: Mapping[str, Any]) -> dict[str, Any]:
        """A device's telemetry with its meters here."""
        ours = [told_of(sampler) for sampler in self._samplers.get(device, ())]
        return {**figures, "meters": [*(figures.get("meters") or ()), *ours]}

    def complete(self, result: Result) -> Result:
        """A result with the samples of these meters, and with the calibrations of all."""
        measured, device = result.measurement, self._devices.get(result.device)
        if device is None:
            return result
        traces = [*measured.power]
        if (window := _window(measured)) is not None:
            for sampler in self._samplers.get(result.device, ()):
                sampler.sample()
                traces.append(_live(sampler, window, measured.clock_seconds or 0.0))
        calibrated = (replace(trace, calibration=calibration_of(device, trace.meter)) for trace in traces)
        return replace(result, measurement=replace(measured, power=_in_order(calibrated, device)))

    def complete_later(self, folder: RunFolder) -> None:
        """Add to every job of a run what the meters recorded that cannot be read live; raises MeterError."""
        for result in [*folder.results(), *folder.rests()]:
            meters, device = self._recorded.get(result.device, ()), self._devices.get(result.device)
            window = _window_unix(result.measurement)
            if not meters or device is None or window is None:
                continue
            whole = folder.with_power(result)
            traces = [*whole.measurement.power, *(_recorded(meter, window, whole.measurement) for meter in meters)]
            power = _in_order(
                (replace(trace, calibration=calibration_of(device, trace.meter)) for trace in traces), device
            )
            folder.record_power(replace(whole, measurement=replace(whole.measurement, power=power)))


def _in_order(traces: Iterable[PowerTrace], device: Device) -> tuple[PowerTrace, ...]:
    """As the inventory has them; of a meter that comes twice, the last."""
    by_name = {trace.meter: trace for trace in traces}
    order = [choice.name for choice in device.meters]
    return tuple(sorted(by_name.values(), key=lambda trace: order.index(trace.meter) if trace.meter in order else 99))


def _window_unix(measured: Measurement) -> tuple[float, float] | None:
    if measured.begun_unix_seconds is None:
        return None
    ends = [(phase.begun_seconds or 0.0) + phase.seconds for phase in measured.phases]
    return measured.begun_unix_seconds, measured.begun_unix_seconds + max(ends, default=0.0)


def _window(measured: Measurement) -> tuple[float, float] | None:
    """A job's window on this machine's monotonic clock."""
    window = _window_unix(measured)
    offset = time.monotonic() - time.time()
    return None if window is None else (window[0] + offset, window[1] + offset)


def _live(sampler: Sampler, window: tuple[float, float], clock_seconds: float) -> PowerTrace:
    return replace(PowerTrace.from_json(windowed(sampler, *window)), timing_seconds=clock_seconds)


def _recorded(meter: Meter, window: tuple[float, float], measured: Measurement) -> PowerTrace:
    since, until = window
    readings = meter.history(since, until)
    trace = {**described(meter), "interval_seconds": meter.period_seconds, "rows": _rows(readings, since)}
    return replace(PowerTrace.from_json(trace), timing_seconds=measured.clock_seconds or 0.0)


def _rows(readings: Iterable[Reading], since: float) -> list[tuple[float, ...]]:
    known = [reading for reading in readings if reading.unix_seconds is not None]
    first = known[0].joules if known else None
    return [
        (
            round((reading.unix_seconds or 0.0) - since, 4),
            0.0,
            *reading.watts,
            *(now - then for now, then in zip(reading.joules or (), first or (), strict=False)),
        )
        for reading in known
    ]
