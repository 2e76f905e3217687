"""A network up to one of its stages, with an output module in the place of the later ones: what is trained, the loss.

Stages are counted from 1, and are groups of blocks that follow each other.  The output module takes what the last
block gives: one *stand-in* for every later stage, after which the model's own final norm, pooling and head follow,
and a *projection* of the feature's mean, which the loss alone uses.

    output_module.stand_ins.3.weight         for stage 3: (channels of stage 3, channels before, 3, 3), stride 2, no
                                             bias; of a transformer (hidden, hidden), h + gelu(W h + b)
    output_module.projection.0.weight        (round(2056 / 512 · width), width), then (2 · width, …), (width, 2 · width)

They are float32 whatever the base model computes in (float64 where it has that).
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import gelu, one_hot

from testbed.errors import ModelError
from testbed.method import IMAGE_CLASSIFICATION, Outfit
from testbed.model import blocks, initial
from testbed.model.adapters import zero_linear
from testbed.model.dependence import nhsic

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from testbed.method import ModelShape
    from testbed.model.submodel import Built
    from testbed.task import Batch

OUTPUT_MODULE = "output_module"
_KERNEL = 3


@dataclass(frozen=True)
class StageOutfit(Outfit):
    """One stage's training: its blocks, its output module, and the last map of the stage before.

    Loss = CE - about_input · nHSIC(Z, X) - about_label · nHSIC(P, Y), with Z the feature behind the stand-ins, X the
    pixels (of texts the embeddings), P the projection of Z's mean over places, and Y the label, one-hot.
    """

    stage: int
    depths: tuple[int, ...]  # blocks of every stage's model
    about_input: float  # lambda_1 of the stage
    about_label: float  # lambda_2
    sigma: float  # of the kernels

    @property
    def positions(self) -> range:
        """The stage's blocks."""
        return range(self.depths[self.stage - 2] if self.stage > 1 else 0, self.depths[self.stage - 1])

    @property
    def coupled(self) -> int | None:
        """The block of the stage before whose last map is trained along; none in the first stage."""
        return self.positions[0] - 1 if self.stage > 1 else None

    def trains(self, position: int) -> bool:
        return position in {self.coupled, self.positions[-1]}

    def mount(self, built: Built) -> None:
        behind = names_behind(built.model, built.prefix)
        for name, parameter in built.model.named_parameters():
            position, _ = blocks.place(built.prefix, built.canonical(name))
            outside = position is None and (self.stage == 1 or name in behind)
            parameter.requires_grad_(outside or position in self.positions)
        if self.coupled is not None:
            block = built.block_modules[self.coupled]
            for name in last_map(block):
                block.get_parameter(name).requires_grad_(True)
        mount_output(built, self.stage, len(self.depths))

    def loss(self, built: Built, batch: Batch) -> Tensor:
        output: Any = built.model.get_submodule(OUTPUT_MODULE)
        with output.watched() as seen:
            value = built.loss(batch)
        feature = _without_padding(seen.feature, batch)
        if self.about_input:
            inputs = batch.pixel_values if batch.pixel_values is not None else _without_padding(seen.inputs, batch)
            value = value - self.about_input * nhsic(feature.flatten(1), inputs.flatten(1), self.sigma)
        if self.about_label:
            projected = output.project(_mean_over_places(feature, batch))
            label = one_hot(batch.labels, built.work.labels)
            value = value - self.about_label * nhsic(projected, label.to(projected.dtype), self.sigma)
        return value


class Seen:
    """What passes through a model with an output module: into its first block, and behind the stand-ins."""

    inputs: Tensor
    feature: Tensor


class OutputModule(nn.Module):
    """Stand-ins by the number of the stage that each one stands for, and the projection; zeros until it is filled."""

    def __init__(self, stand_ins: Mapping[int, nn.Module], width: int, like: Tensor) -> None:
        super().__init__()
        self.stand_ins = nn.ModuleDict({str(stage): module for stage, module in stand_ins.items()})
        sizes = (width, *projection_widths(width))
        self.projection = nn.ModuleList(zero_linear(*size, like, bias=True) for size in pairwise(sizes))
        self._seen: Seen | None = None

    def stand_in(self, hidden: Tensor) -> Tensor:
        reached = hidden
        for module in self.stand_ins.values():
            reached = module(reached)
        if self._seen is not None:
            self._seen.feature = reached
        return reached

    def enter(self, hidden: Tensor) -> None:
        if self._seen is not None:
            self._seen.inputs = hidden.detach()

    def project(self, mean: Tensor) -> Tensor:
        for linear in self.projection:
            mean = linear(mean.to(linear.weight.dtype))  # type: ignore[arg-type]  # a parameter, not a module
        return mean

    @contextmanager
    def watched(self) -> Iterator[Seen]:
        """Inside, what passes is noted; a block that is computed once more for the backward pass is not."""
        self._seen = seen = Seen()
        try:
            yield seen
        finally:
            self._seen = None


class HalvingConvolution(nn.Conv2d):
    """One 3x3 convolution of stride 2 in the place of a whole stage; zeros until it is filled."""

    def __init__(self, inputs: int, outputs: int, like: Tensor) -> None:
        super().__init__(inputs, outputs, _KERNEL, stride=2, padding=1, bias=False, device="meta")
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, _KERNEL, _KERNEL, device=like.device, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.to(self.weight.dtype)).to(hidden.dtype)


