"""Vanilla federated LoRA (FedIT), the baseline of every paper of the field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods._lora import LoraMethod


@dataclass(frozen=True)
class Lora(LoraMethod):
    """Every client trains LoRA on all blocks; the server averages A and B apart, weighted by examples.

    Paper: Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT, arXiv:2305.05644).
    Evidence: the official code (FedIT/Shepherd) averages each factor with weights n_k / Σ n over the sampled clients.
    Its defaults are rank 16, alpha 16, dropout 0.05 on q_proj; ours (all linear maps, alpha 2r, no dropout) are the
    later papers' habit (OpenFedLLM: rank 32, alpha 64), and each is a setting.

    A device that cannot hold the whole model takes no part: that is what the memory-fitted methods are compared with.
    """

    family: ClassVar[str] = "LoRA, homogeneous"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "A and B, both ways"
