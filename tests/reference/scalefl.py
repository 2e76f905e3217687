"""Reference: ScaleFL, once NeuLite (arXiv:2408.10826): each round trains one stage, with a stand-in for the later ones.

Round t trains stage s = t mod T. Its model is the stem and the stages 0 … s, then one 3x3 stride-2 convolution for each
later stage, the mean over the picture and a classifier. Loss = CE - lambda_1 nHSIC(Z, X) - lambda_2 nHSIC(P, Y), with Z
the feature before the mean, X the picture, P a projection of the mean, Y the label. Every stage has a version of the
model of its own, and the versions borrow from each other. The stem belongs to stage 0.

Mutation "less_dependence": both nHSIC terms have the other sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, one_hot

from tests.reference.image_model import (
    HEAD,
    HEAD_BIAS,
    STEM,
    Client,
    Loss,
    Model,
    features,
    is_running,
    local_steps,
    stages_of,
    units_of,
)
from tests.reference.steps import Update, combine, cross_entropy

SIGMA = 5.0

Versions = Mapping[int, Mapping[str, Tensor]]


def run(
    weights: Model,
    state: Versions,
    clients: Sequence[Client],
    rounds: int,
    *,
    lambdas: Sequence[tuple[float, float]],
    learning_rates: Sequence[float],
    mutation: str | None = None,
) -> dict[int, dict[str, Tensor]]:
    """Each stage's version of the model after the rounds.

    weights  the whole network with its classifier, as image_model names it
    state    by stage its output module: "output.convolutions.<stage that it stands for>.weight" and
             "output.head.{weight,bias}", both of which the last stage lacks, and
             "output.projection.<0, 1, 2>.{weight,bias}"
    lambdas  (lambda_1, lambda_2) by stage
    """
    stages = stages_of(weights)
    versions = {stage: first_version(weights, state[stage], stage) for stage in range(stages)}
    for round_index in range(rounds):
        stage = round_index % stages
        versions[stage] = coupled(versions, stage)
        trained = trained_names(versions[stage], stage)
        loss = stage_loss(stage, lambdas[stage], -1.0 if mutation == "less_dependence" else 1.0)
        updates = [
            Update(
                examples, local_steps(versions[stage], trained, loss, batches[round_index], learning_rates[round_index])
            )
            for examples, batches in clients
        ]
        versions[stage] = combine(versions[stage], updates)
    return versions


def block_of(name: str) -> int | None:
    """The stage to which a tensor belongs; None for an output module."""
    if name.startswith(STEM):
        return 0
    return int(name.split(".")[3]) if name.startswith("resnet.encoder.stages.") else None


def first_version(weights: Model, output: Model, stage: int) -> dict[str, Tensor]:
    """The network up to this stage and the output module; the last stage's classifier is the network's own."""
    blocks = {name: tensor for name, tensor in weights.items() if (block_of(name) or 0) <= stage}
    if stage < stages_of(weights) - 1:
        del blocks[HEAD], blocks[HEAD_BIAS]
    return {**blocks, **output}


def coupled(versions: Versions, stage: int) -> dict[str, Tensor]:
    """Forward coupling: earlier stages from the newest version before, the stage itself from the newest last one."""
    loaded = dict(versions[stage])
    for name in loaded:
        block = block_of(name)
        if block is not None:
            loaded[name] = versions[max(versions) if block == stage else stage - 1][name]
    return loaded


def trained_names(model: Model, stage: int) -> list[str]:
    """The stage, its output module and (backward coupling) the last convolution and BatchNorm of the stage before."""
    last = f"resnet.encoder.stages.{stage - 1}.layers.{units_of(model, stage - 1) - 1}.layer.1." if stage else None
    names = [name for name in model if not is_running(name)]
    return [name for name in names if block_of(name) in (None, stage) or (last and name.startswith(last))]


def stage_loss(stage: int, lambdas: tuple[float, float], sign: float) -> Loss:
    def loss(model: Model, pixels: Tensor, labels: Tensor, running: dict[str, Tensor]) -> Tensor:
        z = features(model, pixels, stage + 1, running)
        later = stage + 1
        while f"output.convolutions.{later}.weight" in model:
            z = conv2d(z, model[f"output.convolutions.{later}.weight"], stride=2, padding=1)
            later += 1
        pooled = z.mean((2, 3))
        own = HEAD not in model
        weight, bias = ("output.head.weight", "output.head.bias") if own else (HEAD, HEAD_BIAS)
        p, logits = pooled, pooled @ model[weight].T + model[bias]
        for index in range(3):
            p = p @ model[f"output.projection.{index}.weight"].T + model[f"output.projection.{index}.bias"]
        y = one_hot(labels, logits.shape[1]).to(p.dtype)
        about_input, about_label = nhsic(z.flatten(1), pixels.flatten(1)), nhsic(p, y)
        return cross_entropy(logits, labels) - sign * (lambdas[0] * about_input + lambdas[1] * about_label)

    return loss


def nhsic(x: Tensor, y: Tensor) -> Tensor:
    """HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)) of two (batch, features) tensors."""
    return hsic(x, y) / (hsic(x, x).sqrt() * hsic(y, y).sqrt())


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """mean(K_x H (.) (K_y H)^T)."""
    return (centred_kernel(x) * centred_kernel(y).T).mean()


def centred_kernel(x: Tensor) -> Tensor:
    """K H with K_ab = exp(-||a - b||² / (2 sigma² dim)) and H = I - 1 1^T / m."""
    m, dim = x.shape
    differences = x[:, None, :] - x[None, :, :]
    kernel = torch.exp(-(differences * differences).sum(-1) / (2 * SIGMA * SIGMA * dim))
    return kernel @ (torch.eye(m, dtype=x.dtype) - 1.0 / m)


def projection_widths(channels: int) -> tuple[int, int, int]:
    """The projection head's three widths: 2056, 1024 and 512 for the network of 512 channels, in proportion."""
    return round(2056 * channels / 512), 2 * channels, channels
