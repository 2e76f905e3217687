"""LoRA-FAIR: federated LoRA whose mean of B is corrected by what averaging the factors apart loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from methods._lora import LoraMethod
from methods._ranks import factors_in, shares_of
from testbed.errors import UsageError
from testbed.method import ModelShape, Received, State, Workload

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoraFair(LoraMethod):
    """The mean of B is moved so that its product with the mean of A comes close to the mean of the products.

    Paper: Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement" (ICCV
    2025, arXiv:2411.14961).  Evidence: background knowledge of the paper, no code was read: the server looks for a
    residual ΔB with which (B̄ + ΔB) Ā is as similar as possible to Σ p_k B_k A_k, with a penalty on ΔB, and the next
    round begins with the averages so refined.

    Our reading: where the paper maximises a similarity by steps, ΔB is the ridge regression in closed form,
    (ΔW - B̄ Ā) Āᵀ (Ā Āᵀ + ridge I)⁻¹; p_k is the client's share of the examples.

    ridge   weight of ‖ΔB‖² against the squared distance of the products; without bound, this is `lora`
    """

    family: ClassVar[str] = "LoRA, homogeneous"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "A and B, both ways"

    ridge: float = 0.01

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if self.ridge <= 0:
            raise UsageError(f"setting ridge={self.ridge}: expected more than 0")

    def mean(self, state: State, received: Sequence[Received]) -> dict[str, Tensor]:
        from testbed.model.adapters import LORA_A, LORA_B, names_of

        mean, shares = super().mean(state, received), shares_of(received)
        for name in names_of(mean):
            a, b = mean[f"{name}.{LORA_A}"], mean[f"{name}.{LORA_B}"]
            mean[f"{name}.{LORA_B}"] = (b.double() + self._residual(name, a, b, received, shares)).to(b.dtype)
        return mean

    def _residual(
        self, name: str, mean_a: Tensor, mean_b: Tensor, received: Sequence[Received], shares: Sequence[float]
    ) -> Tensor:
        """ΔB of one map in float64; nothing as large as its weight is formed."""
        import torch

        a = mean_a.double()
        gram = a @ a.T
        lost = -mean_b.double() @ gram
        for update, share in zip(received, shares, strict=True):
            own_a, own_b = factors_in(update, name)
            lost += share * (own_b.double() @ (own_a.double() @ a.T))
        ridge = self.ridge * torch.eye(len(a), dtype=torch.float64)
        residual: Tensor = torch.linalg.solve(gram + ridge, lost.T).T
        return residual
