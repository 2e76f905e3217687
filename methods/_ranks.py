"""What methods share in which clients have LoRA of different ranks: who has which, and the pieces that travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from methods._lora import LoraMethod
from testbed.errors import UsageError, WireError
from testbed.method import Client, ModelShape, Order, Part, Received, State, Update, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.adapters import LoraShape
    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace


@dataclass(frozen=True)
class RankedLora(LoraMethod):
    """LoRA whose rank is the client's own: a client of rank r has the first r rows of A and columns of B.

    The footprint is that of the largest rank.  Unless a method says otherwise the scale is alpha / largest rank for
    every client, so that a truncated product means the same wherever it is used.

    ranks   client i has ranks[i mod their number]
    rank    follows from `ranks`; it need not be given
    """

    rank: int = 0
    ranks: tuple[int, ...] = (16, 8, 4)

    @property
    def largest(self) -> int:
        return max(self.ranks)

    def check(self, shape: ModelShape, work: Workload) -> None:
        given = ",".join(map(str, self.ranks))
        if not self.ranks or min(self.ranks) < 1:
            raise UsageError(f"setting ranks={given}: expected one or more numbers of at least 1")
        if self.rank not in (0, self.largest):
            raise UsageError(f"setting rank={self.rank}: here clients have the ranks {given} (ranks); leave rank out")
        LoraMethod.check(replace(self, rank=self.largest), shape, work)

    def lora(self, shape: ModelShape) -> LoraShape:
        return replace(super().lora(shape), rank=self.largest)

    def rank_of(self, client: int) -> int:
        """The rank that a client begins with."""
        return self.ranks[client % len(self.ranks)]

    def alpha_at(self, rank: int) -> float:
        """Alpha of adapters of that rank: alpha / rank is their scale."""
        return self.alpha * rank / self.largest

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        return self.truncated_orders(state, clients, {client.index: self.rank_of(client.index) for client in clients})

    @staticmethod
    def truncated_orders(state: State, clients: Sequence[Client], ranks: Mapping[int, int]) -> list[Order]:
        """Everybody trains the whole model with the factors cut to a rank of their own; equal ranks are sent alike."""
        cut = {rank: cut_to(state.tensors, rank) for rank in sorted(set(ranks.values()))}
        return [Order(client.index, client.submodel, tensors=cut[ranks[client.index]]) for client in clients]

    def verify(self, state: State, update: Received) -> None:
        """All factors are there, and those of a map are the first rows of A and as many columns of B."""
        from testbed.model.adapters import LORA_A, LORA_B, names_of

        super().verify(state, update)
        for name in names_of(state.tensors):
            factors = [f"{name}.{factor}" for factor in (LORA_A, LORA_B)]
            if missing := set(factors) - set(update.names):
                raise WireError(f"client {update.client}: it did not send {min(missing)}")
            a, b = (update.read(factor) for factor in factors)
            leads = all(part.ranges == leading(part.tensor).ranges for part in (a, b))
            if not leads or a.tensor.shape[0] != b.tensor.shape[1]:
                raise WireError(f"client {update.client}: the factors of {name} are not of the first ranks")

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        from testbed.model.adapters import mount_lora

        rank = rank_in(tensors)
        mount_lora(built, replace(self.lora(built.shape), rank=rank), self.alpha_at(rank), self.dropout)
        built.fill(tensors)

    def work(self, workplace: Workplace) -> Update:
        return as_pieces(self.train(workplace, workplace.job.submodel))


def is_factor(name: str) -> bool:
    """Whether a tensor is a factor of LoRA, by its name."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def rank_in(tensors: Mapping[str, Tensor]) -> int:
    """The rank of a set of LoRA tensors."""
    return next(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight"))


def cut_to(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The first `rank` rows of every A and columns of every B, and all other tensors."""
    cut = dict(tensors)
    for name, tensor in tensors.items():
        if is_factor(name):
            cut[name] = (tensor[:rank] if name.endswith(".lora_A.weight") else tensor[:, :rank]).contiguous()
    return cut


def leading(tensor: Tensor) -> Part:
    """A tensor as the piece of a larger one that begins where that begins."""
    return Part(tensor, tuple((0, size) for size in tensor.shape))


def as_pieces(update: Update) -> Update:
    """The same update, its factors being the first rows and columns of larger ones."""
    tensors = {name: leading(part.tensor) if is_factor(name) else part for name, part in update.tensors.items()}
    return replace(update, tensors=tensors)


def factors_in(update: Received, name: str) -> tuple[Tensor, Tensor]:
    """A and B of a linear map that a client has sent."""
    return update.read(f"{name}.lora_A.weight").tensor, update.read(f"{name}.lora_B.weight").tensor


def shares_of(received: Sequence[Received]) -> list[float]:
    """Every client's share of all examples."""
    total = sum(update.examples for update in received)
    return [update.examples / total for update in received]


def mean_of_rest(state: State, received: Sequence[Received]) -> dict[str, Tensor]:
    """The mean of what is no factor (a new head), weighted by examples."""
    from testbed.model.combine import weighted_mean

    rest = {name: tensor for name, tensor in state.tensors.items() if not is_factor(name)}
    return weighted_mean(rest, [_Rest(update) for update in received])


def living(a: Tensor, b: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors without dead ranks: where B has (almost) nothing it is zero, and A keeps a row of `before`.

    With both zero no gradient would ever reach them.  Almost: a singular value of at most 1e-6 of the largest.
    """
    import torch

    values = b.square().sum(dim=0)
    dead = values <= 1e-6 * values.max()
    return torch.where(dead[:, None], before.to(a), a), torch.where(dead, torch.zeros_like(b), b)


class _Rest:
    """An update as if it had no factors."""

    def __init__(self, update: Received) -> None:
        self.client, self.examples, self.scalars = update.client, update.examples, update.scalars
        self.names = tuple(name for name in update.names if not is_factor(name))
        self.read = update.read
