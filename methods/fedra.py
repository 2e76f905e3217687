"""FedRA: every client trains a random subset of the blocks, as many as it can hold, drawn anew in every round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from methods._lora import LoraMethod, random_positions, tensors_of
from testbed.method import Block, Client, ModelShape, Order, State, Submodel, Workload

if TYPE_CHECKING:
    from testbed.model.checkpoint import BaseModel


@dataclass(frozen=True)
class FedRA(LoraMethod):
    """Client k's submodel is a uniformly random subset of c_k blocks; its LoRA and the head are trained.

    Paper: Su et al., "FedRA: A Random Allocation Strategy for Federated Tuning to Unleash the Power of Heterogeneous
    Clients" (ECCV 2024, arXiv:2311.11227).  Evidence: the official code draws the subset per round and client, builds
    the shallow model of those blocks in their order with their frozen weights, averages each block's LoRA over the
    clients that held it, leaves blocks that nobody held as they are, and averages head and norms over all.  It has a
    12-block ViT with capacities 12, 10, 8, 6, 4, 3 and LoRA of rank 8, alpha 8, dropout 0.1 on two maps of a block.

    Our reading: c_k is the largest that the plan's prediction admits on the client's device; means are weighted by
    examples; norms, which are frozen here, are averaged nowhere.  LoRA is on all linear maps by default (`targets`).
    """

    family: ClassVar[str] = "LoRA, layers that fit"
    memory: ClassVar[str] = "the blocks that fit, trained through"
    traffic: ClassVar[str] = "A and B of the drawn blocks, both ways"

    def choices(self, shape: ModelShape) -> Iterator[Submodel]:
        yield from (Submodel.first(count) for count in range(len(shape), 0, -1))

    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        return replace(super().start(base, work, clients, seed, rounds), scalars={"seed": seed})

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        return [self._order(state, base.shape, client, round_index) for client in clients]

    def _order(self, state: State, shape: ModelShape, client: Client, round_index: int) -> Order:
        key = f"{state.scalars['seed']}/{round_index}/{client.index}"
        positions = random_positions(len(shape), len(client.submodel.blocks), key)
        submodel = Submodel(tuple(Block(position) for position in positions))
        return Order(client.index, submodel, tensors=tensors_of(state, shape, positions))