class ResidualMap(nn.Linear):
    """h + gelu(W h + b) in the place of a stage of a transformer; zeros until it is filled."""

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__(width, width, device="meta")
        made = zero_linear(width, width, like, bias=True)
        self.weight, self.bias = made.weight, made.bias

    def forward(self, hidden: Tensor) -> Tensor:
        added = gelu(super().forward(hidden.to(self.weight.dtype)))
        return (hidden + added).to(hidden.dtype)


def mount_output(built: Built, stage: int, stages: int) -> None:
    """Put the output module behind the last kept block, which is the last one of `stage`."""
    like = next(built.model.parameters())
    channels = stage_channels(built.shape)
    if channels is None:
        made: dict[int, nn.Module] = {
            later: ResidualMap(built.shape.hidden, like) for later in range(stage + 1, stages + 1)
        }
    else:
        sizes = enumerate(pairwise(channels[stage - 1 :]), start=stage + 1)
        made = {later: HalvingConvolution(*size, like) for later, size in sizes}
    output = OutputModule(made, built.shape.hidden, like)
    built.model.add_module(OUTPUT_MODULE, output)
    kept = list(built.block_modules.values())
    kept[-1].register_forward_hook(_stands_in(output))
    if channels is None:
        kept[0].register_forward_pre_hook(_enters(output), with_kwargs=True)


def output_tensors(shape: ModelShape, stage: int, stages: int, seed: int) -> dict[str, Tensor]:
    """Initial values of a stage's output module, by canonical name, float32: uniform within 1/√inputs, biases zero.

    Every stage draws its own.
    """
    channels, width = stage_channels(shape), shape.hidden
    shapes: dict[str, tuple[int, ...]] = {}
    for later in range(stage + 1, stages + 1):
        convolution = channels and (channels[later - 1], channels[later - 2], _KERNEL, _KERNEL)
        shapes[f"stand_ins.{later}"] = convolution or (width, width)
    sizes = pairwise((width, *projection_widths(width)))
    shapes |= {f"projection.{index}": (outputs, inputs) for index, (inputs, outputs) in enumerate(sizes)}
    tensors = {}
    for path, size in shapes.items():
        name = f"{OUTPUT_MODULE}.{path}"
        bound = 1 / math.sqrt(math.prod(size[1:]))
        tensors[f"{name}.weight"] = initial.uniform(size, bound, seed, f"stage {stage} {name}.weight")
        if len(size) == 2:
            tensors[f"{name}.bias"] = torch.zeros(size[0])
    return tensors


def is_convolutional(shape: ModelShape) -> bool:
    """Whether the blocks are the stages of a convolutional network, and no transformer's."""
    return not any(shape.blocks)


def stage_channels(shape: ModelShape) -> tuple[int, ...] | None:
    """The channels that every stage of a convolutional network gives; None for a transformer.

    Raises ModelError where the configuration does not say them as `hidden_sizes`, one for each stage.
    """
    if not is_convolutional(shape):
        return None
    found = getattr(blocks.configuration(shape.config, IMAGE_CLASSIFICATION, 2), "hidden_sizes", ())
    if len(found) != len(shape):
        raise ModelError(
            f"the configuration of a {shape.architecture!r} model does not name the channels of its {len(shape)} "
            "stages (hidden_sizes), so that nothing can stand in for one; choose a ResNet, or a transformer"
        )
    return tuple(found)


def projection_widths(width: int) -> tuple[int, int, int]:
    """2056, 1024 and 512 for a feature of 512 channels, in proportion."""
    return round(2056 * width / 512), 2 * width, width


def names_behind(model: nn.Module, prefix: str) -> set[str]:
    """Names of the parameters and buffers that stand behind the blocks: final norm, pooler, classifier."""
    modules = list(model.named_modules())
    last = max(index for index, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{prefix}."))
    return {
        f"{name}.{own}"
        for name, module in modules[last + 1 :]
        for own, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    }


def last_map(block: nn.Module) -> list[str]:
    """Names of the parameters of a block's last convolution or linear map, and of a norm directly behind it."""
    modules = list(block.named_modules())
    maps = [
        index for index, (_, module) in enumerate(modules) if isinstance(module, nn.Conv2d) or blocks.is_linear(module)
    ]
    path = modules[maps[-1]][0]
    beside = path.rpartition(".")[0]
    norms = [
        name for name, module in modules[maps[-1] :] if blocks.is_norm(module) and name.rpartition(".")[0] == beside
    ]
    return [f"{name}.{own}" for name in (path, *norms) for own, _ in block.get_submodule(name).named_parameters()]


def _stands_in(output: OutputModule) -> Any:
    def hook(_: nn.Module, __: Any, given: Any) -> Any:
        if isinstance(given, tuple):
            return (output.stand_in(given[0]), *given[1:])
        return output.stand_in(given)

    return hook


def _enters(output: OutputModule) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        output.enter(inputs[0] if inputs else named["hidden_states"])

    return hook


def _without_padding(hidden: Tensor, batch: Batch) -> Tensor:
    """The same (batch, places, width) with zeros where a text is padded."""
    return hidden if batch.attention_mask is None else hidden * batch.attention_mask[..., None].to(hidden.dtype)


def _mean_over_places(feature: Tensor, batch: Batch) -> Tensor:
    """(batch, width): over the picture, or over the tokens of each text; `feature` is zero where a text is padded."""
    if feature.dim() > 3:
        return feature.mean((2, 3))
    if batch.attention_mask is None:
        return feature.mean(1)
    return feature.sum(1) / batch.attention_mask.sum(1, keepdim=True)
