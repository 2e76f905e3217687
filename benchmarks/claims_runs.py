"""The papers' claims about bytes, speed and quality, read off the runs of experiments/paper_claims*.yaml.

Everything comes from the runs' own folders: accuracy by round, what jobs took and carried.  *Device-seconds* are the
seconds of all jobs of a run, whichever devices they ran on; the target of a seed is a share of what the baseline of
the same seed and devices ends with.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from testbed.job import Result
    from testbed.store import RunFolder

#: Of the baseline's last accuracy: what a run must reach.
TARGET_SHARE = 0.95


@dataclass(frozen=True)
class Curve:
    """What a run came to after each of its rounds; accuracies are None where nothing was evaluated."""

    accuracy: tuple[float | None, ...]
    device_seconds: tuple[float, ...]  # up to and with the round
    update_bytes: int  # what clients sent, all rounds
    job_bytes: int  # what jobs carried to them, all rounds
    deployed_bytes: int  # blocks and other contents that devices lacked

    @property
    def last(self) -> float:
        return next(value for value in reversed(self.accuracy) if value is not None)

    def rounds_to(self, target: float) -> int | None:
        """Rounds until an evaluation reached the target; None when none did."""
        return next((i + 1 for i, value in enumerate(self.accuracy) if value is not None and value >= target), None)

    def seconds_to(self, target: float) -> float | None:
        rounds = self.rounds_to(target)
        return None if rounds is None else self.device_seconds[rounds - 1]


def curve_of(folder: RunFolder) -> Curve:
    rounds = folder.rounds()
    results = folder.results()
    seconds: dict[int, float] = defaultdict(float)
    for result in results:
        seconds[result.round] += seconds_of(result)
    total = 0.0
    so_far = [total := total + seconds[record.round] for record in rounds]
    accuracy = [None if record.quality is None else record.quality["accuracy"] for record in rounds]
    return Curve(
        tuple(accuracy),
        tuple(so_far),
        sum(result.measurement.bytes_up or 0 for result in results),
        sum(result.measurement.bytes_down or 0 for result in results),
        sum(record.deployed_bytes for record in rounds),
    )


def seconds_of(result: Result) -> float:
    """What a job took on its device, loading and sending included."""
    return result.measurement.seconds or 0.0


# ── one method against another, seed by seed ─────────────────────────────────────────────────────────────────────────
def speed_up(own: Mapping[int, Curve], baseline: Mapping[int, Curve]) -> str:
    """Rounds and device-seconds to the target: the baseline's over ours, and how many seeds reached it."""
    pairs = [(own[seed], baseline[seed], TARGET_SHARE * baseline[seed].last) for seed in sorted(own)]
    reached = [(mine, other, target) for mine, other, target in pairs if mine.rounds_to(target) is not None]
    if not reached:
        return f"target reached in 0 of {len(pairs)} seeds"
    rounds = statistics.fmean((o.rounds_to(t) or 0) / (m.rounds_to(t) or 1) for m, o, t in reached)
    seconds = statistics.fmean((o.seconds_to(t) or 0) / (m.seconds_to(t) or 1) for m, o, t in reached)
    return f"{rounds:.2f}× in rounds, {seconds:.2f}× in device-seconds ({len(reached)} of {len(pairs)} seeds reach it)"


def fewer_bytes(own: Mapping[int, Curve], baseline: Mapping[int, Curve]) -> str:
    """Updates alone, then all that travels both ways, contents of blocks included."""
    seeds = sorted(own)
    updates = _ratio(seeds, own, baseline, lambda curve: curve.update_bytes)
    everything = _ratio(seeds, own, baseline, lambda curve: curve.update_bytes + curve.job_bytes + curve.deployed_bytes)
    return f"updates {updates:.2f}×; both ways with everything deployed {everything:.2f}×"


def _ratio(
    seeds: Sequence[int], own: Mapping[int, Curve], baseline: Mapping[int, Curve], figure: Callable[[Curve], int]
) -> float:
    return statistics.fmean(figure(baseline[seed]) / max(1, figure(own[seed])) for seed in seeds)


def better(own: Mapping[int, Curve], baseline: Mapping[int, Curve]) -> str:
    """Accuracy after the same rounds, in points, seed by seed."""
    differences = [100 * (own[seed].last - baseline[seed].last) for seed in sorted(own)]
    spread = f" ± {statistics.stdev(differences):.1f}" if len(differences) > 1 else ""
    accuracies = [statistics.fmean(curve.last for curve in curves.values()) for curves in (own, baseline)]
    return (
        f"{statistics.fmean(differences):+.1f}{spread} points ({accuracies[0]:.3f} against {accuracies[1]:.3f})"
    ).replace("-", "−")
