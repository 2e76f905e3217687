"""Combine updates: the examples-weighted mean, per element over those who hold it."""

from __future__ import annotations

import hashlib
import json
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from testbed.errors import WireError
from testbed.model.tensorfile import WORDS, raw_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from testbed.method import Part, Received


def weighted_mean(current: Mapping[str, Tensor], received: Sequence[Received]) -> dict[str, Tensor]:
    """Each tensor of `current`, averaged over the clients that hold it, per element, weighted by their examples.

    What nobody holds keeps its value.  Sums run in float64 in the order of `received`, with one tensor of one client
    in memory at a time, so the result does not depend on who answered first.
    Raises WireError for a tensor that `current` does not have, or a piece that does not fit.
    """
    for update in received:
        unknown = sorted(set(update.names) - set(current))
        if unknown:
            raise WireError(f"client {update.client} sent {unknown[0]}, which is not part of the model's state")
    return {name: _mean(name, value, received) for name, value in current.items()}


def _mean(name: str, value: Tensor, received: Sequence[Received]) -> Tensor:
    """In place where that changes no bit: beside the result there are two tensors of float64, three for pieces."""
    holders = [update for update in received if name in update.names and update.examples > 0]
    if not holders:
        return value
    total = torch.zeros(value.shape, dtype=torch.float64)
    weight: Tensor | None = None  # per element, where clients hold pieces
    whole = 0
    for update in holders:
        part = update.read(name)
        where = regions(part, value, f"client {update.client}: {name}")
        weighted = part.tensor.to(torch.float64, copy=True).mul_(update.examples)
        for there, here in where:
            total[there] += weighted[here]
        if part.ranges is None:
            whole += update.examples
            continue
        weight = torch.zeros(value.shape, dtype=torch.float64) if weight is None else weight
        for there, _ in where:
            weight[there] += update.examples
    if weight is None:
        return total.div_(whole).to(value.dtype)
    weight += whole
    nobody = weight == 0
    total.div_(weight.clamp_(min=1))
    total[nobody] = value[nobody].double()
    return total.to(value.dtype)


Box = tuple[slice, ...]


def regions(part: Part, whole: Tensor, what: str) -> list[tuple[Box, Box]]:
    """Where a part lies in the whole tensor, and which of its own elements lie there: one box, or more around ends.

    No two boxes share an element.  Raises WireError, beginning with `what`, when the part does not fit.
    """
    if not part.fits(whole.shape):
        raise WireError(f"{what} has the shape {tuple(part.tensor.shape)} for {part.ranges} of {tuple(whole.shape)}")
    ranges = part.ranges if part.ranges is not None else tuple((0, size) for size in whole.shape)
    axes = [_stretches(*edges, size) for edges, size in zip(ranges, whole.shape, strict=True)]
    return [(tuple(there for there, _ in box), tuple(here for _, here in box)) for box in product(*axes)]


def _stretches(start: int, stop: int, size: int) -> list[tuple[slice, slice]]:
    """[start, stop) on an axis, cut where it goes around the end: where it lies, and which of its elements that is."""
    first = min(stop, size) - start
    stretches = [(slice(start, start + first), slice(0, first))]
    if stop > size:
        stretches.append((slice(0, stop - size), slice(first, stop - start)))
    return stretches


def state_hash(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> str:
    """One hash of names, types, shapes and values, in any order of either mapping."""
    digest = hashlib.sha256(json.dumps(scalars, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, WORDS[tensor.dtype], list(tensor.shape)]).encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
