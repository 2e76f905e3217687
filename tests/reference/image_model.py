"""A ResNet classifier of basic layers in plain functional torch, in train mode, and its local training by SGD.

Weights and BatchNorm's running statistics lie in one dict, in float64, under the names of Hugging Face's
ResNetForImageClassification ("resnet.embedder.embedder.convolution.weight", …,
"resnet.encoder.stages.0.layers.0.layer.0.normalization.running_mean", …, "classifier.1.weight"), without
num_batches_tracked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d

NORM_EPSILON, NORM_MOMENTUM = 1e-5, 0.1  # torch's defaults
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
STEM = "resnet.embedder.embedder"
HEAD, HEAD_BIAS = "classifier.1.weight", "classifier.1.bias"

Model = Mapping[str, Tensor]
Batch = tuple[Tensor, Tensor]
"""Pixels (batch, channels, height, width) in float64 and labels (batch,) in int64."""
Client = tuple[int, Sequence[Sequence[Batch]]]
"""A client's number of examples and its batches, by round and by local step."""
Loss = Callable[[Model, Tensor, Tensor, dict[str, Tensor]], Tensor]
"""(the model, pixels, labels, a dict that takes the new running statistics) -> the loss of the batch."""


def stages_of(model: Model) -> int:
    """How many stages the model has."""
    return 1 + max(int(name.split(".")[3]) for name in model if name.startswith("resnet.encoder.stages."))


def units_of(model: Model, stage: int) -> int:
    """How many residual units (Hugging Face's basic layers) the stage has."""
    prefix = f"resnet.encoder.stages.{stage}.layers."
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in model if name.startswith(prefix))


def is_running(name: str) -> bool:
    return name.endswith((".running_mean", ".running_var"))


def batch_norm(x: Tensor, model: Model, name: str, running: dict[str, Tensor]) -> Tensor:
    """Normalised by the batch's own mean and variance; the running ones move, the variance without its bias."""
    count = x.numel() // x.shape[1]
    mean = x.mean((0, 2, 3))
    centred = x - mean[:, None, None]
    variance = (centred * centred).mean((0, 2, 3))
    for part, value in (("running_mean", mean), ("running_var", variance * count / (count - 1))):
        before = model[f"{name}.{part}"]
        running[f"{name}.{part}"] = (1 - NORM_MOMENTUM) * before + NORM_MOMENTUM * value.detach()
    scaled = centred / torch.sqrt(variance + NORM_EPSILON)[:, None, None]
    return scaled * model[f"{name}.weight"][:, None, None] + model[f"{name}.bias"][:, None, None]


def convolution(x: Tensor, model: Model, name: str, stride: int, running: dict[str, Tensor]) -> Tensor:
    """A convolution padded by half its kernel, and its BatchNorm."""
    weight = model[f"{name}.convolution.weight"]
    x = conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    return batch_norm(x, model, f"{name}.normalization", running)


def unit(x: Tensor, model: Model, name: str, stride: int, running: dict[str, Tensor]) -> Tensor:
    """Two convolutions beside a shortcut, which is the identity where the model has none."""
    residual = x
    if f"{name}.shortcut.convolution.weight" in model:
        residual = convolution(x, model, f"{name}.shortcut", stride, running)
    inner = convolution(x, model, f"{name}.layer.0", stride, running).clamp(min=0)
    return (convolution(inner, model, f"{name}.layer.1", 1, running) + residual).clamp(min=0)


def features(model: Model, pixels: Tensor, stages: int, running: dict[str, Tensor]) -> Tensor:
    """Stem and the first stages, of which all but the first halve the picture -> (batch, channels, height, width)."""
    x = convolution(pixels, model, STEM, 2, running).clamp(min=0)
    x = max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for stage in range(stages):
        for index in range(units_of(model, stage)):
            stride = 2 if stage > 0 and index == 0 else 1
            x = unit(x, model, f"resnet.encoder.stages.{stage}.layers.{index}", stride, running)
    return x


def logits(model: Model, pixels: Tensor, running: dict[str, Tensor]) -> Tensor:
    """The whole model: the mean over the picture, then the classifier -> (batch, classes)."""
    pooled = features(model, pixels, stages_of(model), running).mean((2, 3))
    return pooled @ model[HEAD].T + model[HEAD_BIAS]


@dataclass
class SGD:
    """Stochastic gradient descent with momentum and weight decay as torch has it: the decay is part of the gradient."""

    learning_rate: float
    velocities: dict[str, Tensor] = field(default_factory=dict)

    def step(self, tensors: Model, gradients: Model) -> dict[str, Tensor]:
        moved = {}
        for name, gradient in gradients.items():
            g = gradient + WEIGHT_DECAY * tensors[name]
            self.velocities[name] = MOMENTUM * self.velocities[name] + g if name in self.velocities else g
            moved[name] = tensors[name] - self.learning_rate * self.velocities[name]
        return moved


def local_steps(
    model: Model, trained: Sequence[str], loss: Loss, batches: Sequence[Batch], learning_rate: float
) -> dict[str, Tensor]:
    """One client's round: a fresh SGD, one step per batch, no clipping. Gives what was trained or has run along."""
    current, optimizer, changed = dict(model), SGD(learning_rate), set(trained)
    for pixels, labels in batches:
        leaves = {name: current[name].clone().requires_grad_() for name in trained}
        running: dict[str, Tensor] = {}
        value = loss({**current, **leaves}, pixels, labels, running)
        found = torch.autograd.grad(value, list(leaves.values()))
        moved = optimizer.step(current, dict(zip(leaves, found, strict=True)))
        current, changed = {**current, **moved, **running}, changed | set(running)
    return {name: tensor for name, tensor in current.items() if name in changed}
