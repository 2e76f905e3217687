"""Blocks compared and fused by their weights, a slice of all of them at a time: never the model in memory.

Blocks are given as files of the content store together with their tensors of the run's state (adapters), all of the
same names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from testbed.model.tensorfile import Entry

#: Of one slice of all blocks that are looked at together, in float64.
SLICE_BYTES = 16 << 20
_FLOAT64_BYTES = 8


def cosine_similarity(paths: Sequence[Path], adapters: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """cos(θ_i, θ_j) of all weights of two blocks, their adapters among them: (blocks × blocks) float64.

    Only the Gram matrix of the blocks is kept; inner products are summed in float64.
    """
    import torch

    gram = torch.zeros(len(paths), len(paths), dtype=torch.float64)
    for rows in _weights(paths, adapters):
        gram += rows @ rows.T
    norms = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return (gram / torch.outer(norms, norms)).clamp(-1.0, 1.0)


def fused_block(paths: Sequence[Path], shares: Sequence[float]) -> dict[str, Tensor]:
    """Σ_j share_j · θ_j of the blocks in these files, in the type of the first one, by the names in the files.

    Beside the result, one slice of the blocks is in memory.
    """
    import torch

    from testbed.model.tensorfile import entries

    stored = [entries(path) for path in paths]
    weights = torch.tensor(shares, dtype=torch.float64)
    fused = {}
    for name, first in stored[0].items():
        flat = torch.empty(first.shape, dtype=first.torch_dtype).view(-1)
        at = 0
        for rows in slices([found[name] for found in stored]):
            flat[at : at + rows.shape[1]] = weights @ rows
            at += rows.shape[1]
        fused[name] = flat.view(first.shape)
    return fused


def fused_tensor(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ_j share_j · tensor_j, summed in float64, in the type of the first one."""
    import torch

    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.double(), alpha=share)
    return total.to(tensors[0].dtype)


def slices(entries: Sequence[Entry]) -> Iterator[Tensor]:
    """The same tensor of several blocks, flat, a few million values at a time: (blocks × values) float64."""
    import torch

    step = max(1, SLICE_BYTES // (_FLOAT64_BYTES * len(entries)))
    count = (entries[0].stop - entries[0].start) // entries[0].torch_dtype.itemsize
    for first in range(0, count, step):
        rows = torch.empty(len(entries), min(step, count - first), dtype=torch.float64)
        for row, entry in zip(rows, entries, strict=True):
            row.copy_(_values(entry, first, len(row)))
        yield rows


def _weights(paths: Sequence[Path], adapters: Sequence[Mapping[str, Tensor]]) -> Iterator[Tensor]:
    import torch

    from testbed.model.tensorfile import entries

    stored = [entries(path) for path in paths]
    for name in stored[0]:
        yield from slices([found[name] for found in stored])
    for name in adapters[0]:
        yield torch.stack([found[name].double().flatten() for found in adapters])


def _values(entry: Entry, first: int, count: int) -> Tensor:
    """`count` values of a tensor from the one at `first` on, read from its file."""
    import torch

    size = entry.torch_dtype.itemsize
    with entry.path.open("rb") as stream:
        stream.seek(entry.start + first * size)
        return torch.frombuffer(bytearray(stream.read(count * size)), dtype=entry.torch_dtype)
