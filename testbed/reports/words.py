"""How exhibits are named, and what several of them say alike."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from testbed.reports.exhibits import Column, bytes_column, name_column, seconds_column
from testbed.statistics import Estimate

if TYPE_CHECKING:
    from testbed.energy import Energy
    from testbed.reports.material import Group, Material

_LONG = 60
#: Phases of every job, whatever its method.
_FIRST, _LAST = ("receive", "start", "load"), ("send", "idle")
_DIGITS = 3

METHOD = name_column("method", "Method")
DEVICE = name_column("device", "Device")
RUN = name_column("run", "Run")
RUNS = Column("runs", "Runs")
ALL_BYTES = bytes_column("all_bytes", "All bytes")
#: A run's record calls `seconds` what it took in all.
WORKING_SECONDS = seconds_column("seconds_without_evaluation", "Time")

#: What a table over seeds says of its means.
OVER_SEEDS = "Means over runs that differ in the seed alone, with Student's t interval at 95 % from three runs on."
#: And of the differences to the reference.
OVER_SEEDS_PAIRED = "Differences are paired on the seed, and those beside each other share their error (Bonferroni)."
#: What the costs of a protocol count.
PROTOCOL_COSTS = "Costs are without evaluation; all bytes are those down, up and deployed."
#: What bounds an energy, in the place of an interval over runs.
OF_MEASUREMENT = "± is half of the measurement's own interval at 95 % (docs/energy.md), not a spread over runs."
EMULATED_SECONDS = (
    "Devices are emulated: these are seconds of the machine that emulates them, not of the boards they stand for."
)
REPLAYED = "The power was replayed from a recording, not measured: these joules say nothing about any device."


def slug(text: str) -> str:
    """A part of a key: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_LONG].strip("-") or "x"


def key_of(*parts: str) -> str:
    return "-".join(slug(part) for part in parts if part)


def unique(keys: Iterable[str]) -> list[str]:
    """The same keys, those that come again with a number behind them."""
    taken: set[str] = set()
    found = []
    for key in keys:
        number, free = 1, key
        while free in taken:
            number += 1
            free = f"{key}-{number}"
        taken.add(free)
        found.append(free)
    return found


def in_order(phases: Iterable[str]) -> list[str]:
    """Phases, each once: those that begin every job, a method's own as they come, those that end it."""
    known = dict.fromkeys(phases)
    own = [name for name in known if name not in (*_FIRST, *_LAST)]
    return [*(name for name in _FIRST if name in known), *own, *(name for name in _LAST if name in known)]


def where(circumstances: tuple[str, ...]) -> str:
    """For a title: nothing where there is but one of them."""
    return f" ({', '.join(circumstances)})" if circumstances else ""


def joules_text(value: float) -> str:
    """Three digits, without an exponent: 0.0123 J, 1.23 J, 1230 J."""
    return f"{_three_digits(value)} J"


def watts_text(value: float) -> str:
    return f"{_three_digits(value)} W"


def _three_digits(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, _DIGITS - 1 - math.floor(math.log10(abs(value))))}f}"


def joules_column(key: str, heading: str) -> Column:
    return Column(key, heading, joules_text)


def watts_column(key: str, heading: str) -> Column:
    return Column(key, heading, watts_text)


def yes_column(key: str, heading: str) -> Column:
    return Column(key, heading, lambda value: "yes" if value else "no", number=False)


def measured(energy: Energy | None) -> Estimate | None:
    """One measured energy with its own interval; None where there is none."""
    if energy is None or energy.joules is None:
        return None
    return Estimate(1, energy.joules, None, energy.low_joules, energy.high_joules)


def under_columns(material: Material) -> tuple[Column, ...]:
    """The column of the circumstances, where there are several."""
    return (name_column("circumstances", "Under"),) if len(material.circumstances) > 1 else ()


def named(material: Material, group: Group) -> tuple[str, ...]:
    """A group's label, with its circumstances where there are several."""
    return (group.label, ", ".join(group.circumstances))[: 1 + len(under_columns(material))]


def seeds_text(group: Group) -> str:
    """0, 1, 2"""
    return ", ".join(str(run.seed) for run in group.runs)
