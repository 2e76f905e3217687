"""A comparison of two runs for people, for programs and for a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from testbed.energy_table import energy_text
from testbed.parity.verdicts import verdicts
from testbed.quantities import DASH, bytes_text, number_text, percent_text, seconds_text

if TYPE_CHECKING:
    from rich.console import Console

    from testbed.energy import Energy
    from testbed.parity.comparison import Parity
    from testbed.parity.devices import DeviceParity, Interval

_CSV_COLUMNS = ("subject", "figure", "first", "second", "ratio")
_MOST_CHARACTERS = 40
_MOST_JOBS = 10


def print_parity(parity: Parity, console: Console) -> None:
    """What differs, what was measured side by side, and a sentence on each part."""
    first, second = parity.first, parity.second
    if first.method != second.method:
        methods = f"{first.method}, {second.method}"
        text = f"the methods differ ({methods}): this is no parity; `testbed report` compares methods"
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"first:  {first.run} ({first.method}, {_where(first.emulated)})", highlight=False, markup=False)
    console.print(f"second: {second.run} ({second.method}, {_where(second.emulated)})", highlight=False, markup=False)
    for note in parity.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print()
    _print(console, ("Differs", "first", "second", "decides the result"), _difference_rows(parity))
    _print(
        console, ("Device", "matched by", "first peak", "second peak", "ratio", "bounds overlap"), _peak_rows(parity)
    )
    _print(
        console,
        ("Phase", "device", "first", "second", "ratio", "first peak", "second peak", "ratio"),
        _phase_rows(parity),
    )
    _print(console, ("Energy", "first", "second", "ratio"), _energy_rows(parity))
    _print(console, ("Round", "first accuracy", "second", "first loss", "second", "same bits"), _round_rows(parity))
    for text in (*parity.unmatched, *_jobs(parity)):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for part, sentence in verdicts(parity).items():
        console.print(Text.assemble((f"{part:<10}", "bold"), sentence), soft_wrap=True)


def to_json(parity: Parity) -> str:
    """Everything, with the sentences; ratios are the second run's figure over the first one's."""
    devices = [_device_data(device) for device in parity.devices]
    rounds = [{**asdict(each), "same": each.same} for each in parity.rounds]
    data = {
        "first": parity.first.run,
        "second": parity.second.run,
        "like_for_like": parity.like_for_like,
        "verdicts": verdicts(parity),
        "differences": [asdict(each) for each in parity.differences],
        "devices": devices,
        "unmatched": parity.unmatched,
        "rounds": rounds,
        "same_final_state": parity.same_final_state,
        "jobs": parity.jobs,
        "jobs_only_first": parity.only_first,
        "jobs_only_second": parity.only_second,
        "unlike_jobs": [asdict(each) for each in parity.unlike_jobs],
        "notes": parity.notes,
    }
    return json.dumps(data, indent=2, ensure_ascii=False)


def to_csv(parity: Parity) -> str:
    """One line for each pair of figures, in base units; an empty field is not measured."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    writer.writerows(_csv_rows(parity))
    return stream.getvalue()


# ── for people ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _print(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    made = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    console.print(made)
    console.print()


def _where(emulated: bool | None) -> str:
    return {True: "emulated", False: "boards", None: "boards and emulated"}[emulated]


def _difference_rows(parity: Parity) -> list[list[str]]:
    return [
        [each.name, _short(each.first), _short(each.second), "yes" if each.decides else "no"]
        for each in parity.differences
    ]


def _short(value: Any) -> str:
    text = DASH if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def _peak_rows(parity: Parity) -> list[list[str]]:
    words = {True: "yes", False: "no", None: DASH}
    return [
        [
            device.name,
            device.matched_by,
            _interval(peak.first),
            _interval(peak.second),
            percent_text(_off(peak.ratio)),
            words[peak.overlap],
        ]
        for device in parity.devices
        if (peak := device.peak) is not None
    ]


def _interval(interval: Interval) -> str:
    return (
        f"{bytes_text(interval.estimate_bytes)} ({bytes_text(interval.low_bytes)} to {bytes_text(interval.high_bytes)})"
    )


