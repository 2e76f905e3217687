"""One job in a fresh trainer process, its peaks read as the agent reads them.

Run as a script it is that trainer: `footprint_job.py JOB_FILE FOLDER`.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.job import Job
from testbed.method import IMAGE_CLASSIFICATION, Block, Submodel

if TYPE_CHECKING:
    from footprint_cases import Case

    from testbed.task import Example


# ── models: random weights, written once ─────────────────────────────────────────────────────────────────────────────
def write_model(case: Case, store_folder: Path) -> dict[str, Any]:
    """Content files of a case's model; what a job names: {"config", "outside", "blocks"}."""
    import torch
    from footprint_cases import MODELS

    from testbed.model import blocks, checkpoint
    from testbed.model.content import ContentStore
    from testbed.model.tensorfile import put_tensors

    known = store_folder / f"{case.model}-{case.task}-{case.stored}.json"
    if known.is_file():
        return dict(json.loads(known.read_text()))
    store = ContentStore(store_folder)
    model = blocks.skeleton(MODELS[case.model], case.task, 8, "float32")
    anatomy = blocks.find(model)
    head = blocks.head_names(model, anatomy, case.task)
    outside: dict[str, torch.Tensor] = {}
    contents = {}
    generator = torch.Generator().manual_seed(7)
    places = [(*blocks.place(anatomy.prefix, names[0]), shape) for names, shape in checkpoint.wanted(model)
              if names[0] not in head]  # fmt: skip
    for position, found in itertools.groupby(places, key=lambda place: place[0]):  # one block in memory at a time
        tensors = {
            rest: torch.empty(shape).normal_(std=0.02, generator=generator).to(getattr(torch, case.stored))
            for _, rest, shape in found
        }
        if position is None:
            outside |= tensors
        else:
            contents[position] = put_tensors(store, tensors)
    made = {
        "config": store.put_bytes(json.dumps(MODELS[case.model]).encode()),
        "outside": put_tensors(store, outside),
        "blocks": [contents[position] for position in range(len(anatomy.blocks))],
    }
    known.write_text(json.dumps(made))
    return made


def write_shard(case: Case, store_folder: Path) -> str:
    """One batch: of texts of different lengths, the longest as long as the case says; or of noisy images."""
    from testbed.model.content import ContentStore
    from testbed.task import Shard

    examples = _images(case) if case.task == IMAGE_CLASSIFICATION else _texts(case)
    partial = store_folder / f"shard-{os.getpid()}"
    Shard.of(examples, case.task, 8).save(partial)
    content = ContentStore(store_folder).put_file(partial)
    partial.unlink()
    return content


def _texts(case: Case) -> list[Example]:
    from testbed.task import Example

    draw = random.Random(case.key)
    lengths = [case.length, *(draw.randint(case.length // 2, case.length - 1) for _ in range(case.batch - 1))]
    return [Example([draw.randrange(5, 1000) for _ in range(n)], label=i % 8) for i, n in enumerate(lengths)]


def _images(case: Case) -> list[Example]:
    import numpy as np
    from footprint_cases import MODELS

    from testbed.task import Example

    draw = np.random.default_rng(7)
    side = MODELS[case.model]["image_size"]
    return [Example(label=i % 8, pixels=draw.integers(0, 256, (3, side, side), np.uint8)) for i in range(case.batch)]


def job_of(case: Case, store_folder: Path) -> Job:
    content = write_model(case, store_folder)
    kept = Submodel(tuple(Block(position, content["blocks"][position]) for position in range(case.keep)))
    return Job(
        id="case", run="benchmark", round=0, client=0, kind="train", method="lora",
        settings={"rank": case.rank, "targets": list(case.targets)}, config=content["config"],
        outside=content["outside"], submodel=kept, shard=write_shard(case, store_folder), work=case.work, steps=2,
        learning_rate=1e-3, seed=1,
    )  # fmt: skip


# ── the trainer's side ───────────────────────────────────────────────────────────────────────────────────────────────
class _Pipe:
    """Says each phase to the parent and waits until it has read the peaks, as a trainer does with its agent."""

    def phase(self, name: str) -> None:
        print(json.dumps({"phase": name}), flush=True)
        sys.stdin.readline()

    def progress(self, **_: Any) -> None: ...


def child(job_file: Path, store_folder: Path, threads: int) -> None:
    """Be the trainer of one job."""
    import torch
    import transformers

    import testbed.node.trainer  # noqa: F401 -- all that a trainer imports
    from testbed.model.held import HeldWeights
    from testbed.node.workplace import Workplace
    from testbed.plugins import restore_method

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    pipe = _Pipe()
    pipe.phase("load")
    job = Job.from_json(json.loads(job_file.read_text()))
    method = restore_method(job.method, job.settings)
    payload = payload_of(job_file)
    brought = payload if payload.is_file() else None
    workplace = Workplace(job, store_folder, brought, store_folder / "state", HeldWeights(), pipe)
    started = time.monotonic()
    method.work(workplace)
    seconds = time.monotonic() - started
    pipe.phase("send")
    print(json.dumps({"seconds": seconds}), flush=True)


# ── the agent's side ─────────────────────────────────────────────────────────────────────────────────────────────────
def measure(case: Case, folder: Path, cap_bytes: int | None = None, variables: dict[str, str] | None = None) -> Any:
    """Run a case in a fresh trainer; its phases as the agent would report them, or None when the kernel killed it."""
    job_file = folder / f"job-{os.getpid()}.json"
    job_file.write_text(json.dumps(job_of(case, folder).to_json()))
    return measure_job(job_file, folder, str(case), cap_bytes, variables)


def payload_of(job_file: Path) -> Path:
    """Where the tensors lie that a job brings, if it brings any."""
    return job_file.with_suffix(".safetensors")


def measure_job(
    job_file: Path, folder: Path, name: str, cap_bytes: int | None = None, variables: dict[str, str] | None = None
) -> Any:
    """The same for a job that is written down, its contents being in `folder`."""
    import threading

    from testbed.node import limits
    from testbed.node.child import environment
    from testbed.node.memory import PhaseMeter

    command = [sys.executable, "-I", __file__, str(job_file), str(folder)]
    with ExitStack() as cleanup:
        group = None
        if cap_bytes is not None:
            group = limits.create(f"footprint-{os.getpid()}", cap_bytes)
            cleanup.callback(group.remove)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if cap_bytes is None else subprocess.DEVNULL,
            text=True,
            env=environment({"threads": 1, "environment": variables or {}}),
            preexec_fn=(lambda: group.add(os.getpid())) if group is not None else None,  # noqa: PLW1509 -- one thread
        )
        cleanup.callback(process.kill)
        meter, phases, done = PhaseMeter(process.pid, None), [], threading.Event()
        lock = threading.Lock()

        def watch() -> None:
            while not done.wait(0.02):
                with lock:
                    meter.sample()

        threading.Thread(target=watch, daemon=True).start()
        cleanup.callback(done.set)
        seconds = None
        for line in process.stdout or ():
            said = json.loads(line)
            with lock:
                if meter.name:
                    phases.append(meter.end())
                if "seconds" in said:
                    seconds = said["seconds"]
                    break
                meter.begin(said["phase"])
            process.stdin.write("go\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        if seconds is None and cap_bytes is None:
            raise SystemExit(f"{name}: the trainer ended early\n{process.stderr.read()[-3000:]}")  # type: ignore[union-attr]
        process.wait()
        if seconds is None:
            return None
    return {"phases": phases, "seconds": seconds}


if __name__ == "__main__":
    child(Path(sys.argv[1]), Path(sys.argv[2]), threads=1)
