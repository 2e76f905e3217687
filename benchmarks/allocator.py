"""What the trainer's allocator setting buys and costs: peak memory and seconds per step, with it and without.

    python benchmarks/allocator.py [--steps 6] [--batch-size 16] [--length 128]

Two fresh processes, one after the other, do the same local steps of LoRA on the quickstart model with one thread; only
`testbed.node.runtime.TRAINER_ENVIRONMENT` differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from testbed.environment import describe_machine
from testbed.node.runtime import TRAINER_ENVIRONMENT

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(measure(args.steps, args.batch_size, args.length)))
        return
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    plain |= {"OMP_NUM_THREADS": "1"}
    with_setting, without = (inside({**plain, **extra}) for extra in (TRAINER_ENVIRONMENT, {}))
    machine = describe_machine()
    print(f"quickstart model, batch {args.batch_size} x {args.length}, one thread; {machine['cpu']}, kernel "
          f"{machine['kernel']}")  # fmt: skip
    for name, found in (("with the setting", with_setting), ("without", without)):
        print(f"{name:18} peak {found['peak_bytes'] / MIB:7.0f} MiB   {found['seconds']:.2f} s per step")
    print(f"ratio              peak {with_setting['peak_bytes'] / without['peak_bytes']:7.2f}       "
          f"{with_setting['seconds'] / without['seconds']:.2f}")  # fmt: skip


def inside(environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--inside"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(steps: int, batch_size: int, length: int) -> dict[str, float]:
    """Peak of anonymous memory (high-water mark less file pages) and seconds per step, the first left out."""
    import torch

    from testbed.cache import cache_folder
    from testbed.method import SEQUENCE_CLASSIFICATION, Submodel, Workload
    from testbed.model.checkpoint import BaseModel, ContentStore
    from testbed.model.submodel import build
    from testbed.node.memory import parse_status
    from testbed.plugins import make_method
    from testbed.prepare import QUICKSTART, model_folder
    from testbed.task import Batch
    from testbed.task import loss as task_loss

    torch.set_num_threads(1)
    store = ContentStore(cache_folder() / "content")
    base = BaseModel.open(model_folder(QUICKSTART), store, SEQUENCE_CLASSIFICATION, 8)
    work = Workload(SEQUENCE_CLASSIFICATION, 8, batch_size, length)
    method = make_method("lora", {})
    submodel = base.fill_in(Submodel.first(len(base.shape)))
    built = build(base.config, submodel, store.path, base.outside, work, seed=0)
    method.mount(built, method.start(base, work, [], 0, 1).tensors)
    optimizer = torch.optim.AdamW(list(built.trainable().values()), foreach=False)
    ids = torch.randint(3, base.shape.vocabulary, (batch_size, length))
    batch = Batch(ids, torch.ones_like(ids), torch.zeros(batch_size, dtype=torch.long))
    seconds = []
    for _ in range(steps + 1):
        began = time.monotonic()
        task_loss(built.model, batch, work.task).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.monotonic() - began)
    status = parse_status(Path("/proc/self/status").read_bytes())
    return {"peak_bytes": status["VmHWM"] - status["RssFile"], "seconds": sum(seconds[1:]) / steps}


if __name__ == "__main__":
    main()
