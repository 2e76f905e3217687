"""What a round costs that trains nothing: controller, agents and wire, and the checkpoint that survives a power cut.

    python benchmarks/round_overhead.py [--devices 4] [--rounds 200] [--no-cap] [--folder FOLDER]

Real agents, a real trainer process per device (without torch), 4 KB down and 4 KB up per device and round.  The
checkpoint is what a round must leave on the disk: a file written, fsynced, renamed, and its folder fsynced.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import idle_trainer

from testbed.devices import NodeSettings
from testbed.engine import Engine
from testbed.errors import TestbedError
from testbed.inventory import Budget, Device, HardwareProfile
from testbed.job import Job
from testbed.method import Block, Submodel, Workload

HERE = Path(__file__).resolve().parent
WARM_UP_ROUNDS = 5


def devices(count: int) -> list[Device]:
    profile = HardwareProfile("bench", "Benchmark", 1 << 30, 1 << 30, 1)
    return [Device(f"device-{index}", "emulated", profile, Budget(128 << 20)) for index in range(count)]


def job(round_index: int, client: int) -> Job:
    name = f"bench-r{round_index}-c{client}"
    blocks = Submodel(tuple(Block(position, f"{position:064x}") for position in range(12)))
    return Job(
        id=name, run="bench", round=round_index, client=client, kind="train", method="idle", settings={},
        config="0" * 64, outside="1" * 64, submodel=blocks, shard="2" * 64,
        work=Workload(), steps=0, learning_rate=0.0, seed=0,
    )  # fmt: skip


def checkpoint(folder: Path, updates: list[Path]) -> None:
    """What a round leaves on the disk, for certain."""
    partial = folder / "checkpoint.partial"
    with partial.open("wb") as file:
        for update in updates:
            file.write(update.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / "checkpoint")
    entries = os.open(folder, os.O_RDONLY)
    os.fsync(entries)
    os.close(entries)


def measure(engine: Engine, names: list[str], rounds: range, folder: Path, *, durable: bool) -> list[float]:
    """Seconds of every round; a durable one ends with its checkpoint on the disk."""
    payload = folder / "payload"
    payload.write_bytes(idle_trainer.update())
    seconds = []
    for index in rounds:
        begun = time.perf_counter()
        ended = list(engine.run((name, job(index, client), payload) for client, name in enumerate(names)))
        failed = [result for result, _ in ended if not result.finished]
        if failed:
            raise SystemExit(f"{failed[0].device}: {failed[0].outcome}: {failed[0].error}")
        if durable:
            checkpoint(folder, [update for _, update in ended if update is not None])
        seconds.append(time.perf_counter() - begun)
    return seconds


def memory_of(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def line(title: str, seconds: list[float], target: float) -> None:
    median, high = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
    verdict = "ok" if median <= target else "MISSED"
    print(
        f"{title:<28} median {1000 * median:6.2f} ms   p95 {1000 * high:6.2f} ms   "
        f"target {1000 * target:.0f} ms: {verdict}"
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--devices", type=int, default=4)
    arguments.add_argument("--rounds", type=int, default=200)
    arguments.add_argument("--no-cap", action="store_true")
    arguments.add_argument("--folder", type=Path, help="where to work (decides what fsync costs)")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        code = (str(HERE), str(HERE.parent))
        settings = NodeSettings("bench", folder / "nodes", trainer="idle_trainer", code=code, capped=not options.no_cap)
        known = devices(options.devices)
        names = [device.name for device in known]
        with Engine(known, folder, "bench", settings=settings, parallel=len(known), unload_between=False) as engine:
            measure(engine, names, range(WARM_UP_ROUNDS), folder, durable=False)
            first, second = WARM_UP_ROUNDS, WARM_UP_ROUNDS + options.rounds
            plain = measure(engine, names, range(first, second), folder, durable=False)
            durable = measure(engine, names, range(second, second + options.rounds), folder, durable=True)
            states = [json.loads((folder / "nodes" / name / "spool" / "agent.state").read_text()) for name in names]
            memory = [memory_of(state["pid"]) for state in states]
            caps = {str(cap["version"]) for cap in engine.caps().values()}
    print(f"{len(known)} devices, {len(plain)} rounds, {os.cpu_count()} cores, cgroup {', '.join(caps)}")
    line("round", plain, 0.005)
    line("round, durable checkpoint", durable, 0.020)
    for key, target in (("Pss", 15), ("Anonymous", 10)):
        largest = max(each[key] for each in memory) / (1 << 20)
        print(f"agent {key:<22} {largest:6.1f} MiB   target {target} MiB: {'ok' if largest <= target else 'MISSED'}")


if __name__ == "__main__":
    try:
        main()
    except TestbedError as error:
        raise SystemExit(str(error)) from None
