"""What a round costs that trains nothing: controller, agents and wire, and the checkpoint that survives a power cut.

    python benchmarks/round_overhead.py [--devices 4] [--rounds 200] [--no-cap] [--folder FOLDER]
    python benchmarks/round_overhead.py --inventory FILE [--rounds 200] [--no-cap] [--update-mib 100]

Real agents, a real trainer process per device (without torch), 4 KB down and 4 KB up per device and round.  The
checkpoint is what a round must leave on the disk: a file written, fsynced, renamed, and its folder fsynced.

With an inventory, its devices are used as they are, over SSH.  Then a round is dispatch and nothing else, held against
10 ms + one round trip (a TCP handshake with the device's SSH server, measured beside it); and an update of --update-mib
is held against scp of a file of that size from the same device in the same run.

A target that is missed is told, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import idle_trainer

from testbed import assigned, attached
from testbed.code_wheel import CodeWheel, build
from testbed.config import load_inventory
from testbed.devices import NodeSettings
from testbed.engine import Engine
from testbed.errors import TestbedError
from testbed.fact_sheets import facts_of
from testbed.inventory import Access, Budget, Device, HardwareProfile
from testbed.job import Job
from testbed.method import Block, Submodel, Workload
from testbed.ssh.config import resolve

HERE = Path(__file__).resolve().parent
WARM_UP_ROUNDS = 5
ROUND_SECONDS = 0.005
DURABLE_ROUND_SECONDS = 0.020
DISPATCH_SECONDS = 0.010
SCP_SHARE = 0.9
TRANSFERS = 5


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
    idle_trainer.write_update(payload)
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


def line(title: str, seconds: list[float], target: float) -> bool:
    """Print what was measured; whether the target is met."""
    median, high = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
    verdict = "ok" if median <= target else "MISSED"
    print(
        f"{title:<28} median {1000 * median:6.2f} ms   p95 {1000 * high:6.2f} ms   "
        f"target {1000 * target:.0f} ms: {verdict}"
    )
    return median <= target


def round_trip(device: Device) -> float:
    """Seconds of one round trip to the device's SSH server: the median of some TCP handshakes."""
    target = resolve(access_of(device))
    seconds = []
    for _ in range(21):
        begun = time.perf_counter()
        with socket.create_connection((target.host, target.port), 10):
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def access_of(device: Device) -> Access:
    if device.access is None:
        raise SystemExit(f"{device.name} is no device over SSH; leave --inventory out")
    return device.access


class TimedSink(assigned.UpdateSink):
    """Notes when the first byte of an update came."""

    begun = 0.0

    def __init__(self, path: Path) -> None:
        TimedSink.begun = time.perf_counter()
        super().__init__(path)


def update_seconds(engine: Engine, name: str, mebibytes: int) -> float:
    """From the first byte of a large update to the end of its checks."""
    large = replace(job(10**6, 0), scalars={"update_bytes": mebibytes << 20})
    [(result, path)] = engine.run([(name, large, None)])
    seconds = time.perf_counter() - TimedSink.begun
    if path is None:
        raise SystemExit(f"{name}: {result.outcome}: {result.error}")
    path.unlink()
    return seconds


def scp_seconds(device: Device, folder: Path, mebibytes: int) -> tuple[float, float]:
    """The same bytes with the user's scp; and what of that an empty file takes: its start and its login."""
    access = access_of(device)
    options = ["-F", access.ssh_config] if access.ssh_config else []
    ssh = ["ssh", *options, access.host]
    subprocess.run([*ssh, f"head -c {mebibytes << 20} /dev/zero >bench.large; : >bench.empty"], check=True)
    taken = []
    for file in ("bench.large", "bench.empty"):
        begun = time.perf_counter()
        subprocess.run(["scp", "-q", *options, f"{access.host}:{file}", str(folder / file)], check=True)
        taken.append(time.perf_counter() - begun)
    subprocess.run([*ssh, "rm -f bench.large bench.empty"], check=True)
    return taken[0], taken[1]


def with_trainer(wheel: CodeWheel, folder: Path) -> CodeWheel:
    """The code wheel with the idle trainer in it."""
    path = folder / "with-trainer.whl"
    shutil.copyfile(wheel.path, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo("idle_trainer.py"), (HERE / "idle_trainer.py").read_bytes())
    return CodeWheel(path, assigned.file_hash(path), (*wheel.files, "idle_trainer.py"))


