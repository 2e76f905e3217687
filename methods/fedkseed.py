"""FedKSeed: all weights are trained without back-propagation, and a job is 16 KiB down and a few numbers up."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from methods._zeroth_order import slope
from testbed.errors import UsageError, WireError
from testbed.method import (
    RESIDENT,
    Client,
    Method,
    ModelShape,
    Order,
    Phase,
    Received,
    State,
    Submodel,
    Update,
    Workload,
)

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace

COEFFICIENTS = "coefficients"


@dataclass(frozen=True)
class FedKSeed(Method):
    """Clients move all weights along a few thousand fixed random directions; only how far along each is sent.

    Paper: Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under
    18 Kilobytes" (FedKSeed, ICML 2024, arXiv:2312.06353).  Evidence: background knowledge.  There are K fixed seeds,
    each of which stands for a direction z_s over all parameters.  A client rebuilds w = w₀ − Σ_s a_s z_s; in each local
    step it picks a seed and takes g = (L(w + ε z) − L(w − ε z)) / 2ε, w ← w − η g z.  It sends the seeds and the η g;
    the server adds their mean, weighted by examples, to the a_s.

    Our reading: a batch's two losses are of the model as it is evaluated, without dropout; a new head is moved like all
    other weights, from its initial values; a tied weight is moved once, a norm's statistics never.

    seeds        K
    epsilon      ε
    rate_scale   η is the run's learning rate times this: at the run's default of 0.002, 1e-4
    direction    z: "signs", ±1; "normal", as the paper has it
    pro          whether seeds are drawn in proportion to |a_s| (FedKSeed-Pro), uniformly while all are 0
    """

    family: ClassVar[str] = "zeroth order"
    memory: ClassVar[str] = "whole model, forward only"
    traffic: ClassVar[str] = "a number for each seed down, for each step up"
    short_run: ClassVar[Mapping[str, float]] = {"steps": 40, "learning_rate": 0.05, "final_learning_rate": 0.01}

    seeds: int = 4096
    epsilon: float = 5e-4
    rate_scale: float = 0.05
    direction: Literal["signs", "normal"] = "signs"
    pro: bool = False

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, shape: ModelShape, work: Workload) -> None:
        if self.seeds < 1:
            raise UsageError(f"setting seeds={self.seeds}: expected at least 1")
        for name in ("epsilon", "rate_scale"):
            if getattr(self, name) <= 0:
                raise UsageError(f"setting {name}={getattr(self, name)}: expected more than 0")
        if work.holding != RESIDENT:
            raise UsageError(
                f"holding {work.holding!r}: this method changes base weights; leave it at --holding {RESIDENT}"
            )
        if work.dtype == "bfloat16":
            raise UsageError("dtype 'bfloat16': this method's steps are smaller than what it rounds to; use float32")

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        return (Phase("train", submodel.blocks, work.batch_size, work.length, backward=False, optimizer_slots=0),)

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """The new head's initial values are there for whoever has no job, which makes them from the run's seed."""
        import torch

        return State({COEFFICIENTS: torch.zeros(self.seeds), **base.new_head(seed)})

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        tensors = {COEFFICIENTS: state.tensors[COEFFICIENTS]}
        return [Order(client.index, client.submodel, tensors=tensors) for client in clients]

    def verify(self, state: State, update: Received) -> None:
        seeds, steps = update.scalars.get("seeds"), update.scalars.get("steps")
        if update.names or not self._well_formed(seeds, steps):
            raise WireError(
                f"client {update.client}: expected no tensors, as many seeds as steps, seeds from 0 to "
                f"{self.seeds - 1} and finite steps"
            )

    def _well_formed(self, seeds: Any, steps: Any) -> bool:
        return (
            isinstance(seeds, (list, tuple))
            and isinstance(steps, (list, tuple))
            and len(seeds) == len(steps)
            and all(type(seed) is int and 0 <= seed < self.seeds for seed in seeds)
            and all(type(step) is float and math.isfinite(step) for step in steps)
        )

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        import torch

        before = state.tensors[COEFFICIENTS]
        sums = before.tolist()
        total = sum(update.examples for update in received)
        for update in received:
            for seed, step in zip(update.scalars["seeds"], update.scalars["steps"], strict=True):
                sums[seed] += update.examples / total * step
        return replace(state, tensors={**state.tensors, COEFFICIENTS: torch.tensor(sums, dtype=before.dtype)})

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """Write the model as a Hugging Face model folder."""
        from testbed.model.submodel import build
        from testbed.model.whole import export_whole, running_statistics

        whole = base.fill_in(Submodel.first(len(base.shape)))
        built = build(base.config, whole, base.store.path, base.outside, Workload(base.task, base.labels), seed=0)
        self.mount(built, state.tensors)
        export_whole(folder, base, {**_parameters(built), **running_statistics(built)})

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        """Move the built model's own weights, so nobody else may hold them."""
        built.fill({name: tensor for name, tensor in tensors.items() if name != COEFFICIENTS})
        for seed, coefficient in enumerate(tensors[COEFFICIENTS].tolist()):
            if coefficient:
                self._move(built, seed, -coefficient)

    def work(self, workplace: Workplace) -> Update:
        """Weights are moved in place, there and back: what rounding leaves behind is below what a step changes."""
        job = workplace.job
        rate = self.rate_scale * job.learning_rate
        built = workplace.build(job.submodel)
        workplace.let_go_of_held()
        workplace.phase("train")
        tensors = workplace.tensors
        self.mount(built, tensors)
        built.model.eval()
        seeds, steps, losses = self._drawn(workplace, tensors[COEFFICIENTS].tolist()), [], []
        for number, seed in enumerate(seeds):
            move = partial(self._move, built, seed)
            found, loss = slope(built, workplace.batch(number), move, self.epsilon)
            steps.append(rate * found)
            losses.append(loss)
            move(self.epsilon - steps[-1])
            workplace.progress(step=number + 1, steps=job.steps, loss=loss)
        scalars = {"seeds": seeds, "steps": steps, "loss": sum(losses) / len(losses), "last_loss": losses[-1]}
        return Update(scalars=scalars, examples=len(workplace.shard))

    def _drawn(self, workplace: Workplace, coefficients: Sequence[float]) -> list[int]:
        """The seed of each local step."""
        job = workplace.job
        draws = [Random(f"{job.seed}/{job.round}/{job.client}/{step}").random() for step in range(job.steps)]
        weights = [abs(value) for value in coefficients] if self.pro and any(coefficients) else [1.0] * self.seeds
        sums = list(accumulate(weights))
        return [min(bisect_right(sums, draw * sums[-1]), self.seeds - 1) for draw in draws]

    def _move(self, built: Built, seed: int, scale: float) -> None:
        """Add `scale` times the direction of a seed to every parameter."""
        from testbed.model.perturbation import add_normals, add_signs

        add = add_signs if self.direction == "signs" else add_normals
        for name, parameter in _parameters(built).items():
            add(parameter, scale, seed, name)


def _parameters(built: Built) -> dict[str, Tensor]:
    """Every weight once, by canonical name."""
    return {built.canonical(name): parameter.detach() for name, parameter in built.model.named_parameters()}
