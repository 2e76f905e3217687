"""What the controller takes while many clients send it large updates: a whole round, payload to checkpoint.

    python benchmarks/controller_memory.py [--clients 16] [--update-mib 200] [--tensors 50] [--folder FOLDER]

Real agents on this machine, a trainer process each (without torch), the real engine and the real round: a payload of
that size goes down to every client, an update of that size comes up from each, all are checked, combined and
checkpointed.

Counted is the controller's own process: anonymous and shared memory (RssAnon + RssShmem of /proc/PID/status), read
every two milliseconds from another process.  Not counted are file pages (libraries, and updates that lie in files: the
kernel can take them back) and the devices.  The target, two payloads and 10 %, is held against what the round adds to
a controller that is ready to begin; the interpreter with torch, which it has before, is told beside it.  Where it is
missed, the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from testbed import rounds
from testbed.cache import cache_folder
from testbed.devices import NodeSettings
from testbed.engine import Engine
from testbed.inventory import Budget, Device, HardwareProfile
from testbed.live import Silent
from testbed.method import SEQUENCE_CLASSIFICATION, Client, Method, Order, Phase, State, Submodel, Workload
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.model.combine import weighted_mean
from testbed.node.runtime import fix_mmap_threshold
from testbed.package_data import PACKAGE
from testbed.rounds import Progress, Run
from testbed.run import PLANNED, ClientPlan, Plan, RunConfig
from testbed.run_record import RunRecord
from testbed.store import RunFolder
from testbed.task import Example, Shard

if TYPE_CHECKING:
    from testbed.method import ModelShape, Received

HERE = Path(__file__).resolve().parent
SAMPLE_SECONDS = 0.002
TARGET_PAYLOADS = 2 * 1.1
READY, DONE = "ready", "done"


@dataclass(frozen=True)
class Idle(Method):
    """A state of equal tensors, sent to everybody and averaged."""

    tensors: int = 50
    update_bytes: int = 200 << 20

    def choices(self, shape: ModelShape) -> Iterator[Submodel]:
        yield Submodel.first(len(shape))

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        raise NotImplementedError

    def start(self, *_: object) -> State:
        elements = self.update_bytes // 4 // self.tensors
        return State({f"t{index:03d}": torch.zeros(elements) for index in range(self.tensors)})

    def order(self, state: State, _: BaseModel, clients: Sequence[Client], *__: object) -> list[Order]:
        scalars = {"update_bytes": self.update_bytes, "tensors": self.tensors}
        return [Order(client.index, client.submodel, tensors=state.tensors, scalars=scalars) for client in clients]

    def combine(self, state: State, _: BaseModel, received: Sequence[Received]) -> State:
        return State(weighted_mean(state.tensors, received))

    def export(self, *_: object) -> None:
        raise NotImplementedError

    def mount(self, *_: object) -> None:
        raise NotImplementedError

    def work(self, *_: object) -> None:
        raise NotImplementedError


def a_run(options: argparse.Namespace, engine: Engine, folder: Path) -> Run:
    store = ContentStore(cache_folder() / "content")
    work = Workload(SEQUENCE_CLASSIFICATION)
    base = BaseModel.open(PACKAGE / "quickstart", store, work.task, work.labels)
    submodel = Submodel.first(len(base.shape))
    clients = tuple(
        ClientPlan(index, f"device-{index}", 10, 1 << 30, PLANNED, submodel) for index in range(options.clients)
    )
    return Run(
        folder=RunFolder.create(folder / "runs", "run", RunRecord({"clients": []}, {"method": "idle"}, {}, {})),
        config=RunConfig("idle", rounds=10, evaluate_every=10),
        plan=Plan(clients),
        method=Idle(options.tensors, options.update_mib << 20),
        base=base,
        store=store,
        work=work,
        shards=["0" * 64] * options.clients,
        held_out=Shard.of([Example([1, 2], label=0)], SEQUENCE_CLASSIFICATION, 2),
        baselines={},
        engine=engine,
        watcher=Silent(),
    )


def be_the_controller(options: argparse.Namespace, folder: Path) -> None:
    """One round; says when it begins, and when it is over."""
    fix_mmap_threshold()  # as a session does
    profile = HardwareProfile("bench", "Benchmark", 1 << 30, 1 << 30, 1)
    known = [Device(f"device-{index}", "emulated", profile, Budget(1 << 30)) for index in range(options.clients)]
    code = (str(HERE), str(HERE.parent))
    settings = NodeSettings("run", folder / "nodes", trainer="idle_trainer", code=code, capped=False)
    with Engine(known, folder, "run", settings=settings, parallel=options.parallel, unload_between=False) as engine:
        run = a_run(options, engine, folder)
        engine._update_path = run.folder.update_path  # noqa: SLF001 -- the folder is made after the engine here
        print(READY, flush=True)
        sys.stdin.readline()
        progress = Progress(run.method.start(run.base, run.work, [], 0, 1))
        progress = rounds._round(run, progress)  # noqa: SLF001 -- a round as `federate` does it, without evaluation
        finished = sum(result.finished for result in run.folder.results())
        print(f"{DONE} {finished}", flush=True)


def memory_of(pid: int) -> int:
    """Anonymous and shared bytes of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--clients", type=int, default=16)
    arguments.add_argument("--update-mib", type=int, default=200)
    arguments.add_argument("--tensors", type=int, default=50, help="that an update consists of")
    arguments.add_argument("--parallel", type=int, default=16, help="clients that send at the same time")
    arguments.add_argument("--folder", type=Path, help="where to work; needs two updates of each client")
    arguments.add_argument("--controller", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.controller is not None:
        be_the_controller(options, options.controller)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        command = [sys.executable, __file__, *sys.argv[1:], "--controller", name]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        ) as controller:
            finished, before, peak, seconds = measure(controller)
    if finished != options.clients:
        raise SystemExit(f"{finished} of {options.clients} clients finished, so this was no whole round")
    sys.exit(0 if tell(options, before, peak, seconds) else 1)


def measure(controller: subprocess.Popen[str]) -> tuple[int, int, int, float]:
    """Clients that finished, bytes before and at the peak, and the seconds of the round."""
    if controller.stdin is None or controller.stdout is None or controller.stdout.readline().strip() != READY:
        raise SystemExit("the controller did not begin")
    before = peak = memory_of(controller.pid)
    os.set_blocking(controller.stdout.fileno(), False)
    begun = time.monotonic()
    controller.stdin.write("\n")
    controller.stdin.flush()
    while not (said := controller.stdout.readline()):
        peak = max(peak, memory_of(controller.pid))
        time.sleep(SAMPLE_SECONDS)
        if controller.poll() is not None:
            raise SystemExit(f"the controller ended with {controller.returncode}")
    return int(said.split()[1]), before, peak, time.monotonic() - begun


def tell(options: argparse.Namespace, before: int, peak: int, seconds: float) -> bool:
    """Print what was measured; whether the target is met."""
    payload = options.update_mib << 20
    added = peak - before
    met = added <= TARGET_PAYLOADS * payload
    print(f"{options.clients} × {options.update_mib} MiB in {options.tensors} tensors, {seconds:.1f} s")
    print(f"before the round {before >> 20} MiB (interpreter, torch, engine), peak {peak >> 20} MiB")
    verdict = "ok" if met else "MISSED"
    print(f"added {added >> 20} MiB: {added / payload:.2f} payloads   target {TARGET_PAYLOADS:.1f}: {verdict}")
    return met


if __name__ == "__main__":
    main()