def measure_here(options: argparse.Namespace, folder: Path) -> bool:
    """Devices that are emulated on this machine; whether every target is met."""
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
    met = line("round", plain, ROUND_SECONDS)
    met &= line("round, durable checkpoint", durable, DURABLE_ROUND_SECONDS)
    for key, target in (("Pss", 15), ("Anonymous", 10)):
        largest = max(each[key] for each in memory) / (1 << 20)
        print(f"agent {key:<22} {largest:6.1f} MiB   target {target} MiB: {'ok' if largest <= target else 'MISSED'}")
        met &= largest <= target
    return met


def measure_there(options: argparse.Namespace, folder: Path) -> bool:
    """The devices of an inventory: a job on each of them alone, then large updates against scp; whether all is met."""
    met = True
    known = list(load_inventory(options.inventory).select(options.only))
    settings = NodeSettings(
        f"bench-{os.getpid()}",
        folder / "nodes",
        trainer="idle_trainer",
        capped=not options.no_cap,
        wheel=with_trainer(build(folder), folder),
        facts={device.name: facts_of(device) or {} for device in known},
    )
    attached.UpdateSink = TimedSink
    with Engine(known, folder, settings.run, settings=settings) as engine:
        engine.hold()
        print(f"{len(known)} devices over SSH, {options.rounds} jobs on each, {os.cpu_count()} cores here")
        for index, device in enumerate(known):
            first = index * (WARM_UP_ROUNDS + options.rounds)
            measure(engine, [device.name], range(first, first + WARM_UP_ROUNDS), folder, durable=False)
            rounds = range(first + WARM_UP_ROUNDS, first + WARM_UP_ROUNDS + options.rounds)
            seconds = measure(engine, [device.name], rounds, folder, durable=False)
            trip = round_trip(device)
            met &= line(f"{device.name}: dispatch", seconds, DISPATCH_SECONDS + trip)
            print(f"{'':<28} round trip {1000 * trip:.2f} ms")
        for device in known[: options.transfers]:
            met &= compare_transfers(engine, device, folder, options.update_mib)
    for problem in engine.problems:
        print(problem)
    return met


def compare_transfers(engine: Engine, device: Device, folder: Path, mebibytes: int) -> bool:
    """Ours and scp in turns, so that whatever else the machine does hits both; the median of each counts.

    Gives whether the target is met: against scp as it is typed, which logs in, where ours has a connection that stands
    already.  The share of the bytes alone is told beside it; ours are hashed and checked on the way, scp's are not.
    """
    ours, scp, bare = [], [], []
    for _ in range(TRANSFERS):
        ours.append(update_seconds(engine, device.name, mebibytes))
        whole, empty = scp_seconds(device, folder, mebibytes)
        scp.append(whole)
        bare.append(whole - empty)
    taken = statistics.median(ours)
    share, bytes_share = (statistics.median(seconds) / taken for seconds in (scp, bare))
    print(
        f"{device.name}: update of {mebibytes} MiB {taken:.2f} s ({mebibytes / taken:.0f} MiB/s), scp "
        f"{statistics.median(scp):.2f} s: {100 * share:.0f} % of scp   target {100 * SCP_SHARE:.0f} %: "
        f"{'ok' if share >= SCP_SHARE else 'MISSED'}   ({100 * bytes_share:.0f} % without scp's start and login)"
    )
    return share >= SCP_SHARE


def main() -> bool:
    """Measure; whether every target is met."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--devices", type=int, default=4)
    arguments.add_argument("--rounds", type=int, default=200, help="at least 2")
    arguments.add_argument("--no-cap", action="store_true")
    arguments.add_argument("--folder", type=Path, help="where to work (decides what fsync costs)")
    arguments.add_argument("--inventory", type=Path, help="use the devices of this file, over SSH")
    arguments.add_argument("--only", action="append", default=[], help="… of this name, tag or profile")
    arguments.add_argument("--update-mib", type=int, default=100)
    arguments.add_argument("--transfers", type=int, default=1, help="devices whose large updates are measured")
    options = arguments.parse_args()
    if options.rounds < 2:
        arguments.error("--rounds: expected at least 2: a spread is told")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        return (measure_there if options.inventory else measure_here)(options, Path(name))


if __name__ == "__main__":
    try:
        sys.exit(0 if main() else 1)
    except TestbedError as error:
        raise SystemExit(str(error)) from None
