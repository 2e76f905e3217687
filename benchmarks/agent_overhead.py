"""What an agent takes of a node while it measures: processor and memory, at rest and beside a job.

    python benchmarks/agent_overhead.py [--seconds 60] [--hertz 10] [--root /]

A real agent on this machine reads an INA3221 (files of a tree like an Orin's; with `--root /` a Jetson's own sensor),
tells how it stands every two seconds as in a run that is watched, and rests; then a trainer that does nothing has a job
of the same length, whose memory is sampled twenty times a second.  Both figures are the agent's own, as every run's
report prints them.

The targets at 10 Hz: 1 % of a core, 15 MiB of memory.  One that is missed is told, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import meter_cost

from testbed.devices import NodeSettings
from testbed.engine import Engine
from testbed.environment import describe_machine
from testbed.inventory import Budget, Device, HardwareProfile, MeterChoice
from testbed.job import REST, Job, Result
from testbed.method import Block, Submodel, Workload

HERE = Path(__file__).resolve().parent
CPU_SHARE = 0.01
PSS_BYTES = 15 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two windows")
    parser.add_argument("--hertz", type=float, default=10.0, help="power samples a second")
    parser.add_argument("--root", type=Path, help="where a board's tree begins")
    args = parser.parse_args()
    machine = describe_machine()
    print(
        f"{machine['cpu']}, {machine['cores']} cores; {args.hertz:g} power samples a second for {args.seconds:g} s each"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = args.root or meter_cost.orin(folder / "tree")
        results = measure(folder, device(root), args.seconds, args.hertz)
    within = [tell(way, result) for way, result in zip(("at rest", "beside a job"), results, strict=True)]
    sys.exit(0 if all(within) else 1)


def device(root: Path) -> Device:
    profile = HardwareProfile("bench", "Benchmark", 1 << 30, 1 << 30, 1)
    meter = MeterChoice("ina3221", {"root": str(root)})
    return Device("board", "emulated", profile, Budget(128 << 20), meters=(meter,))


def measure(folder: Path, board: Device, seconds: float, hertz: float) -> list[Result]:
    """A rest, and a job as long."""
    settings = NodeSettings(
        "overhead", folder / "nodes", trainer="idle_trainer", code=(str(HERE), str(HERE.parent)), capped=False,
        power_seconds=1 / hertz, telemetry_seconds=2.0,
    )  # fmt: skip
    resting = job("rest", kind=REST, seconds=seconds)
    working = job("work", kind="train", seconds=seconds)
    with Engine([board], folder, "overhead", settings=settings) as engine:
        warm = [job("warm-up", kind="train", seconds=0.0)]  # the trainer's start is nobody's
        for each in warm:
            list(engine.run([("board", each, None)]))
        return [result for each in (resting, working) for result, _ in engine.run([("board", each, None)])]


def job(name: str, *, kind: str, seconds: float) -> Job:
    plain = Job(
        id=name, run="overhead", round=0, client=0, kind=kind, method="none", settings={}, config="c", outside="o",
        submodel=Submodel((Block(0),)), shard="s", work=Workload(), steps=1, learning_rate=0.1, seed=0,
    )  # fmt: skip
    return replace(plain, scalars={"seconds": seconds})


def tell(way: str, result: Result) -> bool:
    """Print what a window took; whether it is within the targets."""
    measured = result.measurement
    if not result.finished or measured.agent_cpu_seconds is None or not measured.seconds:
        print(f"{way}: {result.outcome}: {result.error}")
        return False
    share, memory = measured.agent_cpu_seconds / measured.seconds, measured.agent_pss_bytes or 0
    samples = sum(len(trace.rows) for trace in measured.power)
    within = share <= CPU_SHARE and memory <= PSS_BYTES
    missed = "" if within else f"   MISSED: the targets are {CPU_SHARE:.0%} and {PSS_BYTES >> 20} MiB"
    print(f"{way:13} {share:7.2%} of a core, {memory / (1 << 20):5.1f} MiB (PSS), {samples} power samples{missed}")
    return within


if __name__ == "__main__":
    main()
