"""What was measured: times and peak memory of a job, phase by phase.  Standard library only.

`None` means not measured; it is never 0 and never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class PeakMemory:
    """The three bounds of a peak, each with its source (no kernel keeps a watermark of unreclaimable memory alone).

    lower_bytes     largest sample of anonymous + shared (+ kernel, where the cgroup tells) memory
    estimate_bytes  VmHWM less the file pages of the sample nearest to it
    upper_bytes     the cgroup's own peak, page cache included
    """

    lower_bytes: int | None = None
    estimate_bytes: int | None = None
    upper_bytes: int | None = None
    sources: dict[str, str] = field(default_factory=dict)  # bound → cgroup2_peak | cgroup1_max_usage | vmhwm | sampled
    file_bytes: int | None = None  # file pages mapped at that sample
    refaults: int | None = None  # pages read again after they were reclaimed
    samples: int = 0


@dataclass(frozen=True)
class PhaseMeasurement:
    """One phase of a job: receive, load, a method's own ("probe", "train"), send."""

    name: str
    seconds: float
    peak: PeakMemory = field(default_factory=PeakMemory)
    #: Raw samples: seconds since the phase began; VmHWM, anonymous, file and unreclaimable bytes.
    trace: tuple[tuple[float, int, int, int, int], ...] = ()


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

    def without_traces(self) -> Measurement:
        """The same figures without the raw samples that they came from."""
        return replace(self, phases=tuple(replace(phase, trace=()) for phase in self.phases))

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
                phase["name"], phase["seconds"], PeakMemory(**phase["peak"]), tuple(map(tuple, phase.get("trace", ())))
            )
            for phase in data["phases"]
        )
        return cls(**{**data, "phases": phases})


def _largest(values: list[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
