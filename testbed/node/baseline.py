"""What a trainer takes before it holds any model: measured with an empty one, once per machine and versions.

`python -I -m testbed.node.baseline THREADS cpu|cuda` prints a `testbed.model.footprint.Baseline` as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import DeviceError
from testbed.model.footprint import Baseline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from testbed.inventory import Device

_PACKAGES = ("torch", "transformers", "numpy", "safetensors")
_FORMAT = 2
_PATIENCE_SECONDS = 1800.0  # a slow board reads and compiles all of torch and transformers, the first time
#: A model of a few KiB: what its first step adds is model classes, kernels and threads, not tensors.
_TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


def device_baseline(device: Device, cache_dir: Path, say: Callable[[str], None] = lambda _: None) -> Baseline:
    """The baseline of a device that is emulated on this machine; kept in `cache_dir` for the next time.

    Raises DeviceError when an empty trainer does not start.
    """
    kept = cache_dir / f"baseline-{_key(device.threads, device.accelerator)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Baseline(**json.loads(kept.read_text(encoding="utf-8")))
    say(f"measuring what an empty trainer takes here ({device.threads} thread{'s' * (device.threads != 1)})")
    found = measure_here(device.threads, device.accelerator)
    cache_dir.mkdir(parents=True, exist_ok=True)
    draft = kept.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(vars(found)), encoding="utf-8")
    draft.replace(kept)
    return found


def measure_here(threads: int, accelerator: str = "cpu", code: Sequence[str] = ()) -> Baseline:
    """Start an empty trainer with the environment that the agent gives it, and ask it.

    `code`: folders with our code, where it is not installed.
    """
    from testbed.node.child import command, environment

    start = command({"python": sys.executable, "trainer": "testbed.node.baseline", "code": list(code)})
    try:
        done = subprocess.run(
            [*start, str(threads), accelerator],
            env=environment({"threads": threads}),
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=True,
        )
        return Baseline(**json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [repr(error)]
        raise DeviceError(f"an empty trainer could not be measured with {sys.executable}: {said[-1]}") from error


def _key(threads: int, accelerator: str) -> str:
    from testbed.node.runtime import TRAINER_ENVIRONMENT

    facts = [
        _FORMAT,
        threads,
        accelerator,
        sys.executable,
        platform.node(),
        platform.release(),
        platform.python_version(),
        [metadata.version(name) for name in _PACKAGES],
        TRAINER_ENVIRONMENT,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def main() -> None:
    """Be an empty trainer: load what it loads, then do the first step of a tiny model, and say what each took."""
    import torch
    import transformers

    import testbed.node.trainer  # noqa: F401 -- all that a trainer imports
    from testbed.node.memory import parse_status

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(sys.argv[1]))
    status = Path("/proc/self/status")
    empty = parse_status(status.read_bytes())
    context = _first_step(sys.argv[2])
    after = parse_status(status.read_bytes())
    own = empty["RssAnon"] + empty.get("RssShmem", 0)
    grown = after["RssAnon"] + after.get("RssShmem", 0) - own
    found = Baseline(own, after["RssFile"], max(0, grown), context)
    print(json.dumps(vars(found)))


def _first_step(accelerator: str) -> int:
    """Do the first step of a tiny model; the bytes of the accelerator's memory that stay taken beside its tensors."""
    import torch

    from testbed.method import CAUSAL_LM, Submodel, Workload
    from testbed.model import submodel
    from testbed.model.adapters import LoraShape, mount_lora
    from testbed.task import Batch, loss

    built, _ = submodel.outline(_TINY, Submodel.first(2), Workload(task=CAUSAL_LM, accelerator=accelerator))
    built.model.to_empty(device=accelerator).init_weights()
    built.model.requires_grad_(False)
    mount_lora(built, LoraShape(2, ("q_proj", "v_proj")), 2.0, 0.0)
    submodel.prepare(built)
    ids = torch.ones(2, 32, dtype=torch.int64)
    batch = Batch(ids, torch.tensor([[1] * 32, [1] * 16 + [0] * 16]), ids).to(accelerator)
    trained = list(built.trainable().values())
    optimizer = torch.optim.AdamW(trained, foreach=False)
    torch.autograd.backward(loss(built.model, batch, CAUSAL_LM))
    torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=False)
    optimizer.step()
    if accelerator != "cuda":
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


if __name__ == "__main__":
    main()
