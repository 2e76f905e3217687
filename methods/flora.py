"""FLoRA: the clients' adapters are stacked and merged into the base weights, and each round begins with new ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, ClassVar

from methods._ranks import RankedLora, as_pieces, cut_to, is_factor, mean_of_rest, shares_of
from testbed.errors import StoreError, UsageError
from testbed.method import (
    MAPPED,
    RESIDENT,
    Client,
    ModelShape,
    Order,
    Received,
    Snapshot,
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

_STACK = "stack"
_PRODUCT_BYTES = 4 << 20  # of B A, while it is added to a weight


@dataclass(frozen=True)
class Flora(RankedLora):
    """Σ p_k (alpha / r_k) B_k A_k, without the noise of averaging factors apart, becomes part of everybody's weights.

    Paper: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations"
    (NeurIPS 2024, arXiv:2409.05976).  Evidence: the official code concatenates along the rank every A_k, scaled by the
    client's share p_k of the examples, and every B_k as it is; the stack is sent out and merged into the base model,
    and clients begin anew.  Its ranks are 64,32,16,16,8,8,4,4,4,4 (or 16 for all 10 clients), alpha 32, on q and v.

    Our reading: a client's own alpha / r_k is folded into its A before stacking; a round's A is drawn from run and
    round, the same for all (a client takes its first rows) and on the device itself, so that a client is sent nothing
    but the head and the stacks it has not had yet; the head is averaged by examples.  Weights take each stack in the
    type they are held in.

    Every job reads the base weights anew and merges all stacks of the run so far, each as large as all adapters of
    its round together; devices keep them.  They lie in the controller's cache, which a resumed run needs.
    """

    family: ClassVar[str] = "LoRA, heterogeneous ranks"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "own A and B up; everybody's down, once"
    averages: ClassVar[bool] = False

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if work.holding != RESIDENT:
            raise UsageError(
                f"holding {work.holding!r}: this method merges into base weights; leave it at --holding {RESIDENT}"
            )

    def alpha_at(self, rank: int) -> float:
        return self.alpha

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """Tensors: the head, and the factors with which the largest rank begins the round.

        Scalars: the run's seed, and the content of every round's stack.
        """
        tensors = {**self._fresh(base.shape, seed, 0), **base.new_head(seed)}
        return State(tensors, {"seed": seed, "stacks": []})

    def _fresh(self, shape: ModelShape, seed: int, round_index: int) -> dict[str, Tensor]:
        """A as it is drawn for a round, B zero, both of the largest rank."""
        from testbed.model.adapters import lora_tensors

        return lora_tensors(shape, self.lora(shape), Random(f"{seed}/flora/{round_index}").getrandbits(60))

    def begin(self, state: State, base: BaseModel, round_index: int) -> State:
        for index, content in enumerate(state.scalars["stacks"]):
            if not base.store.has(content):
                raise StoreError(
                    f"stack {index} of this run is no longer in {base.store.folder}: the run cannot go on without it"
                )
        fresh = self._fresh(base.shape, state.scalars["seed"], round_index)
        return replace(state, tensors={**state.tensors, **fresh})

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        head, stacks = _without_factors(state), tuple(state.scalars["stacks"])
        return [Order(client.index, client.submodel, tensors=head, contents=stacks) for client in clients]

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        content = base.put(_Stack(state, received, self.alpha))
        scalars = {**state.scalars, "stacks": [*state.scalars["stacks"], content]}
        return replace(state, tensors={**state.tensors, **mean_of_rest(state, received)}, scalars=scalars)

    def snapshots(self, state: State, base: BaseModel) -> Sequence[Snapshot]:
        from testbed.model.tensorfile import read_tensors

        tensors = _without_factors(state)
        for index, content in enumerate(state.scalars["stacks"]):
            stack = read_tensors(base.store.path(content), MAPPED)
            tensors |= {f"{_STACK}.{index}.{name}": tensor for name, tensor in stack.items()}
        return (Snapshot(Submodel.first(len(base.shape)), tensors),)

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """Write a Hugging Face model folder with all stacks merged."""
        from testbed.model.submodel import build
        from testbed.model.whole import export_whole

        [snapshot] = self.snapshots(state, base)
        built = build(base.config, base.fill_in(snapshot.submodel), base.store.path, base.outside, work, seed=0)
        self.mount(built, snapshot.tensors)
        export_whole(folder, base, built.model.state_dict())

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        """Merges the stacks among the tensors into weights that nobody else holds, and mounts factors if there are."""
        stacks: dict[str, dict[str, Tensor]] = {}
        own = {}
        for name, tensor in tensors.items():
            if name.startswith(f"{_STACK}."):
                _, index, rest = name.split(".", 2)
                stacks.setdefault(index, {})[rest] = tensor
            else:
                own[name] = tensor
        for stack in stacks.values():
            _merge(built, stack)
        if any(map(is_factor, own)):
            super().mount(built, own)
        else:
            built.fill(own)

    def work(self, workplace: Workplace) -> Update:
        from testbed.model.tensorfile import read_tensors

        job = workplace.job
        built = workplace.build(job.submodel)
        if job.further:
            workplace.let_go_of_held()
        for content in job.further:
            _merge(built, read_tensors(workplace.content(content), MAPPED))
        fresh = cut_to(self._fresh(built.shape, job.seed, job.round), self.rank_of(job.client))
        self.mount(built, {**fresh, **workplace.tensors})
        del fresh
        return as_pieces(self.train_in("train", workplace, built))


def _without_factors(state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.tensors.items() if not is_factor(name)}


class _Stack(Mapping[str, "Tensor"]):
    """The clients' factors, concatenated along the rank: one tensor is made whenever it is asked for."""

    def __init__(self, state: State, received: Sequence[Received], alpha: float) -> None:
        self._names = [name for name in state.tensors if is_factor(name)]
        self._received = list(zip(received, shares_of(received), strict=True))
        self._alpha = alpha

    def __getitem__(self, name: str) -> Tensor:
        import torch

        sent = [(update.read(name).tensor, share) for update, share in self._received]
        if name.endswith(".lora_B.weight"):
            return torch.cat([b for b, _ in sent], dim=1)
        return torch.cat([a * (share * self._alpha / len(a)) for a, share in sent])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _merge(built: Built, stack: Mapping[str, Tensor]) -> None:
    """Add B A to the base weights, in place and some rows of a weight at a time."""
    from testbed.model import blocks
    from testbed.model.adapters import LORA_A, LORA_B, names_of

    for name in names_of(stack):
        linear = built.model.get_submodule(built.local(name) or "")
        weight = linear.get_parameter("weight").data
        rows_first = weight.T if blocks.transposed(linear) else weight
        a, b = (stack[f"{name}.{factor}"].to(weight.device) for factor in (LORA_A, LORA_B))
        step = max(1, _PRODUCT_BYTES // (a.shape[1] * a.element_size()))
        for first in range(0, len(b), step):
            rows_first[first : first + step].add_(b[first : first + step] @ a)
