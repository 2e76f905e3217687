"""What was measured: times, peak memory and power of a job, phase by phase.  Standard library only.

`None` means not measured; it is never 0 and never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class PeakMemory:
    """The three bounds of a peak, each with its source (no kernel keeps a watermark of unreclaimable memory alone).

    lower_bytes        largest sample of anonymous + shared (+ kernel, where the cgroup tells) memory
    estimate_bytes     VmHWM less the file pages of the sample nearest to it
    upper_bytes        the cgroup's own peak, page cache included
    accelerator_bytes  largest sample of what was held on the accelerator; what lies beyond the allocator's own peak
                       (`Measurement.accelerator_peak_bytes`) is mostly the CUDA context

    On a device with an accelerator every bound counts its memory too, once, and its source says by which figure:
    "sampled+nvmap_process" is a sample with nvmap's table of processes.  A source without a "+" has had nothing added:
    the cgroup's counter holds it already.  An estimate or an upper bound that nobody can complete is None.
    """

    lower_bytes: int | None = None
    estimate_bytes: int | None = None
    upper_bytes: int | None = None
    #: bound → cgroup2_peak | cgroup1_max_usage | vmhwm | sampled, and on an accelerator + nvmap_process | nvmap_delta |
    #: nvml_process | nvml_delta | torch_reserved
    sources: dict[str, str] = field(default_factory=dict)
    file_bytes: int | None = None  # file pages mapped at that sample
    refaults: int | None = None  # pages read again after they were reclaimed
    samples: int = 0
    accelerator_bytes: int | None = None


@dataclass(frozen=True)
class PhaseMeasurement:
    """One phase of a job: receive, load, a method's own ("probe", "train"), send."""

    name: str
    seconds: float
    peak: PeakMemory = field(default_factory=PeakMemory)
    #: Raw samples: seconds since the phase began; VmHWM, anonymous, file and unreclaimable bytes; with an accelerator,
    #: the bytes held there (None where they could not be read).
    trace: tuple[tuple[float | None, ...], ...] = ()
    begun_seconds: float | None = None  # after the job's first byte came; None in records without power


@dataclass(frozen=True)
class Calibration:
    """A meter's total as another meter had it: `gain` × watts + `offset_watts`, in the range that was seen.

    residual_watts   half-width at 95 % of what is left between the two
    reference_gain   accuracy of the reference itself, a ratio at 95 %
    """

    gain: float
    offset_watts: float
    residual_watts: float
    reference: str  # the meter that it was compared with
    point: str  # where that one measures, and so from then on this one
    reference_gain: float
    lowest_watts: float
    highest_watts: float
    samples: int
    made: str = ""  # when, as ISO 8601


@dataclass(frozen=True)
class PowerTrace:
    """Raw power samples of a job's window from one meter, with what is known of the meter (`testbed.meters`).

    rows: seconds after the job's first byte came · seconds that the wall clock has moved against the monotonic one
    since the first row · watts of each rail, in their order [· joules that each rail's counter has grown by since the
    first row].  They reach one sample beyond the window on either side, where there is one.
    """

    meter: str
    point: str  # where it measures: wall_ac, dc_input, module_rail, soc_pmic, processor
    rails: tuple[str, ...]
    total_rails: tuple[str, ...]  # whose sum is the whole at that point; () where no sum is
    accuracy: tuple[tuple[float, float, float, float], ...]  # per rail: the fields of `testbed.meters.Accuracy`
    interval_seconds: float
    rows: tuple[tuple[float, ...], ...] = ()
    replayed: bool = False  # a recording was played, nothing was measured
    timing_seconds: float = 0.0  # how well the samples' clock is known against the job's (0: it is the same)
    calibration: Calibration | None = None  # of the total; the rows stay as they were read

    @property
    def counters(self) -> bool:
        """Whether the rows end with energy counters."""
        return bool(self.rows) and len(self.rows[0]) == 2 + 2 * len(self.rails)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PowerTrace:
        """The reverse of `dataclasses.asdict`."""
        tuples = {key: tuple(data[key]) for key in ("rails", "total_rails")}
        nested = {key: tuple(map(tuple, data.get(key, ()))) for key in ("accuracy", "rows")}
        calibration = Calibration(**data["calibration"]) if data.get("calibration") else None
        return cls(**{**data, **tuples, **nested, "calibration": calibration})


