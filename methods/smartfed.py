"""SmartFed: a router per linear map composes rank-one pieces of ready LoRA adapters; only the routers are trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from methods._averaging import AveragingMethod
from testbed.errors import UsageError, WireError
from testbed.method import (
    RESIDENT,
    Client,
    ModelShape,
    Order,
    Phase,
    Received,
    Snapshot,
    State,
    Submodel,
    Update,
    Workload,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from testbed.model.checkpoint import BaseModel
    from testbed.model.experts import MixtureShape
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace

_ROUTER = ".router.weight"


@dataclass(frozen=True)
class SmartFed(AveragingMethod):
    """MoRE: every rank of every LoRA of a pool is an expert; EEQA: each map's number of active ones follows its worth.

    Paper: "Don't Reinvent the Wheel, Just Realign the Spokes", also "Elastic Mixture of Rank-Wise Experts for
    Knowledge Reuse in Federated Fine-Tuning" (SmartFed, arXiv:2512.00902).  What its readable sources say: LoRAs of
    other tasks are frozen and cut into rank-one experts E_i(x) = B_i (A_i x), M = Σ r_n for each adapted map; a
    router W (M × inputs) gives g = softmax(W x), each token takes its top K, y = W_0 x + Σ g_i E_i(x); K is shared
    out over the maps by importance; routers alone are trained and averaged, experts travel once.

    Our reading, where they are silent: routers begin at zero; alpha_n / r_n is folded into the experts; of equal gates
    the first in the pool wins; the new head of a classifier is trained and averaged too.  EEQA's formulas were not
    readable: importance is Σ |W (.) dLoss/dW|, the mean over the local steps, sent as one number per map, averaged by
    examples, in a moving average over rounds; K of a map is its rounded share of the total, within bounds.

    An update is M × inputs per adapted map where LoRA of rank r sends r × (inputs + outputs): on a square map, as much
    as LoRA of rank M / 2.  The paper's "below 0.1 % of the model" holds for large models only: with the pool that comes
    along (16 experts on q_proj and v_proj of 12 blocks) an update has 0.40 MB, LoRA of rank 16 on the same maps 0.79 MB
    and on all linear maps 3.6 MB, a float32 copy of the model 45 MB.  The experts, as large as those adapters together,
    are sent to a device once.  All of a map's experts are computed: a small K saves no time here.  That pool is no
    stranger to the default task: each adapter tells two of its eight classes apart, learned from texts that no client
    of a default run has.  Whoever compares with a method that begins from nothing says so.

    pool             folder of PEFT LoRA adapters, or of one, or several with commas between them; their heads are not
                     used.  "quickstart": the one that comes along, for the quickstart model only (`testbed
                     make-adapters` makes one for another model)
    experts          active experts of a map, on average: K_total is this times the number of adapted maps
    smallest         K_min
    largest          K_max; none: all experts of the map
    recompute_every  R_e: rounds after which K follows the importances
    decay            of the importances' moving average, which begins with the first round's
    normalise        "none": the chosen experts' gates stay as the softmax over all M gives them; "selected": they are
                     divided by their sum
    """

    family: ClassVar[str] = "LoRA, reused"
    memory: ClassVar[str] = "whole model and a pool of adapters, trained through"
    traffic: ClassVar[str] = "routers, both ways; the pool once"
    data: ClassVar[str] = "its shard; a pool of ready adapters"

    pool: str = "quickstart"
    experts: int = 4
    smallest: int = 1
    largest: int | None = None
    recompute_every: int = 1
    decay: float = 0.9
    normalise: Literal["none", "selected"] = "none"

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def leaks(self) -> str:
        return "how many experts each map has follows from what clients say of their data"

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if not 1 <= self.smallest <= self.experts or (self.largest is not None and self.largest < self.experts):
            raise UsageError(
                f"settings smallest={self.smallest}, experts={self.experts}, largest={self.largest}: expected "
                f"1 ≤ smallest ≤ experts ≤ largest"
            )
        if self.recompute_every < 1 or not 0 <= self.decay < 1:
            raise UsageError("settings recompute_every and decay: expected at least 1, and at least 0 and below 1")
        self._sizes(shape)

    def _sizes(self, shape: ModelShape) -> dict[str, int]:
        """The number of experts of every adapted map; the pool's files are looked at, their tensors are not read."""
        from testbed.adapter_pool import find_pool

        return find_pool(self.pool, shape).sizes()

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        return (
            Phase(
                "train",
                submodel.blocks,
                work.batch_size,
                work.length,
                backward=True,
                outfit=_mixture(self._sizes(shape), shape),
                trained_elements=shape.head_elements,
            ),
        )

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        from testbed.adapter_pool import find_pool
        from testbed.model.experts import router_tensors

        pool = find_pool(self.pool, base.shape)
        experts, sizes = pool.experts(), pool.sizes()
        scalars = {
            "pool": base.put(experts),
            "sizes": sizes,
            "quotas": self._quotas(dict.fromkeys(sizes, 0.0), sizes),
            "importances": {},
            "combined": 0,
        }
        return State({**router_tensors(experts), **base.new_head(seed)}, scalars)

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        scalars = {"pool": state.scalars["pool"], "quotas": state.scalars["quotas"]}
        return [
            Order(client.index, client.submodel, tensors=state.tensors, scalars=scalars, contents=(scalars["pool"],))
            for client in clients
        ]

    def verify(self, state: State, update: Received) -> None:
        super().verify(state, update)
        found = update.scalars.get("importances")
        if not isinstance(found, Mapping) or found.keys() != state.scalars["sizes"].keys():
            raise WireError(
                f"client {update.client}: expected an importance for each adapted map, it sent {found!r:.80}"
            )
        if not all(isinstance(value, (int, float)) and math.isfinite(value) and value >= 0 for value in found.values()):
            raise WireError(f"client {update.client}: an importance is no number, infinite or below 0")

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        scalars = dict(state.scalars)
        scalars["importances"] = self._averaged(scalars["importances"], received)
        scalars["combined"] += 1
        if scalars["combined"] % self.recompute_every == 0:
            scalars["quotas"] = self._quotas(scalars["importances"], scalars["sizes"])
        return replace(super().combine(state, base, received), scalars=scalars)

    def _averaged(self, before: Mapping[str, float], received: Sequence[Received]) -> dict[str, float]:
        """The moving average with this round's mean in it."""
        everyone = sum(update.examples for update in received)
        if not everyone:
            return dict(before)
        means = {
            name: sum(update.examples * update.scalars["importances"][name] for update in received) / everyone
            for name in received[0].scalars["importances"]
        }
        return {name: self.decay * before.get(name, mean) + (1 - self.decay) * mean for name, mean in means.items()}

    def _quotas(self, importances: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
        largest = {name: min(size, self.largest or size) for name, size in sizes.items()}
        smallest = {name: min(size, self.smallest) for name, size in sizes.items()}
        total = min(self.experts * len(sizes), sum(largest.values()))
        return share_out(total, importances, smallest, largest)

    def snapshots(self, state: State, base: BaseModel) -> Sequence[Snapshot]:
        """The global model, with its experts and quotas beside what was trained."""
        from testbed.model.experts import quota_tensors

        experts = base.tensors(state.scalars["pool"])
        quotas = quota_tensors(state.scalars["quotas"])
        return [replace(s, tensors={**experts, **quotas, **s.tensors}) for s in super().snapshots(state, base)]

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """One safetensors file: experts, routers, quotas and the head, by the names of the base model's maps."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        [snapshot] = self.snapshots(state, base)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.tensors.items()}
        save_file(plain, folder / "mixture.safetensors", metadata={"format": "pt"})

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        from testbed.model.experts import EXPERTS_A, EXPERTS_B, mount_experts

        mount_experts(built, tensors, selected=self.normalise == "selected")
        built.fill({name: tensor for name, tensor in tensors.items() if not name.endswith((EXPERTS_A, EXPERTS_B))})

    def work(self, workplace: Workplace) -> Update:
        from testbed.model.experts import quota_tensors
        from testbed.model.tensorfile import read_tensors
        from testbed.node.training import local_steps, update_of

        job = workplace.job
        built = workplace.build(job.submodel)
        experts = read_tensors(workplace.content(job.scalars["pool"]), RESIDENT)
        self.mount(built, {**experts, **quota_tensors(job.scalars["quotas"]), **workplace.tensors})
        workplace.phase("train")
        sums: dict[str, Tensor] = {}
        trained = local_steps(workplace, built, after_backward=_summing(built.trainable(), sums))
        importances = {name: float(total) / job.steps for name, total in sorted(sums.items())}
        return update_of(workplace, built.trainable(), trained, importances=importances)


def share_out(
    total: int, importances: Mapping[str, float], smallest: Mapping[str, int], largest: Mapping[str, int]
) -> dict[str, int]:
    """`total` in whole numbers within bounds, in proportion to the importances; in equal parts where all are 0.

    Rounded shares that do not add up are mended one by one: where the share is furthest above its number one is added,
    where it is furthest below one is taken; of equal ones the first name.  The bounds must admit the total.
    """
    names, whole = sorted(importances), sum(importances.values())
    shares = {name: total * importances[name] / whole if whole else total / len(names) for name in names}
    numbers = {name: max(smallest[name], min(largest[name], round(shares[name]))) for name in names}
    while sum(numbers.values()) < total:
        below = (name for name in names if numbers[name] < largest[name])
        numbers[max(below, key=lambda name: shares[name] - numbers[name])] += 1
    while sum(numbers.values()) > total:
        above = (name for name in names if numbers[name] > smallest[name])
        numbers[min(above, key=lambda name: shares[name] - numbers[name])] -= 1
    return numbers


def _mixture(sizes: Mapping[str, int], shape: ModelShape) -> MixtureShape:
    """What the footprint mounts for a pool of these sizes."""
    from testbed.model.experts import MixtureShape

    counts: dict[str, int] = {}
    positions = []
    for position, linears in enumerate(shape.blocks):
        own = {linear.path: sizes.get(shape.linear_name(position, linear), 0) for linear in linears}
        counts |= {path: max(count, counts.get(path, 0)) for path, count in own.items() if count}
        positions += [position] if any(own.values()) else []
    return MixtureShape(tuple(counts.items()), tuple(positions))


def _summing(trainable: Mapping[str, Parameter], sums: dict[str, Tensor]) -> Callable[[], None]:
    """Adds a step's Σ |W (.) dLoss/dW| of every router to `sums`, by map, while the gradients are there."""
    routers = {name.removesuffix(_ROUTER): value for name, value in trainable.items() if name.endswith(_ROUTER)}

    def add() -> None:
        for name, router in routers.items():
            if router.grad is not None:
                product = (router.detach() * router.grad).abs().sum()
                sums[name] = sums[name] + product if name in sums else product

    return add