def _phase_rows(parity: Parity) -> list[list[str]]:
    return [
        [
            phase.name,
            device.name,
            seconds_text(phase.first_seconds),
            seconds_text(phase.second_seconds),
            percent_text(_off(phase.seconds_ratio)),
            bytes_text(phase.first_bytes),
            bytes_text(phase.second_bytes),
            percent_text(_off(phase.bytes_ratio)),
        ]
        for device in parity.devices
        for phase in device.phases
    ]


def _energy_rows(parity: Parity) -> list[list[str]]:
    return [
        [device.name, energy_text(energy.first), energy_text(energy.second), percent_text(_off(energy.ratio))]
        for device in parity.devices
        if (energy := device.energy) is not None
    ]


def _round_rows(parity: Parity) -> list[list[str]]:
    return [
        [
            str(each.round + 1),
            *(number_text(value, 4) for value in (each.first_accuracy, each.second_accuracy)),
            *(number_text(value, 4) for value in (each.first_loss, each.second_loss)),
            "yes" if each.same else "no",
        ]
        for each in parity.rounds
    ]


def _jobs(parity: Parity) -> Iterator[str]:
    for job in parity.unlike_outcomes[:_MOST_JOBS]:
        yield f"round {job.round + 1}, client {job.client}, {job.kind}: {job.outcomes[0]} and {job.outcomes[1]}"
    if (more := len(parity.unlike_outcomes) - _MOST_JOBS) > 0:
        yield f"and {more} more jobs ended otherwise (--json lists them)"


def _off(ratio: float | None) -> float | None:
    return None if ratio is None else ratio - 1


# ── for programs ────────────────────────────────────────────────────────────────────────────────────────────────────
def _device_data(device: DeviceParity) -> dict[str, Any]:
    data: dict[str, Any] = {
        "first": device.first,
        "second": device.second,
        "matched_by": device.matched_by,
        "profile": device.profile,
        "kinds": device.kinds,
        "peak": None,
        "energy": None,
        "phases": [
            {**asdict(phase), "seconds_ratio": phase.seconds_ratio, "bytes_ratio": phase.bytes_ratio}
            for phase in device.phases
        ],
    }
    if device.peak is not None:
        data["peak"] = {**asdict(device.peak), "ratio": device.peak.ratio, "overlap": device.peak.overlap}
    if (energy := device.energy) is not None:
        sides = {"first": _energy_data(energy.first), "second": _energy_data(energy.second)}
        data["energy"] = {**sides, "ratio": energy.ratio, "overlap": energy.overlap, "why_not": energy.why_not}
    return data


def _energy_data(energy: Energy) -> dict[str, Any]:
    return {
        "joules": energy.joules,
        "low_joules": energy.low_joules,
        "high_joules": energy.high_joules,
        "point": energy.point,
        "replayed": energy.replayed,
        "valid": energy.valid,
    }


def _csv_rows(parity: Parity) -> Iterator[tuple[Any, ...]]:
    for device in parity.devices:
        if (peak := device.peak) is not None:
            a, b = peak.first, peak.second
            yield device.name, "peak_estimate_bytes", a.estimate_bytes, b.estimate_bytes, peak.ratio
            yield device.name, "peak_low_bytes", a.low_bytes, b.low_bytes, None
            yield device.name, "peak_high_bytes", a.high_bytes, b.high_bytes, None
        for phase in device.phases:
            yield device.name, f"{phase.name}_seconds", phase.first_seconds, phase.second_seconds, phase.seconds_ratio
            yield device.name, f"{phase.name}_peak_bytes", phase.first_bytes, phase.second_bytes, phase.bytes_ratio
        if (energy := device.energy) is not None:
            yield device.name, "energy_joules", energy.first.joules, energy.second.joules, energy.ratio
    for each in parity.rounds:
        yield f"round {each.round}", "accuracy", each.first_accuracy, each.second_accuracy, None
        yield f"round {each.round}", "loss", each.first_loss, each.second_loss, None
