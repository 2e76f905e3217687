"""FlexLoRA: clients of different ranks; their products are averaged, and taken apart by their singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from methods._ranks import RankedLora, factors_in, living, mean_of_rest, shares_of
from testbed.method import Received, State

if TYPE_CHECKING:
    from testbed.model.checkpoint import BaseModel


@dataclass(frozen=True)
class FlexLora(RankedLora):
    """The server averages the clients' products B A and sends each client their best factors of its own rank.

    Paper: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources"
    (FlexLoRA, NeurIPS 2024, arXiv:2402.11505).  Evidence: background knowledge of the paper, no code was read: the
    server forms Σ p_k B_k A_k, decomposes it by its singular values and sends every client a truncation to its rank.

    Our reading: p_k is the client's share of the examples; the singular values go in halves to both factors
    (B = U √S, A = √S Vᵀ), of which the state keeps the largest rank; the scale is alpha / largest rank for all.  Where
    the sum has less rank than that, B is zero and A keeps its row: zero in both could never be trained again.
    """

    family: ClassVar[str] = "LoRA, heterogeneous ranks"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "A and B of the client's rank, both ways"
    averages: ClassVar[bool] = False

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        from testbed.model.adapters import LORA_A, LORA_B, names_of
        from testbed.model.low_rank import factors_of

        tensors, shares = {**state.tensors, **mean_of_rest(state, received)}, shares_of(received)
        for name in names_of(state.tensors):
            sent = [factors_in(update, name) for update in received]
            products = [(share, a, b) for share, (a, b) in zip(shares, sent, strict=True)]
            a, b = living(*factors_of(products, self.largest), state.tensors[f"{name}.{LORA_A}"])
            tensors |= {f"{name}.{LORA_A}": a, f"{name}.{LORA_B}": b}
        return replace(state, tensors=tensors)
