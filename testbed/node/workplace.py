"""What a method's client half works with: one job, its tensors and data, the device's held weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from testbed.errors import WireError
from testbed.job import Job
from testbed.method import RESIDENT, Submodel, Workload
from testbed.model.held import HeldWeights
from testbed.model.submodel import Built, build
from testbed.model.tensorfile import read_tensors
from testbed.model.whole import whole
from testbed.task import Batch, Shard, batch_indices

if TYPE_CHECKING:
    from torch import Tensor


class Reporter(Protocol):
    """Where a job says how far it is: the agent, or nobody (tests, evaluation)."""

    def phase(self, name: str) -> None: ...

    def progress(self, **figures: Any) -> None: ...


class Workplace:
    """One job on its node.  Weights stay held in `weights` from job to job; everything else is the job's own."""

    def __init__(
        self, job: Job, content: Path, payload: Path | None, state: Path, weights: HeldWeights, reporter: Reporter
    ) -> None:
        self.job = job
        self.tokens = 0
        self._content, self._payload, self._state_folder = content, payload, state
        self._weights, self._reporter = weights, reporter
        self._shard: Shard | None = None
        self._built: Built | None = None

    # ── what the job brings ────────────────────────────────────────────────────────────────────────────────────────
    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The job's tensors, by canonical name."""
        return read_tensors(self._payload, RESIDENT) if self._payload else {}

    def content(self, content: str) -> Path:
        """The file of one of the hashes that the job names."""
        return self._path(content)

    @property
    def shard(self) -> Shard:
        """The client's examples."""
        if self._shard is None:
            self._shard = Shard.open(self._content / self.job.shard)
        return self._shard

    @property
    def state(self) -> Mapping[str, Tensor] | None:
        """What this client kept from its last job, or None at its first."""
        if self.job.state is None:
            return None
        kept = self._state_folder / f"{self.job.state}.safetensors"
        if not kept.is_file():
            raise WireError(f"client {self.job.client}: the state {self.job.state[:12]} it kept is not on the node")
        return read_tensors(kept, RESIDENT)

    # ── saying how far it is ───────────────────────────────────────────────────────────────────────────────────────
    def phase(self, name: str) -> None:
        """Begin a phase: what follows is measured under that name."""
        self._reporter.phase(name)

    def progress(self, **figures: Any) -> None:
        """Tell whoever watches: step=3, loss=0.7."""
        self._reporter.progress(**figures)

    # ── data ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def batch(self, step: int) -> Batch:
        """The batch of a local step: the same for the same run seed, round, client and step, on every machine."""
        job = self.job
        rows = batch_indices(len(self.shard), job.work.batch_size, job.seed, job.round, job.client, step)
        batch = self.shard.batch(rows, job.work.length, self._built.pad_token_id if self._built else 0)
        self.tokens += batch.tokens
        return batch.to(job.work.accelerator)

    def batches(self) -> Iterator[Batch]:
        """One batch per local step of the job."""
        for step in range(self.job.steps):
            yield self.batch(step)

    # ── models ─────────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def config(self) -> dict[str, Any]:
        """The base model's configuration, as plain data."""
        loaded: dict[str, Any] = json.loads((self._content / self.job.config).read_text(encoding="utf-8"))
        return loaded

    def build(self, submodel: Submodel, work: Workload | None = None) -> Built:
        """Build a submodel, letting go of the one before: a job holds one model at a time.

        Base weights that are held from an earlier job and are part of this one are not read again.
        """
        self.release()
        self._weights.keep_only([*(block.content for block in submodel.blocks if not block.streamed), self.job.outside])
        self._built = build(
            self.config,
            submodel,
            self._path,
            self.job.outside,
            work or self.job.work,
            seed=self.job.seed,
            read=self._weights.read,
        )
        return self._built

    def whole(
        self,
        submodel: Submodel,
        tensors: Mapping[str, Tensor],
        trained: Callable[[str], bool],
        config: Mapping[str, Any] | None = None,
    ) -> Built:
        """A submodel whose every tensor is in `tensors`, letting go of the one before and of all held base weights.

        `trained` says of a parameter's canonical name whether it has a gradient; `config` is of another model than
        the base (a narrower one).  The tensors are taken over: see `testbed.model.whole`.
        """
        self.release()
        self._weights.clear()
        self._built = whole(config or self.config, submodel, self.job.work, tensors, trained)
        return self._built

    def let_go_of_held(self) -> None:
        """Hold nothing for later jobs: the frozen weights of the built model are this job's own, to be written into.

        Only for weights in private memory (holding `RESIDENT`); the next job reads them anew.
        """
        self._weights.clear()

    def release(self) -> None:
        """Let go of the built model (its base weights stay held for the next build)."""
        if self._built is not None:
            self._built.close()
            self._built = None

    def _path(self, content: str) -> Path:
        return self._content / content
