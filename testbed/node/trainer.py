"""The trainer: one job in, one result out; torch and the base model stay loaded between jobs.

A child of the agent, in the memory cgroup that the agent made for it.  Everything it is asked and everything it
answers goes through files in the spool and a few lines over the link.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file

from testbed.errors import TestbedError
from testbed.job import OUT_OF_MEMORY, Job
from testbed.model.held import HeldWeights
from testbed.model.tensorfile import WORDS
from testbed.node import accelerator
from testbed.node.link import AgentLink, Assignment
from testbed.node.workplace import Workplace
from testbed.plugins import restore_method

if TYPE_CHECKING:
    from testbed.method import Update

KEPT_STATES = 2  # rounds whose private state stays on the node, so that a resume is exact


def main() -> None:
    """Serve jobs until the agent closes the link."""
    transformers.logging.set_verbosity_error()
    link = AgentLink.connect()
    settings = link.settings
    torch.set_num_threads(settings["threads"])
    accelerator.set_limit(settings["accelerator"], settings["memory_bytes"])
    gc.freeze()  # what is imported is never garbage: the collection after every job need not look at it
    link.ready({"torch": torch.__version__, "transformers": transformers.__version__})
    weights = HeldWeights()
    for assignment in link.jobs(unload=weights.clear):
        _serve(link, assignment, weights)
        _give_memory_back()


def _serve(link: AgentLink, assignment: Assignment, weights: HeldWeights) -> None:
    try:
        _run(link, assignment, weights)
    except torch.OutOfMemoryError as error:  # an accelerator's memory is used up: the kernel does not kill for that
        link.failed(assignment.id, str(error).splitlines()[0], outcome=OUT_OF_MEMORY)
    except (TestbedError, OSError, MemoryError) as error:
        link.failed(assignment.id, error)
    except Exception as error:  # noqa: BLE001 -- the top of the trainer: whatever a method does ends as an outcome
        traceback.print_exc()
        outcome = OUT_OF_MEMORY if accelerator.is_out_of_memory(error) else None
        link.failed(assignment.id, f"{type(error).__name__}: {error}", outcome=outcome)
    else:
        link.done(assignment.id)


class _Synchronised:
    """The link, told of a phase only when the accelerator has finished the one before."""

    def __init__(self, link: AgentLink, accelerator_name: str) -> None:
        self._link, self._accelerator = link, accelerator_name
        self.peak_bytes: int | None = None  # that any phase held on the accelerator

    def phase(self, name: str) -> None:
        accelerator.synchronise(self._accelerator)
        held = accelerator.peak_bytes(self._accelerator)
        if held is not None:
            self.peak_bytes = max(held, self.peak_bytes or 0)
        accelerator.reset_peak(self._accelerator)
        self._link.phase(name, held)

    def progress(self, **figures: Any) -> None:
        self._link.progress(**figures)


def _run(link: AgentLink, assignment: Assignment, weights: HeldWeights) -> None:
    link.phase("load")
    job = Job.from_json(assignment.job)
    told = _Synchronised(link, job.work.accelerator)
    accelerator.reset_peak(job.work.accelerator)
    method = restore_method(job.method, job.settings)
    state = Path("state") / str(job.client)
    content = Path(link.settings["content"])
    workplace = Workplace(job, content, assignment.payload, state, weights, told)
    try:
        update = method.work(workplace)
        told.phase("send")
        _write(assignment, update, keep_state(update, state), workplace.tokens, told.peak_bytes)
    finally:
        workplace.release()


def keep_state(update: Update, folder: Path) -> str | None:
    """Store the client's private state under its hash; the newest KEPT_STATES stay."""
    if update.state is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "partial"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(update.state.items())}, partial)
    name = hashlib.sha256(partial.read_bytes()).hexdigest()
    latest = max((path.stat().st_mtime_ns for path in folder.glob("*.safetensors")), default=0)
    written = max(partial.stat().st_mtime_ns, latest + 1)  # the newest, also where the clock was set back
    os.utime(partial, ns=(written, written))
    partial.replace(folder / f"{name}.safetensors")
    newest = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for old in newest[KEPT_STATES:]:
        old.unlink()
    return name


def _write(assignment: Assignment, update: Update, state: str | None, tokens: int, peak: int | None) -> None:
    tensors = {name: part.tensor.detach().cpu().contiguous() for name, part in sorted(update.tensors.items())}
    save_file(tensors, assignment.update)
    assignment.write_result(
        {
            "examples": update.examples,
            "tokens": tokens,
            "scalars": dict(update.scalars),
            "tensors": [
                {
                    "name": name,
                    "dtype": dtype_word(tensor),
                    "shape": tuple(tensor.shape),
                    "ranges": update.tensors[name].ranges,
                }
                for name, tensor in tensors.items()
            ],
            "state": state,
            "accelerator_peak_bytes": peak,
        }
    )


def dtype_word(tensor: torch.Tensor) -> str:
    """Safetensors' word for a tensor's type."""
    return WORDS[tensor.dtype]


def _give_memory_back() -> None:
    """Hand freed memory back to the kernel, so that a job never starts with the last one's leftovers."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
