"""A model whose every tensor comes with the job, for methods that train base weights; no content file is read."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from testbed.errors import ModelError
from testbed.method import Submodel, Workload
from testbed.model import blocks, checkpoint
from testbed.model.submodel import outline, prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built


def whole(
    config: Mapping[str, Any],
    submodel: Submodel,
    work: Workload,
    tensors: Mapping[str, Tensor],
    trained: Callable[[str], bool],
) -> Built:
    """A submodel of the configured model filled with `tensors`, by canonical name, in train mode.

    `trained` says of a parameter's canonical name whether it has a gradient.  A norm's running statistics are filled
    too; its counter of batches starts at 0.  Tensors of the computing type on the right device are taken over and not
    copied: training writes to them, so nobody else may hold them.
    Raises ModelError for a tensor that is missing, or has another shape.
    """
    built, head = outline(config, submodel, work)
    for names, shape in list(checkpoint.wanted(built.model)):
        name = built.canonical(names[0])
        like = _attribute(built.model, names[0])
        value = _value(name, like, shape, tensors).to(work.accelerator, like.dtype)
        held = nn.Parameter(value, trained(name)) if isinstance(like, nn.Parameter) else value
        for own in names:
            _set(built.model, own, held)
    built.head_names = tuple(name for name, _ in built.model.named_parameters() if name in head)
    prepare(built)
    return built


def whole_tensors(base: BaseModel, seed: int) -> dict[str, Tensor]:
    """All floating-point tensors of a base model by canonical name, float32, with a new head from `seed`.

    A norm's running statistics are among them; counters are not, for nobody averages them.
    """
    named = dict(base.tensors(base.outside))
    for position, content in enumerate(base.blocks):
        prefix = f"{base.shape.block_prefix}.{position}"
        named |= {f"{prefix}.{name}": tensor for name, tensor in base.tensors(content).items()}
    floating = {name: tensor.float() for name, tensor in named.items() if tensor.is_floating_point()}
    return {**floating, **base.new_head(seed)}


def running_statistics(built: Built) -> dict[str, Tensor]:
    """What a norm's running mean and variance are now, by canonical name; empty for a model that has none."""
    stored = blocks.stored_buffers(built.model)
    return {built.canonical(name): buffer for name, buffer in stored.items() if buffer.is_floating_point()}


def export_whole(folder: Path, base: BaseModel, tensors: Mapping[str, Tensor]) -> None:
    """Write a Hugging Face model folder with all tensors of the base model replaced, and its tokenizer beside them."""
    work = Workload(base.task, base.labels)
    built = whole(base.config, Submodel.first(len(base.shape)), work, tensors, lambda _: False)
    with _without_progress_bar():
        built.model.save_pretrained(folder)
    for file in base.folder.glob("tokenizer*"):
        shutil.copy2(file, folder / file.name)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Transformers shows one wherever it writes; whoever runs the export has a display of their own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _value(name: str, like: Tensor, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(shape, dtype=like.dtype)
    if name not in tensors:
        raise ModelError(f"{name} did not come with the job: every tensor of this model is needed")
    if tuple(tensors[name].shape) != shape:
        raise ModelError(f"{name} has the shape {tuple(tensors[name].shape)}, expected {shape}")
    return tensors[name].detach()


def _attribute(model: nn.Module, name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), own)
    return found


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(value, nn.Parameter):
        module.register_parameter(own, value)
    else:
        module._buffers[own] = value  # noqa: SLF001 -- register_buffer would forget whether it is stored
