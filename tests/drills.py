"""Engines with real agents and a real trainer that does what a job tells it; and the search for what they leave."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from testbed.devices import NodeSettings
from testbed.engine import Engine
from testbed.inventory import Budget, Device, HardwareProfile
from testbed.job import Job
from testbed.method import Block, Submodel, Workload
from testbed.node import limits

MIB = 1 << 20
TRAINERS = Path(__file__).parent / "node" / "trainers"
ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 120.0


def device(name: str = "board", memory_bytes: int = 64 * MIB, cores: float | None = None) -> Device:
    profile = HardwareProfile("test", "Test board", 1 << 30, 1 << 30, 4)
    return Device(name, "emulated", profile, Budget(memory_bytes, cores))


def job(identity: str = "job-1", client: int = 0, **scalars) -> Job:
    return Job(
        id=identity, run="run", round=3, client=client, kind="train", method="drill", settings={}, config="c",
        outside="o", submodel=Submodel((Block(0),)), shard="s",
        work=Workload(), steps=1, learning_rate=0.1, seed=0, scalars=scalars,
    )  # fmt: skip


def settings(folder: Path, **changes) -> NodeSettings:
    defaults = {"trainer": "drill_trainer", "code": (str(TRAINERS), str(ROOT)), "capped": False}
    return NodeSettings("run", folder / "nodes", **{**defaults, **changes})


def engine(folder: Path, *devices: Device, options: dict | None = None, **changes) -> Engine:
    return Engine(devices or (device(),), folder, "run", settings=settings(folder, **changes), **(options or {}))


def spool_of(node) -> Path:
    return Path(node.place.spool)


def wait_until(condition, patience_seconds: float = PATIENCE_SECONDS):
    """The condition's value as soon as it is true; an AssertionError when it does not become so."""
    deadline = time.monotonic() + patience_seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)
    return value


def exists(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def processes_below(folder: Path) -> list[int]:
    """Every process that was started for a node below the folder: its command line or working directory names it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, where = (path / "cmdline").read_bytes().decode(), str((path / "cwd").readlink())
        except OSError:
            continue
        if int(path.name) != os.getpid() and (str(folder) in command or where.startswith(str(folder))):
            found.append(int(path.name))
    return [pid for pid in found if exists(pid)]


def groups_of(run: str = "run") -> list[Path]:
    """Our cgroups of a run, in whatever hierarchy."""
    return list(limits.ROOT.glob(f"**/{limits.PREFIX}{run}-*"))


def agent_pid(folder: Path, name: str = "board") -> int:
    return json.loads((folder / "nodes" / name / "spool" / "agent.state").read_text())["pid"]
