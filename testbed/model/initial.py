"""Initial values that controller and node agree on, bit for bit, whatever their CPU.

torch's own generator differs between CPU kinds, so these come from a counter-based one, keyed by seed and name: a
tensor's values do not depend on which others were made before it.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers for one tensor."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def uniform(shape: Sequence[int], bound: float, seed: int, name: str) -> Tensor:
    """Uniform in [-bound, bound), float32."""
    values = generator(seed, name).random(tuple(shape), dtype=np.float32)
    return torch.from_numpy(values * np.float32(2 * bound) - np.float32(bound))


def lora_a(shape: Sequence[int], seed: int, name: str) -> Tensor:
    """PEFT's kaiming_uniform(a=√5): uniform within 1/√inputs; shape (rank, inputs)."""
    return uniform(shape, 1 / math.sqrt(shape[1]), seed, name)


def head(shape: Sequence[int], spread: float, seed: int, name: str) -> Tensor:
    """A new head's weights with standard deviation `spread` (uniform: it needs no logarithm), its biases zero."""
    if len(shape) < 2:
        return torch.ones(tuple(shape)) if "norm" in name.lower() and name.endswith("weight") else torch.zeros(*shape)
    return uniform(shape, spread * math.sqrt(3), seed, name)
