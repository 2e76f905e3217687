"""One sentence for each part of a comparison of two runs."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.parity.comparison import Parity, farthest
from testbed.parity.devices import DeviceParity
from testbed.report import PLUMBING

#: Phases of every job, whatever its method.
_NOT_WORK = PLUMBING | {"start"}
#: Parts in the order in which they are told.
PARTS = ("settings", "peaks", "seconds", "energy", "quality", "outcomes", "bytes")


def verdicts(parity: Parity) -> dict[str, str]:
    """Part → what the comparison shows, or why it shows nothing."""
    sentences = (_settings, _peaks, _seconds, _energy, _quality, _outcomes, _bytes)
    return {part: sentence(parity) for part, sentence in zip(PARTS, sentences, strict=True)}


def _settings(parity: Parity) -> str:
    decisive = [difference.name for difference in parity.differences if difference.decides]
    if not decisive:
        return "like for like: method, settings, data, shards, submodels and initial state are the same"
    return f"not like for like: the runs differ in {', '.join(decisive)}"


def _peaks(parity: Parity) -> str:
    pairs = [(device, device.peak) for device in parity.devices if device.peak is not None]
    if not pairs:
        return "peaks cannot be compared: no pair of devices has finished jobs with one in both runs"
    by = _percent(farthest([(peak.ratio, 1.0) for _, peak in pairs]))
    apart = [device.name for device, peak in pairs if peak.overlap is False]
    if apart:
        return f"peaks do not agree: they differ by up to {by}, and the bounds lie apart on {', '.join(apart)}"
    unknown = [device.name for device, peak in pairs if peak.overlap is None]
    if unknown:
        return (
            f"peaks differ by up to {by}; whether they agree cannot be told on {', '.join(unknown)}: a bound is lacking"
        )
    return f"peaks agree within {by}: on every device the bounds of both runs overlap"


def _seconds(parity: Parity) -> str:
    emulated = [device for device in parity.devices if any(device.emulated)]
    if not parity.devices:
        return "seconds cannot be compared: no device of one run stands for one of the other"
    if mixed := [device for device in emulated if not all(device.emulated)]:
        which = "first" if mixed[0].emulated[0] else "second"
        machine = parity.machines[0 if mixed[0].emulated[0] else 1] or "the machine that it ran on"
        names = ", ".join(device.name for device in mixed)
        return f"seconds do not compare: {names} of the {which} run is emulated, and its seconds are those of {machine}"
    if emulated and parity.machines[0] != parity.machines[1]:
        machines = " and on ".join(str(each or "an unknown machine") for each in parity.machines)
        return f"seconds do not compare: both are emulated, on {machines}"
    return _work_seconds(parity.devices)


def _work_seconds(devices: Sequence[DeviceParity]) -> str:
    """Of the phases that are the method's own work."""
    found = [
        (abs(phase.seconds_ratio - 1), phase.name, device.name)
        for device in devices
        for phase in device.phases
        if phase.name not in _NOT_WORK and phase.seconds_ratio is not None
    ]
    if not found:
        return "seconds cannot be compared: no phase of work is in finished jobs of both runs"
    by, phase, device = max(found)
    return f"seconds of work differ by up to {_percent(by)} (medians over jobs; the most in {phase} on {device})"


def _energy(parity: Parity) -> str:
    pairs = [(device, device.energy) for device in parity.devices if device.energy is not None]
    if not pairs:
        return "energies cannot be compared: no device has a meter in both runs"
    why_not = {device.name: energy.why_not for device, energy in pairs if energy.why_not}
    if why_not:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in why_not.items())
        return f"energies do not compare: {reasons}"
    by = _percent(farthest([(energy.ratio, 1.0) for _, energy in pairs]))
    apart = [device.name for device, energy in pairs if energy.overlap is False]
    if apart:
        return f"energies do not agree: they differ by up to {by}, and the intervals lie apart on {', '.join(apart)}"
    return f"energies agree within {by}: the intervals overlap on every device with a meter"


def _quality(parity: Parity) -> str:
    if not parity.rounds:
        return "quality cannot be compared: no round was evaluated in both runs"
    rounds = f"{len(parity.rounds)} evaluated round{'' if len(parity.rounds) == 1 else 's'}"
    state = {True: "; the final states are the same", False: "; the final states differ", None: ""}
    if all(each.same for each in parity.rounds):
        return f"quality is the same to the last bit in {rounds}{state[parity.same_final_state]}"
    accuracy = farthest([(each.first_accuracy, each.second_accuracy) for each in parity.rounds])
    loss = farthest([(each.first_loss, each.second_loss) for each in parity.rounds])
    parts = [
        f"{name} by up to {value:.4f}" for name, value in (("accuracy", accuracy), ("loss", loss)) if value is not None
    ]
    return f"quality differs in {rounds}: {', '.join(parts)}{state[parity.same_final_state]}"


def _outcomes(parity: Parity) -> str:
    if not parity.jobs:
        return "outcomes cannot be compared: the runs have no job in common"
    unlike, lacking = len(parity.unlike_outcomes), parity.only_first + parity.only_second
    alone = f"; {lacking} jobs are in one run only" if lacking else ""
    if unlike:
        return f"{unlike} of {parity.jobs} jobs ended otherwise{alone}"
    return f"all {parity.jobs} jobs ended alike{alone}"


def _bytes(parity: Parity) -> str:
    alike = parity.jobs - len(parity.unlike_outcomes)
    if not alike:
        return "bytes cannot be compared: no job ended alike in both runs"
    unlike = parity.unlike_bytes
    if not unlike:
        return f"bytes down and up are equal in {alike} jobs"
    most = farthest([pair for job in unlike for pair in (job.bytes_down, job.bytes_up)])
    return f"bytes differ in {len(unlike)} of {alike} jobs that ended alike, by up to {most or 0:.0f} B"


def _percent(ratio: float | None) -> str:
    return "an unknown share" if ratio is None else f"{100 * ratio:.1f} %"
