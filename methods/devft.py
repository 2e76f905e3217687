"""DevFT: LoRA is trained on a shallow model of fused blocks, which grows to the whole model in stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal

from methods._fusion import cosine_similarity, fused_block, fused_tensor
from methods._grouping import spectral_groups
from methods._lora import tensors_of
from methods._stages import StagedLora, strictly_increasing
from testbed.errors import UsageError
from testbed.method import Block, Client, ModelShape, Order, Received, State, Submodel, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel

_Groups = Sequence[Sequence[int]]


@dataclass(frozen=True)
class DevFT(StagedLora):
    """DGLG groups the blocks by their weights, DBLF fuses each group into one block, LoRA is trained on these.

    Paper: Wu et al., "Developmental Federated Tuning: A Cognitive-Inspired Paradigm for Efficient LLM Adaptation"
    (ICLR 2026, arXiv:2508.00041).  What its readable sources say: the model has L_1 < … < L_S = L blocks in stages of
    fixed length, S = 4, doubling ({4, 8, 16, 32}).  DGLG: W_ij = cos(θ_i, θ_j) of all weights of two blocks, LoRA
    included; rows of the eigenvectors of the L_s smallest eigenvalues of D - W; k-means into L_s groups.  DBLF: a
    group's block is θ_a + β · Σ_j (θ_j - θ_a) with its first block as the anchor a; β = 0.1 for 7B and 8B models,
    0.15 for 13B.  Clients train its LoRA, the server averages by examples (FedAvg), and at a stage's end each group's
    LoRA is written to all its blocks of the global model.

    Our reading, where they are silent: cosines may be negative, so W is shifted (`similarity_shift`); groups need not
    be contiguous; fused blocks stand in the order of their anchors; A and B are fused apart; a fused block is stored
    in the base model's type.  A group's LoRA, fused and then trained, is written to all its blocks at once, not only
    when the stage ends: the state is at all times the global model that the next stage would begin with, so what is
    evaluated and exported after any round is the whole base model with that LoRA.  Devices fetch the fused blocks:
    those bytes are the run's `deployed` ones.  All devices of a stage train the same submodel; one that cannot hold it
    takes no part in that stage.

    Where blocks' weights are nearly orthogonal (the bundled quickstart model: cosines of 0.02 to 0.03, from the norms'
    scales alone), the cut splits off single blocks and leaves all others in one group of n, whose fused block keeps
    only 1 - β · (n - 1) of its anchor (nothing for 11 of 12 blocks): grouping=even avoids such groups.

    stages            S; halving from L gives fewer on a shallow model
    rounds_per_stage  rounds of each stage; empty: equal shares
    capacities        L_1,…,L_S, the last one L; empty: L halved S - 1 times, rounded up
    beta              β
    grouping          "deconfliction": DGLG; its ablations: "even" (neighbours), "random" (sizes as even as they can be)
    similarity_shift  W = "half": (1 + cos) / 2; "clip": max(0, cos)
    fusion            "differential": DBLF; its ablations: "anchor" (R-ONE), "sum", "mean"
    """

    family: ClassVar[str] = "LoRA, layers that fit"
    memory: ClassVar[str] = "the stage's fused blocks, trained through"
    traffic: ClassVar[str] = "A and B of the stage, both ways; new blocks once a stage"

    capacities: tuple[int, ...] = ()
    beta: float = 0.1
    grouping: Literal["deconfliction", "even", "random"] = "deconfliction"
    similarity_shift: Literal["half", "clip"] = "half"
    fusion: Literal["differential", "anchor", "sum", "mean"] = "differential"

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        depths = self.depths(len(shape))
        if not strictly_increasing((0, *depths)) or depths[-1] != len(shape):
            raise UsageError(
                f"setting capacities={','.join(map(str, self.capacities))}: expected strictly increasing numbers of "
                f"blocks, at least 1, of which the last is the model's {len(shape)}"
            )
        if not 0.0 <= self.beta <= 1.0:
            raise UsageError(f"setting beta={self.beta}: expected a number from 0 to 1")
        if len(set(shape.blocks)) > 1 or len(set(shape.block_elements)) > 1:
            raise UsageError(
                f"this method fuses blocks, and those of this {shape.architecture} model are not all of one shape; "
                f"choose another model or method"
            )

    def depths(self, blocks: int) -> tuple[int, ...]:
        if self.capacities:
            return self.capacities
        return tuple(sorted({math.ceil(blocks / 2**halvings) for halvings in range(self.stages)}))

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def begin(self, state: State, base: BaseModel, round_index: int) -> State:
        """Scalars of a stage: its groups of positions, and the content of each group's block."""
        begun = super().begin(state, base, round_index)
        if begun.scalars["stage"] != state.scalars["stage"]:
            groups = self._groups(begun, base)
            tensors = self._fused_adapters(begun, base.shape, groups)
            begun = State(tensors, {**begun.scalars, "groups": groups, "blocks": []})
        if all(map(base.store.has, begun.scalars["blocks"])) and begun.scalars["blocks"]:
            return begun
        blocks = [self._fused_block(base, group) for group in begun.scalars["groups"]]
        return replace(begun, scalars={**begun.scalars, "blocks": blocks})

    def _groups(self, state: State, base: BaseModel) -> list[list[int]]:
        """Groups of positions, each sorted, ordered by their anchors."""
        blocks, count = len(base.shape), self.depth(state, base.shape)
        if count == blocks:
            return [[position] for position in range(blocks)]
        if self.grouping == "deconfliction":
            return spectral_groups(self._similarity(state, base), count, seed=state.scalars["seed"])
        order = list(range(blocks))
        if self.grouping == "random":
            Random(f"{state.scalars['seed']}/groups/{state.scalars['stage']}").shuffle(order)
        return sorted(sorted(order[n * blocks // count : (n + 1) * blocks // count]) for n in range(count))

    def _similarity(self, state: State, base: BaseModel) -> Tensor:
        adapters = [_adapters(state, base.shape, position) for position in range(len(base.shape))]
        cosine = cosine_similarity([base.store.path(content) for content in base.blocks], adapters)
        return (1.0 + cosine) / 2.0 if self.similarity_shift == "half" else cosine.clamp_min(0.0)

    def _shares(self, members: int) -> list[float]:
        """By how much each block of a group counts in the fused one, the anchor first.

        θ_a + β · Σ_j (θ_j - θ_a) over a group of n has (1 - β · (n - 1)) · θ_a and β of every other.
        """
        anchor, other = {
            "differential": (1.0 - self.beta * (members - 1), self.beta),
            "anchor": (1.0, 0.0),
            "sum": (1.0, 1.0),
            "mean": (1.0 / members, 1.0 / members),
        }[self.fusion]
        return [anchor, *[other] * (members - 1)]

    def _fused_block(self, base: BaseModel, group: Sequence[int]) -> str:
        """The content of a group's block: a new one, or the base model's own where the group has but one member."""
        if len(group) == 1:
            return base.blocks[group[0]]
        paths = [base.store.path(base.blocks[position]) for position in group]
        return base.put(fused_block(paths, self._shares(len(group))))

    def _fused_adapters(self, state: State, shape: ModelShape, groups: _Groups) -> dict[str, Tensor]:
        """The state's tensors with every group's adapters fused, and the result in all its blocks."""
        fused = dict(state.tensors)
        for group in groups:
            if len(group) > 1:
                members = [_adapters(state, shape, position) for position in group]
                for name in members[0]:
                    tensor = fused_tensor([member[name] for member in members], self._shares(len(group)))
                    fused |= {f"{shape.block_prefix}.{position}.{name}": tensor for position in group}
        return fused

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        groups, contents = state.scalars["groups"], state.scalars["blocks"]
        blocks = [Block(group[0], content) for group, content in zip(groups, contents, strict=True)]
        submodel = Submodel(tuple(blocks))
        tensors = tensors_of(state, base.shape, submodel.positions)
        scalars = {"stage": state.scalars["stage"]}
        return [Order(client.index, submodel, tensors=tensors, scalars=scalars) for client in clients]

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        combined = super().combine(state, base, received)
        return replace(combined, tensors=_spread(combined, base.shape, state.scalars["groups"]))


def _adapters(state: State, shape: ModelShape, position: int) -> dict[str, Tensor]:
    """The state's tensors in a block, named relative to it."""
    prefix = f"{shape.block_prefix}.{position}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.tensors.items() if name.startswith(prefix)}


def _spread(state: State, shape: ModelShape, groups: _Groups) -> Mapping[str, Tensor]:
    """The state's tensors, with those of every group's anchor in all its blocks."""
    spread = dict(state.tensors)
    for group in groups:
        for name, tensor in _adapters(state, shape, group[0]).items():
            spread |= {f"{shape.block_prefix}.{position}.{name}": tensor for position in group}
    return spread