@dataclass(frozen=True)
class Conditions:
    """How a device stood during a job.  `throttled` names what it was held back by; None where nothing tells."""

    begin_celsius: float | None = None
    highest_celsius: float | None = None
    throttled: tuple[str, ...] | None = None
    too_hot: bool = False  # the thermal gate gave up waiting before the job

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Conditions:
        """The reverse of `dataclasses.asdict`."""
        throttled = data.get("throttled")
        return cls(**{**data, "throttled": None if throttled is None else tuple(throttled)})


@dataclass(frozen=True)
class Measurement:
    """A job on its node.  `limit_bytes` is None when the trainer ran uncapped."""

    phases: tuple[PhaseMeasurement, ...] = ()
    seconds: float | None = None
    limit_bytes: int | None = None
    baseline_bytes: int | None = None  # anonymous memory of the loaded, empty trainer
    accelerator_peak_bytes: int | None = None  # held at most by the caching allocator; None without an accelerator
    bytes_down: int = 0
    bytes_up: int = 0  # without what the measurement itself took
    measurement_bytes: int = 0  # of this record with its raw samples, on its way up
    power: tuple[PowerTrace, ...] = ()  # of each meter of the device, in the order of the inventory
    conditions: Conditions = field(default_factory=Conditions)
    agent_cpu_seconds: float | None = None  # what measuring, receiving and sending took of the node's processor
    agent_pss_bytes: int | None = None  # … and of its memory, at the job's end
    begun_monotonic_seconds: float | None = None  # when the job's first byte came, by the node's clock
    begun_unix_seconds: float | None = None  # the same by the controller's, as far as the two could be compared
    clock_seconds: float | None = None  # … half-width of that comparison
    #: What was done to the job on purpose, by kind: what was declared, and what came of it (docs/disturbances.md).
    disturbances: dict[str, dict[str, Any]] = field(default_factory=dict)

    def without_traces(self) -> Measurement:
        """The same figures without the raw samples that they came from."""
        phases = tuple(replace(phase, trace=()) for phase in self.phases)
        return replace(self, phases=phases, power=tuple(replace(trace, rows=()) for trace in self.power))

    @property
    def largest(self) -> PhaseMeasurement | None:
        """The phase with the highest estimate, or None when nothing was measured."""
        known = [phase for phase in self.phases if phase.peak.estimate_bytes is not None]
        return max(known, key=lambda phase: phase.peak.estimate_bytes or 0, default=None)

    @property
    def peak(self) -> PeakMemory:
        """The bounds over all phases (each bound is the largest of that bound)."""
        peaks = [phase.peak for phase in self.phases]
        largest = self.largest.peak if self.largest else PeakMemory()
        refaults = [peak.refaults for peak in peaks if peak.refaults is not None]
        return PeakMemory(
            lower_bytes=_largest([peak.lower_bytes for peak in peaks]),
            estimate_bytes=largest.estimate_bytes,
            upper_bytes=_largest([peak.upper_bytes for peak in peaks]),
            sources={bound: source for peak in peaks for bound, source in peak.sources.items()},
            file_bytes=largest.file_bytes,
            refaults=sum(refaults) if refaults else None,
            samples=sum(peak.samples for peak in peaks),
            accelerator_bytes=_largest([peak.accelerator_bytes for peak in peaks]),
        )

    def phase_seconds(self, name: str) -> float | None:
        """Seconds spent in all phases of that name, or None when there was none."""
        found = [phase.seconds for phase in self.phases if phase.name == name]
        return sum(found) if found else None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measurement:
        """The reverse of `dataclasses.asdict`."""
        phases = tuple(
            PhaseMeasurement(
                phase["name"],
                phase["seconds"],
                PeakMemory(**phase["peak"]),
                tuple(map(tuple, phase.get("trace", ()))),
                phase.get("begun_seconds"),
            )
            for phase in data["phases"]
        )
        power = tuple(map(PowerTrace.from_json, data.get("power", ())))
        conditions = Conditions.from_json(data.get("conditions", {}))
        return cls(**{**data, "phases": phases, "power": power, "conditions": conditions})


def _largest(values: list[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
