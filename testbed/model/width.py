"""A narrower model of the same depth, and where its tensors lie in those of the wide one.

A ratio is of all widths alike: a ResNet's embedding and stages; a transformer's hidden size, heads and feed-forward
layer, each head staying as wide as it is.  What is cut of a tensor follows from both models' shapes, so that the
picture's channels, classes, positions and the vocabulary stay whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from testbed.errors import UsageError
from testbed.method import ATTENTION, SEQUENCE_CLASSIFICATION
from testbed.model import blocks, checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from testbed.method import ModelShape

_LISTED = "hidden_sizes"
_STAGES = ("embedding_size", _LISTED)
_LAYERS = ("hidden_size", "num_attention_heads", "intermediate_size")
_KEY_VALUE_HEADS = "num_key_value_heads"
_SEPARATE_MAPS = 4  # query, key, value and output: only then is every axis of a map that of one thing
_BOTTLENECK = 4  # a bottleneck's inner width is a fourth of its outer one
_TOLERANCE = 1e-9  # of a width times a ratio that binary fractions do not hold exactly

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: `kept` of `size` elements; a window on it begins at a whole number of units."""

    size: int
    kept: int
    unit: int  # elements that belong together: those of a head

    def window(self, shift: int) -> tuple[int, int]:
        """[start, stop) of the kept elements, `shift` units from the front, maybe around the end."""
        start = shift * self.unit % self.size if self.kept < self.size else 0
        return start, start + self.kept


def admits(shape: ModelShape, ratio: float) -> bool:
    """Whether the model has a narrower one of this ratio: every width times it is a whole number.

    Raises UsageError for an architecture of which this is not known.
    """
    _check_maps(shape)
    return all(_is_whole(width * ratio / unit) for _, widths, unit in _widths(shape.config) for width in widths)


def narrow_config(config: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """The configuration of the model whose widths are `ratio` times those of `config`: a ratio that it admits."""
    narrow = dict(config)
    for name, widths, _ in _widths(config):
        kept = [round(width * ratio) for width in widths]
        narrow[name] = kept if name == _LISTED else kept[0]
    return narrow


def windows(config: Mapping[str, Any], ratio: float, task: str, labels: int, shift: int) -> dict[str, Ranges]:
    """Where every floating-point tensor of the narrower model lies in the wide one, by canonical name.

    The window on each axis begins `shift` units from its front and goes on around its end: axes of one width have one
    window.  A unit is one channel; on the axes that heads lie along it is one head (with grouped queries: a key and
    value head, and the query heads that read it), so that no head is cut in two.
    """
    axes = _axes(json.dumps(dict(config), sort_keys=True), ratio, task, labels)
    return {name: tuple(axis.window(shift) for axis in of_tensor) for name, of_tensor in axes.items()}


def cut(tensor: Tensor, ranges: Ranges) -> Tensor:
    """The piece of a tensor that lies in the ranges, which may go around the end of an axis; a copy unless whole."""
    for dim, (start, stop) in enumerate(ranges):
        size = tensor.shape[dim]
        if (start, stop) != (0, size):
            tensor = tensor.index_select(dim, torch.arange(start, stop) % size)
    return tensor


def _widths(config: Mapping[str, Any]) -> Iterator[tuple[str, list[int], int]]:
    """Name and values of every width that the configuration has, and the number that each must be a multiple of."""
    made = blocks.configuration(config, SEQUENCE_CLASSIFICATION, 2)  # its widths are the same for every task
    if all(getattr(made, name, None) for name in _STAGES):
        yield "embedding_size", [made.embedding_size], 1
        yield _LISTED, list(made.hidden_sizes), _BOTTLENECK if made.layer_type == "bottleneck" else 1
        return
    grouped = [_KEY_VALUE_HEADS] if getattr(made, _KEY_VALUE_HEADS, None) else []
    for name in [*_LAYERS, *grouped]:
        value = getattr(made, name, None)
        if not isinstance(value, int):
            raise UsageError(_unknown(made.model_type))
        yield name, [value], 1


def _unknown(architecture: str) -> str:
    return (
        f"it is not known how to make a {architecture} model narrower: expected a ResNet, or a transformer whose "
        "query, key and value are maps of their own (vit, llama, bert, …); choose another model with --model"
    )


def _check_maps(shape: ModelShape) -> None:
    """Raise UsageError where heads of several maps lie along one axis."""
    for linears in shape.blocks:
        maps = [linear for linear in linears if linear.part == ATTENTION]
        if linears and len(maps) != _SEPARATE_MAPS:
            raise UsageError(_unknown(shape.architecture))


def _is_whole(number: float) -> bool:
    return round(number) >= 1 and abs(number - round(number)) < _TOLERANCE


@lru_cache(maxsize=32)
def _axes(config: str, ratio: float, task: str, labels: int) -> dict[str, tuple[Axis, ...]]:
    wide = json.loads(config)
    model = blocks.skeleton(wide, task, labels, "float32")
    kept = _shapes(blocks.skeleton(narrow_config(wide, ratio), task, labels, "float32"))
    along_heads = _along_heads(blocks.shape_of(model, wide, "float32", ()))
    groups = getattr(model.config, _KEY_VALUE_HEADS, None) or getattr(model.config, "num_attention_heads", 1)
    return {
        name: tuple(
            Axis(size, narrow, size // int(groups or 1) if axis == along_heads.get(name) else 1)
            for axis, (size, narrow) in enumerate(zip(shape, kept[name], strict=True))
        )
        for name, shape in _shapes(model).items()
    }


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Of every floating-point tensor that a checkpoint holds, tied ones once."""
    stored = model.state_dict(keep_vars=True)
    return {names[0]: shape for names, shape in checkpoint.wanted(model) if stored[names[0]].is_floating_point()}


def _along_heads(shape: ModelShape) -> dict[str, int]:
    """The axis along which heads lie, of each tensor that has one: outputs of query, key and value, then inputs."""
    found: dict[str, int] = {}
    for position, linears in enumerate(shape.blocks):
        names = [shape.linear_name(position, linear) for linear in linears if linear.part == ATTENTION]
        for name in names[:-1]:
            found |= {f"{name}.weight": 0, f"{name}.bias": 0}
        found |= {f"{name}.weight": 1 for name in names[-1:]}
    return found
