"""SLoRA: a sparse change of the weights is trained first, and its best factors are what LoRA begins with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from methods._lora import LoraMethod
from methods._ranks import is_factor, living
from testbed.errors import UsageError
from testbed.method import Client, ModelShape, Order, Phase, Snapshot, State, Submodel, Update, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.sparse import SparseShape
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace

_SPARSE = "sparse"
_TRAIN = "train"


@dataclass(frozen=True)
class SLora(LoraMethod):
    """Stage 1 trains a fixed random set of the weights' elements, stage 2 LoRA that begins with what this came to.

    Paper: Babakniya et al., "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models" (arXiv:2308.06522).
    Evidence: background knowledge of the paper, no code was read: sparse fine-tuning with one random mask for all
    clients, then LoRA on the original weights whose factors begin with the singular decomposition of the update that
    the first stage has accumulated.

    Our reading: the elements are of the maps that LoRA adapts, as many as LoRA of this rank has there (all of a map
    that has fewer), one in each of equal stretches of the weight.  (alpha / rank) · B A begins as the best one of that
    rank, B = U √S and A = √S Vᵀ; where the update has less rank, B is zero and A random, as elsewhere.  The head is
    trained and averaged in both stages, and dropout is LoRA's alone.  A run of one round has stage 1 alone; what is
    exported of a run that ends in stage 1 is what stage 2 would begin with.

    sparse_share   stage 1's share of the rounds: rounded, and each stage has at least one where there are two
    """

    family: ClassVar[str] = "LoRA, homogeneous"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "sparse values, later A and B, both ways"

    sparse_share: float = 0.3

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if not 0 < self.sparse_share < 1:
            raise UsageError(f"setting sparse_share={self.sparse_share}: expected more than 0, less than 1")
        if self.alpha == 0:
            raise UsageError("setting alpha=0: the sparse update is divided by alpha / rank; expected another number")

    def sparse(self, shape: ModelShape) -> SparseShape:
        """What stage 1 trains."""
        from testbed.model.sparse import SparseShape

        return SparseShape(self.lora(shape))

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        train = self.train_phase(submodel.blocks, shape, work)
        return (replace(train, name=_SPARSE, outfit=self.sparse(shape)), train)

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """Tensors: those of both stages.  Scalars: the run's seed, the rounds of stage 1, and the current stage."""
        from testbed.model.sparse import sparse_tensors

        state = super().start(base, work, clients, seed, rounds)
        sparse_rounds = max(1, min(round(self.sparse_share * rounds), rounds - 1))
        return State(
            {**sparse_tensors(base.shape, self.sparse(base.shape)), **state.tensors},
            {"seed": seed, "sparse_rounds": sparse_rounds, "stage": _SPARSE},
        )

    def begin(self, state: State, base: BaseModel, round_index: int) -> State:
        if state.scalars["stage"] == _TRAIN or round_index < state.scalars["sparse_rounds"]:
            return state
        tensors = {**state.tensors, **self._factors(state, base.shape)}
        return replace(state, tensors=tensors, scalars={**state.scalars, "stage": _TRAIN})

    def _factors(self, state: State, shape: ModelShape) -> dict[str, Tensor]:
        """The best factors of the sparse update."""
        from testbed.model.adapters import LORA_A, LORA_B
        from testbed.model.low_rank import dense_factors
        from testbed.model.sparse import matrices

        found: dict[str, Tensor] = {}
        for name, update in matrices(state.tensors, shape, self.sparse(shape), state.scalars["seed"]):
            a, b = dense_factors(update.div_(self.alpha / self.rank), self.rank)
            a, b = living(a, b, state.tensors[f"{name}.{LORA_A}"])
            found |= {f"{name}.{LORA_A}": a, f"{name}.{LORA_B}": b}
        return found

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        tensors, stage = _of_stage(state), state.scalars["stage"]
        return [Order(client.index, client.submodel, kind=stage, tensors=tensors) for client in clients]

    def snapshots(self, state: State, base: BaseModel) -> Sequence[Snapshot]:
        tensors = _of_stage(state)
        if state.scalars["stage"] == _SPARSE:
            tensors |= dict(self._places(base.shape, state.scalars["seed"]))
        return (Snapshot(Submodel.first(len(base.shape)), tensors),)

    def _places(self, shape: ModelShape, seed: int) -> Iterator[tuple[str, Tensor]]:
        from testbed.model.sparse import sparse_places

        return sparse_places(shape, self.sparse(shape), seed)

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        begun = self.begin(state, base, state.scalars["sparse_rounds"])
        super().export(replace(begun, tensors=_of_stage(begun)), base, work, folder)

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        from testbed.model.sparse import mount_sparse

        if any(map(is_factor, tensors)):
            super().mount(built, tensors)
        else:
            mount_sparse(built, self.sparse(built.shape))
            built.fill(tensors)

    def work(self, workplace: Workplace) -> Update:
        job = workplace.job
        built = workplace.build(job.submodel)
        self.mount(built, workplace.tensors)
        if job.kind == _SPARSE:
            for name, places in self._places(built.shape, job.seed):  # one map's at a time: they are copied in
                built.fill({name: places})
        return self.train_in(job.kind, workplace, built)


def _of_stage(state: State) -> dict[str, Tensor]:
    """The state's tensors without those of the other stage."""
    if state.scalars["stage"] == _SPARSE:
        return {name: tensor for name, tensor in state.tensors.items() if not is_factor(name)}
    return {name: tensor for name, tensor in state.tensors.items() if not name.endswith(f".{_SPARSE}")}
