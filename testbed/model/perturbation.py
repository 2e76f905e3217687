"""Random directions that need not be sent: the same for the same seed and name on every CPU and GPU.

The numbers are bits of a counter-based generator (Philox), mapped to ±1 or, by a fixed table, to a normal
distribution: nothing in between is floating point, in which processors differ.  A direction is made a piece at a
time, so that adding one to a tensor takes a few MiB beside it.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import torch

from testbed.model import initial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

#: Values of a direction that are made at once; a multiple of 64, so that no word of bits is cut.
_PIECE = 1 << 18
#: Steps of the table's values: what is rounded to them is the same whoever computed the logarithms behind it.
_GRID = 1 << 12


def signs(shape: Sequence[int], seed: int, name: str) -> Tensor:
    """±1 with equal probability, float32."""
    return _whole(shape, _sign_pieces, seed, name)


def normals(shape: Sequence[int], seed: int, name: str) -> Tensor:
    """Normally distributed to the table's 256 values: mean 0, variance 1, float32."""
    return _whole(shape, _normal_pieces, seed, name)


def add_signs(tensor: Tensor, scale: float, seed: int, name: str) -> None:
    """Add `scale` times `signs` of the tensor's shape in place; no gradient is recorded."""
    _add(tensor, scale, _sign_pieces(tensor.numel(), seed, name))


def add_normals(tensor: Tensor, scale: float, seed: int, name: str) -> None:
    """Add `scale` times `normals` of the tensor's shape in place; no gradient is recorded."""
    _add(tensor, scale, _normal_pieces(tensor.numel(), seed, name))


def _whole(
    shape: Sequence[int], pieces: Callable[[int, int, str], Iterator[np.ndarray]], seed: int, name: str
) -> Tensor:
    direction = torch.zeros(tuple(shape))
    _add(direction, 1.0, pieces(direction.numel(), seed, name))
    return direction


def _add(tensor: Tensor, scale: float, pieces: Iterator[np.ndarray]) -> None:
    with torch.no_grad():
        flat, at = tensor.view(-1), 0
        for piece in pieces:
            values = torch.from_numpy(piece).to(tensor.device, tensor.dtype)
            flat[at : at + len(values)].add_(values, alpha=scale)
            at += len(values)


def _sign_pieces(count: int, seed: int, name: str) -> Iterator[np.ndarray]:
    for raw, size in _pieces(count, seed, name, per_byte=8):
        bits = np.unpackbits(raw, count=size, bitorder="little")
        yield bits.astype(np.float32) * np.float32(2) - np.float32(1)


def _normal_pieces(count: int, seed: int, name: str) -> Iterator[np.ndarray]:
    table = _normal_table()
    for raw, size in _pieces(count, seed, name, per_byte=1):
        yield table[raw[:size]]


def _pieces(count: int, seed: int, name: str, *, per_byte: int) -> Iterator[tuple[np.ndarray, int]]:
    """Random bytes for `count` values, piece by piece: the generator's own words, which no version of numpy changes."""
    words = initial.generator(seed, name).bit_generator
    for first in range(0, count, _PIECE):
        size = min(_PIECE, count - first)
        raw = words.random_raw(-(-size // (8 * per_byte)))
        yield np.asarray(raw, "<u8").view(np.uint8), size


@cache
def _normal_table() -> np.ndarray:
    """The middles of 256 equally likely stretches of the normal distribution, scaled to variance 1."""
    middles = np.array([NormalDist().inv_cdf((index + 0.5) / 256) for index in range(256)])
    return np.asarray(np.rint(middles / np.sqrt((middles**2).mean()) * _GRID) / _GRID, np.float32)
