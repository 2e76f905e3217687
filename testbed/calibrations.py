"""What one meter says set against another: found by `fitted`, kept as FOLDER/calibrations/DEVICE.METER.json.

Two series of samples are averaged over the whole seconds of the clock that they share, and

    reference = gain × watts + offset

is fitted by least squares.  Gain and offset can be told apart only where the power moved: where the meter's seconds
span less than a fifth of their mean, the gain stays 1 and only the offset is fitted.

A calibration is of one board: it does not hold for another one that has come to stand under the device's name.
"""

from __future__ import annotations

import contextlib
import json
import math
from bisect import bisect_right
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import accumulate, pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from testbed.durable import disk_errors_in_words, write_json
from testbed.errors import MeterError
from testbed.fact_sheets import data_home, facts_of
from testbed.measurement import Calibration

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from testbed.inventory import Device
    from testbed.meters import Accuracy

#: Fewer seconds than this are no calibration.
LEAST_PAIRS = 30
#: Of the meter's mean, what its seconds must span for a gain to be told from an offset.
_LEAST_SPAN = 0.2
#: Of the reference's variance, what the meter must explain: else they do not measure the same thing.
_LEAST_EXPLAINED = 0.5
#: Half-width at 95 % in standard deviations.
_AT_95 = 1.96
#: Between samples farther apart than so many of their usual spacings, nothing is known.
_LONGEST_GAP = 3.0


@dataclass(frozen=True)
class Reference:
    """The meter that another one is compared with."""

    name: str
    point: str
    accuracy: Accuracy


def pairs_of(
    meter: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """The power of both in every whole second that both have seen; samples are (seconds of one clock, watts)."""
    ours, theirs = means_by_second(meter), means_by_second(reference)
    return [(ours[second], theirs[second]) for second in sorted(ours.keys() & theirs.keys())]


def means_by_second(samples: Sequence[tuple[float, float]]) -> dict[int, float]:
    """The mean power of each whole second that samples enclose without a gap, by straight lines between them."""
    if len(samples) < 2:
        return {}
    times = [at for at, _ in samples]
    spacings = [later - earlier for earlier, later in pairwise(times)]
    longest = _LONGEST_GAP * max(1.0, median(spacings))
    areas = ((before[1] + after[1]) / 2 * (after[0] - before[0]) for before, after in pairwise(samples))
    whole = list(accumulate(areas, initial=0.0))
    unknown = {
        second
        for earlier, later in pairwise(times)
        if later - earlier > longest
        for second in range(math.floor(earlier), math.ceil(later))
    }

    def joules_until(at: float) -> float:
        index = min(bisect_right(times, at) - 1, len(times) - 2)
        (begin, first), (end, last) = samples[index], samples[index + 1]
        share = (at - begin) / (end - begin)
        return whole[index] + (at - begin) * (first + share * (last - first) / 2)

    seconds = range(math.ceil(times[0]), math.floor(times[-1]))
    return {second: joules_until(second + 1) - joules_until(second) for second in seconds if second not in unknown}


def fitted(pairs: Sequence[tuple[float, float]], reference: Reference) -> Calibration:
    """The calibration that these pairs (watts of the meter, of the reference) give; raises MeterError.

    Its `reference_gain` is the reference's own accuracy at the lowest power seen: its gain, and its offset and half a
    step beside that power.
    """
    if len(pairs) < LEAST_PAIRS:
        raise MeterError(
            f"both meters were seen together in {len(pairs)} seconds, and a calibration needs {LEAST_PAIRS}: measure "
            f"for longer (--seconds), and look with `testbed meter` whether both tell anything"
        )
    watts, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    gain, offset = (1.0, fmean(theirs) - fmean(watts)) if is_narrow(pairs) else _line(watts, theirs)
    left = [their - gain * ours - offset for ours, their in pairs]
    free = len(pairs) - (1 if is_narrow(pairs) else 2)
    lowest = min(theirs)
    if lowest <= 0:
        raise MeterError(f"{reference.name} told {lowest:g} W: is the device plugged into it, and on?")
    own = reference.accuracy
    return Calibration(
        gain=gain,
        offset_watts=offset,
        residual_watts=_AT_95 * math.sqrt(sum(each * each for each in left) / free),
        reference=reference.name,
        point=reference.point,
        reference_gain=own.gain + (own.offset_watts + own.step_watts / 2) / lowest,
        lowest_watts=min(watts),
        highest_watts=max(watts),
        samples=len(pairs),
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def is_narrow(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether the power moved too little for a gain to be told from an offset."""
    watts = [pair[0] for pair in pairs]
    return max(watts) - min(watts) < _LEAST_SPAN * abs(fmean(watts))


def _line(watts: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Gain and offset by least squares; raises MeterError where the two do not move together."""
    mean, their_mean = fmean(watts), fmean(theirs)
    ours = [each - mean for each in watts]
    others = [each - their_mean for each in theirs]
    common = math.fsum(a * b for a, b in zip(ours, others, strict=True))
    spread, their_spread = math.fsum(a * a for a in ours), math.fsum(b * b for b in others)
    gain = common / spread
    explained = 0.0 if not their_spread else common * common / (spread * their_spread)
    if gain <= 0 or explained < _LEAST_EXPLAINED:
        raise MeterError(
            f"the meters do not move together (one explains {100 * explained:.0f} % of the other's variance): do both "
            f"measure this device?  A plug lags by a second or two: hold each load for half a minute"
        )
    return gain, their_mean - gain * mean


# ── the store ────────────────────────────────────────────────────────────────────────────────────────────────────────
def calibration_of(device: Device, meter: str) -> Calibration | None:
    """The stored calibration of a device's meter; None without one, or where it was made on another board."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(_path(device, meter).read_text(encoding="utf-8"))
        if _same_board(stored["board"], _board(device)):
            return Calibration(**stored["calibration"])
    return None


def store(device: Device, meter: str, calibration: Calibration) -> None:
    """Replace the calibration of a device's meter; raises StoreError when it cannot be written."""
    path = _path(device, meter)
    with disk_errors_in_words(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {"device": device.name, "meter": meter, "board": _board(device), "calibration": asdict(calibration)},
    )


def forget(device: Device, meter: str) -> bool:
    """Remove the calibration of a device's meter; whether there was one, of whichever board."""
    path = _path(device, meter)
    there = path.exists()
    with disk_errors_in_words(path):
        path.unlink(missing_ok=True)
    return there


def _path(device: Device, meter: str) -> Path:
    return data_home() / "calibrations" / f"{device.name}.{meter}.json"


def _board(device: Device) -> dict[str, Any]:
    """What tells a board from others, as far as it is known."""
    facts = facts_of(device) or {}
    return {
        "host": device.access.host if device.access is not None else None,
        "profile": device.profile.name,
        "model": (facts.get("board") or {}).get("model"),
    }


def _same_board(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """The model may not have been known then, or not be now: what is unknown differs from nothing."""
    known = then.get("model") is not None and now["model"] is not None
    return (then.get("host"), then.get("profile")) == (now["host"], now["profile"]) and (
        not known or then["model"] == now["model"]
    )
