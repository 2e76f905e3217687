"""Energies as text: with their half-width, whether they were replayed, and why they are not valid."""

from __future__ import annotations

from math import floor, log10
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from testbed.quantities import DASH, seconds_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from testbed.energy import Energy
    from testbed.energy_summary import EnergySummary
    from testbed.report import RunSummary

_DIGITS = 3
_ALL = "all"


def energy_text(energy: Energy | None) -> str:
    """`123 J ± 4`, with "replayed" or "invalid" behind it; a dash where there is none."""
    if energy is None or energy.joules is None:
        return DASH
    marks = [word for word, holds in (("replayed", energy.replayed), ("invalid", not energy.valid)) if holds]
    text = f"{_rounded(energy.joules)} J ± {_rounded(energy.half_width_joules)}"
    return text + (f" ({', '.join(marks)})" if marks else "")


def energy_columns(summary: EnergySummary | None) -> dict[str, Any]:
    """The same for a program: flat, in joules; {} where there is none."""
    if summary is None:
        return {}
    gross, net = summary.gross, summary.net
    return {
        "energy_low_joules": gross.low_joules,
        "energy_high_joules": gross.high_joules,
        "energy_net_joules": net.joules if net else None,
        "energy_net_low_joules": net.low_joules if net else None,
        "energy_net_high_joules": net.high_joules if net else None,
        "energy_valid": gross.valid,
        "energy_replayed": gross.replayed,
        "energy_point": gross.point,
        "energy_samples": gross.samples,
        **{f"energy_{name}_joules": energy.joules for name, energy in summary.phases.items()},
    }


def print_energy(run: RunSummary, console: Console) -> None:
    """The devices' energies with what they rest on, then by phase; nothing where no device has a meter."""
    metered = [device for device in run.devices if device.energy is not None]
    if not metered:
        return
    rows: list[tuple[str, EnergySummary]] = [(each.device, each.energy) for each in metered if each.energy is not None]
    _print(console, _SUMMARY_HEADS, [_summary_cells(name, summary) for name, summary in rows])
    if run.energy is not None:
        rows.append((_ALL, run.energy))
    phases = list(dict.fromkeys(name for _, summary in rows for name in summary.phases))
    cells = [[name, *(energy_text(summary.phases.get(phase)) for phase in phases)] for name, summary in rows]
    _print(console, ["Energy by phase", *phases], cells)
    for name, summary in rows:
        for words in (*summary.gross.problems, *(summary.gross.notes if name != _ALL else ())):
            console.print(f"energy of {name}: {words}", markup=False, highlight=False, soft_wrap=True)
    for phase, names in _not_valid(rows).items():
        console.print(f"energy of {phase}: {names}", markup=False, highlight=False, soft_wrap=True)
    unmetered = [each.device for each in run.devices if each.energy is None and each.jobs]
    if unmetered:
        console.print(f"no energy of the whole: {', '.join(unmetered)} has no meter", soft_wrap=True)
    console.print()


def _not_valid(rows: Sequence[tuple[str, EnergySummary]]) -> dict[str, str]:
    """By phase: why it is not valid, of the devices where it is not though the whole is."""
    found: dict[str, list[str]] = {}
    for name, summary in rows:
        for phase, energy in summary.phases.items():
            problems = [problem for problem in energy.problems if problem not in summary.gross.problems]
            if problems and name != _ALL and energy.joules is not None:
                found.setdefault(phase, []).append(f"{name}: {problems[0]}")
    return {phase: "; ".join(told) for phase, told in found.items()}


_SUMMARY_HEADS = ["Device", "Meter", "Gross", "Net", "At rest", "Mean", "Samples", "Longest gap", "Verdict"]


def _summary_cells(name: str, summary: EnergySummary) -> list[str]:
    gross, idle = summary.gross, summary.idle
    return [
        name,
        f"{gross.meter} at {gross.point}",
        energy_text(gross),
        energy_text(summary.net),
        DASH if idle is None else f"{idle.watts:.2f} W ± {idle.half_width_watts:.2f}",
        DASH if gross.mean_watts is None else f"{gross.mean_watts:.2f} W",
        str(gross.samples),
        seconds_text(gross.longest_gap_seconds),
        verdict_text(gross),
    ]


def verdict_text(energy: Energy) -> str:
    """In a word, with what makes it weaker: few samples or seconds, or that nothing was measured."""
    weaker = [word for word, holds in (("brief", energy.brief), ("replayed", energy.replayed)) if holds]
    return ", ".join(["valid" if energy.valid else "invalid", *weaker])


def _print(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from testbed.report_tables import print_fitting

    print_fitting({head: itemgetter(index) for index, head in enumerate(heads)}, rows, console)


def _rounded(value: float) -> str:
    """Three digits, without an exponent."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, _DIGITS - 1 - floor(log10(abs(value))))}f}"
