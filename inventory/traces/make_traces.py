"""Write the packaged traces: synthetic, recorded on no board, the same bytes at every call.

    python inventory/traces/make_traces.py [FOLDER]

Each is a minute at 10 Hz of something like federated training: idle, then bursts of local steps with a pause between
them.  The levels are invented, of the order that is told of such boards; they are for rehearsals, and no measurement.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

INTERVAL_SECONDS = 0.1
ROWS = 601
IDLE_SECONDS, BURST_SECONDS, STEP_SECONDS = 5.0, 15.0, 0.8


class Rail(NamedTuple):
    name: str
    idle_watts: float
    busy_watts: float


class Trace(NamedTuple):
    board: str
    point: str
    total_rails: tuple[str, ...]
    gain: float
    step_watts: float
    rails: tuple[Rail, ...]


TRACES = {
    "jetson_orin_nano": Trace(
        "a Jetson Orin Nano",
        "module_rail",
        ("VDD_IN",),
        0.02,
        0.04,
        (Rail("VDD_IN", 4.6, 11.5), Rail("VDD_CPU_GPU_CV", 0.8, 5.6), Rail("VDD_SOC", 1.4, 2.6)),
    ),
    "raspberry_pi_5": Trace(
        "a Raspberry Pi 5",
        "soc_pmic",
        (
            "3V7_WL_SW",
            "3V3_SYS",
            "1V8_SYS",
            "DDR_VDD2",
            "DDR_VDDQ",
            "1V1_SYS",
            "0V8_SW",
            "VDD_CORE",
            "3V3_DAC",
            "3V3_ADC",
            "0V8_AON",
            "HDMI",
        ),
        0.05,
        0.0,
        (
            Rail("3V7_WL_SW", 0.21, 0.23),
            Rail("3V3_SYS", 0.24, 0.26),
            Rail("1V8_SYS", 0.28, 0.33),
            Rail("DDR_VDD2", 0.05, 0.35),
            Rail("DDR_VDDQ", 0.02, 0.06),
            Rail("1V1_SYS", 0.20, 0.24),
            Rail("0V8_SW", 0.27, 0.34),
            Rail("VDD_CORE", 0.70, 4.80),
            Rail("3V3_DAC", 0.001, 0.001),
            Rail("3V3_ADC", 0.001, 0.001),
            Rail("0V8_AON", 0.004, 0.004),
            Rail("HDMI", 0.11, 0.11),
        ),
    ),
}


def load(seconds: float, chance: random.Random) -> float:
    """How busy the board is, 0 to 1: bursts with the ripple of their steps, and some noise."""
    into = seconds % (IDLE_SECONDS + BURST_SECONDS) - IDLE_SECONDS
    busy = 0.85 + 0.15 * math.sin(2 * math.pi * into / STEP_SECONDS) if into >= 0 else 0.0
    return min(1.0, max(0.0, busy + chance.gauss(0, 0.02)))


def watts(rail: Rail, busy: float, step_watts: float) -> float:
    """A rail at that load, on the grid of the meter."""
    power = rail.idle_watts + busy * (rail.busy_watts - rail.idle_watts)
    return round(power / step_watts) * step_watts if step_watts else power


def lines(name: str, trace: Trace) -> list[str]:
    chance = random.Random(name)
    rows = []
    for row in range(ROWS):
        busy = load(row * INTERVAL_SECONDS, chance)
        powers = (watts(rail, busy, trace.step_watts) for rail in trace.rails)
        rows.append(",".join([f"{row * INTERVAL_SECONDS:.1f}", *(f"{power:.3f}" for power in powers)]))
    return [
        f"# synthetic, recorded on no board: made up after {trace.board} by make_traces.py",
        f"# point: {trace.point}",
        f"# total_rails: {' '.join(trace.total_rails)}",
        f"# interval_seconds: {INTERVAL_SECONDS}",
        f"# gain: {trace.gain}",
        f"# step_watts: {trace.step_watts}",
        "# source: synthetic",
        ",".join(["seconds", *(rail.name for rail in trace.rails)]),
        *rows,
    ]


def main(folder: Path) -> None:
    for name, trace in TRACES.items():
        (folder / f"{name}.csv").write_text("\n".join([*lines(name, trace), ""]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
