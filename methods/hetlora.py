"""HETLoRA: clients of different ranks, which they may lower; the server fills up with zeros and weighs by norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from methods._ranks import RankedLora, as_pieces, cut_to, factors_in, mean_of_rest, rank_in
from testbed.errors import UsageError, WireError
from testbed.method import Client, ModelShape, Order, Received, State, Update, Workload

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace


@dataclass(frozen=True)
class HetLora(RankedLora):
    """Each client trains the first r_k ranks and prunes its last ones; means count what a client lacks as zeros.

    Paper: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (EMNLP 2024,
    arXiv:2401.06432).  Evidence: background knowledge of the paper, no code was read: truncation on the way down; a
    penalty on ‖A_tail‖ ‖B_tail‖ and pruning of the tail when it shrinks; zero-padding and weights by the norm of the
    clients' products on the way up.

    Our reading: the tail are the ranks from max(1, floor(decay · r_k)) on; the sum over all maps of
    penalty · ‖A_tail‖ ‖B_tail‖ is added to the loss.  Where that sum of products is smaller after a client's steps than
    before them, it sends the ranks before the tail alone, and has their number from then on.  The weights are
    S_k = sqrt(Σ_maps ‖B_k A_k‖²), equal ones where all are zero; the head's are examples; ranks that nobody in a
    round has keep their value.  The scale is alpha / largest rank for all.

    penalty   on the tail's product; 0: none, and no pruning
    decay     share of a client's ranks before its tail
    """

    family: ClassVar[str] = "LoRA, heterogeneous ranks"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "A and B of the client's rank, both ways"

    penalty: float = 1e-3
    decay: float = 0.99

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if self.penalty < 0:
            raise UsageError(f"setting penalty={self.penalty}: expected at least 0")
        if not 0 < self.decay <= 1:
            raise UsageError(f"setting decay={self.decay}: expected more than 0, at most 1")

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """Scalars: the rank of every client that has pruned, by its number."""
        return replace(super().start(base, work, clients, seed, rounds), scalars={"ranks": {}})

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        own = {client.index: self.rank_of(client.index) for client in clients}
        pruned = {index: state.scalars["ranks"].get(str(index), rank) for index, rank in own.items()}
        return self.truncated_orders(state, clients, pruned)

    def mean(self, state: State, received: Sequence[Received]) -> dict[str, Tensor]:
        from testbed.model.adapters import LORA_A, LORA_B, names_of

        shares = _shares(received, names_of(state.tensors))
        mean = mean_of_rest(state, received)
        for name in names_of(state.tensors):
            a, b = f"{name}.{LORA_A}", f"{name}.{LORA_B}"
            mean[a] = _padded_mean(state.tensors[a], [update.read(a).tensor for update in received], shares)
            transposed = [update.read(b).tensor.T for update in received]
            mean[b] = _padded_mean(state.tensors[b].T, transposed, shares).T.contiguous()
        return {name: mean[name] for name in state.tensors}

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        combined = super().combine(state, base, received)
        ranks = {str(update.client): update.scalars["rank"] for update in received}
        return replace(combined, scalars={**state.scalars, "ranks": {**state.scalars["ranks"], **ranks}})

    def verify(self, state: State, update: Received) -> None:
        super().verify(state, update)
        name = next(name for name in update.names if name.endswith(".lora_A.weight"))
        sent = update.read(name).tensor.shape[0]
        if update.scalars.get("rank") != sent:
            raise WireError(f"client {update.client}: it says rank {update.scalars.get('rank')} and sent {sent} ranks")

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def work(self, workplace: Workplace) -> Update:
        from testbed.node.training import local_steps, update_of

        built = workplace.build(workplace.job.submodel)
        self.mount(built, workplace.tensors)
        factors = _factors(built)
        rank = len(factors[0][0])
        tail = max(1, int(self.decay * rank))
        before = _tail_product(factors, tail)
        workplace.phase("train")
        trained = local_steps(workplace, built, after_backward=lambda: _add_gradients(factors, tail, self.penalty))
        kept = tail if self.penalty and _tail_product(factors, tail) < before else rank
        tensors = cut_to({name: tensor.detach() for name, tensor in built.trainable().items()}, kept)
        return as_pieces(update_of(workplace, tensors, trained, rank=rank_in(tensors)))


def _factors(built: Built) -> list[tuple[Parameter, Parameter]]:
    """A and B of every adapted map."""
    from testbed.model.adapters import LORA_A, LORA_B, names_of

    own = built.trainable()
    return [(own[f"{name}.{LORA_A}"], own[f"{name}.{LORA_B}"]) for name in names_of(own)]


def _tail_product(factors: Sequence[tuple[Tensor, Tensor]], tail: int) -> float:
    """Σ_maps ‖A_tail‖ ‖B_tail‖."""
    return sum(float(a.detach()[tail:].norm()) * float(b.detach()[:, tail:].norm()) for a, b in factors)


def _add_gradients(factors: Sequence[tuple[Parameter, Parameter]], tail: int, penalty: float) -> None:
    """Add the gradient of penalty · Σ_maps ‖A_tail‖ ‖B_tail‖: written out, it takes no memory; 0 where a norm is 0."""
    import torch

    for a, b in factors:
        with torch.no_grad():
            norm_a, norm_b = float(a[tail:].norm()), float(b[:, tail:].norm())
            if a.grad is not None and norm_a > 0:
                a.grad[tail:].add_(a[tail:], alpha=penalty * norm_b / norm_a)
            if b.grad is not None and norm_b > 0:
                b.grad[:, tail:].add_(b[:, tail:], alpha=penalty * norm_a / norm_b)


def _shares(received: Sequence[Received], names: Sequence[str]) -> list[float]:
    """Every client's weight, by the norm of all its products; ‖B A‖² is the sum of (BᵀB) ∘ (A Aᵀ)."""
    sizes = []
    for update in received:
        square = 0.0
        for name in names:
            a, b = (factor.double() for factor in factors_in(update, name))
            square += float(((b.T @ b) * (a @ a.T)).sum())
        sizes.append(max(square, 0.0) ** 0.5)
    total = sum(sizes)
    return [size / total if total else 1.0 / len(sizes) for size in sizes]


def _padded_mean(current: Tensor, sent: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ share · rows, what a client lacks counting as zeros; rows that nobody sent keep their value."""
    total = current.double().clone()
    total[: max(len(rows) for rows in sent)] = 0.0
    for rows, share in zip(sent, shares, strict=True):
        total[: len(rows)] += share * rows.double()
    return total.to(current.dtype)
