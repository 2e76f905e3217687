"""Initial weights of an image model that is trained from scratch: the same on every machine, and in every run.

They are the base model of such a run, as stored weights are of any other; only its head is drawn from the run's seed.
Their spread is that of the Hugging Face initialisation: the configuration's own `initializer_range` where it states
one (ViT), else Kaiming's for the outputs of a layer that a ReLU follows (ResNet).  They are uniform, not normal, and
come from `testbed.model.initial`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from testbed.errors import ModelError
from testbed.model import blocks, initial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

_SEED = 0


def initial_value(model: PreTrainedModel, name: str) -> Tensor:
    """The initial value of one stored tensor of a model that may be on the meta device; float32, counters int64.

    Norms give their input back and have seen nothing, biases are zero.  Raises ModelError for a tensor of another kind.
    """
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    like: Tensor = getattr(module, own)
    if blocks.is_norm(module) or own == "bias":
        dtype = torch.float32 if like.is_floating_point() else like.dtype
        return torch.full(like.shape, int(own in {"weight", "running_var"}), dtype=dtype)
    if like.dim() < 2:
        raise ModelError(f"{name}: no initial value is known for it; give a model folder that has weights")
    return initial.uniform(
        like.shape, _bound(like.shape, getattr(model.config, "initializer_range", None)), _SEED, name
    )


def _bound(shape: Sequence[int], spread: float | None) -> float:
    """Of a uniform distribution with the standard deviation `spread`; None: Kaiming's, of (outputs, inputs, …)."""
    return math.sqrt(3) * spread if spread else math.sqrt(6 / (shape[0] * math.prod(shape[2:])))
