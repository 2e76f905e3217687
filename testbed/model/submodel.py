"""Build a submodel without ever holding the full model: a skeleton, cut to the kept blocks, filled block by block."""

from __future__ import annotations

import ctypes
import gc
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from testbed import task
from testbed.errors import ModelError, UsageError, WireError
from testbed.method import ATTENTION, HOLDINGS, RESIDENT, STREAMED, Block, Submodel, Workload
from testbed.model import blocks, checkpoint
from testbed.model.stream import StreamedBlock
from testbed.model.tensorfile import entries, read_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from testbed.method import ModelShape
    from testbed.model.blocks import Anatomy
    from testbed.task import Batch


class ReadWeights(Protocol):
    """Reads tensors of a file as `read_tensors` does."""

    def __call__(
        self, path: Path, holding: str, dtype: torch.dtype | None, device: str, *, names: Iterable[str] | None
    ) -> dict[str, Tensor]: ...


def build(
    config: Mapping[str, Any],
    submodel: Submodel,
    open_content: Callable[[str], Path],
    outside: str,
    work: Workload,
    *,
    trainable_head: bool = True,
    seed: int,
    read: ReadWeights = read_tensors,
) -> Built:
    """A submodel ready to run: kept blocks in their original order, base weights frozen, a new head from `seed`.

    Only the files of kept blocks are opened, and of those only kept parts are read; `open_content` gives the file of
    a hash; `read` may give weights that it holds already (they are never written to).
    Raises ModelError for weights that do not fit the configuration, UsageError for an unknown holding.
    """
    if work.holding not in HOLDINGS:
        raise UsageError(f"holding {work.holding!r}: expected one of {', '.join(HOLDINGS)}")
    built, head = outline(config, submodel, work, Source(open_content, read))
    new = _fill_outside(built, open_content(outside), head)
    built.head_names = tuple(new)
    _make_head(built, config, new, seed, trainable=trainable_head)
    for block in submodel.blocks:
        _fill_block(built, block, work)
    _read_ahead(built)
    _check_filled(built.model)
    prepare(built)
    return built


def outline(
    config: Mapping[str, Any], submodel: Submodel, work: Workload, source: Source | None = None
) -> tuple[Built, set[str]]:
    """The submodel with its parameters still on the meta device, and the names that may be a new head's."""
    model = blocks.skeleton(config, work.task, work.labels, work.dtype)
    anatomy = blocks.find(model)
    _check_positions(submodel, len(anatomy.blocks))
    head = blocks.head_names(model, anatomy, work.task)
    shape = blocks.shape_of(model, config, work.dtype, head)
    _cut(model, anatomy, submodel)
    _make_buffers(model, torch.device(work.accelerator))
    return Built(model, submodel, shape, work, source), head


class Built:
    """A submodel in memory.  Names are canonical at this boundary: those of the original full model."""

    def __init__(
        self,
        model: PreTrainedModel,
        submodel: Submodel,
        shape: ModelShape,
        work: Workload,
        source: Source | None = None,
    ) -> None:
        self.model = model
        self.submodel = submodel
        self.shape = shape  # of the full model, as if stored in the type it computes in
        self.prefix = shape.block_prefix
        self.work = work
        self.head_names: tuple[str, ...] = ()
        self.streamed: dict[int, StreamedBlock] = {}
        self._source = source or Source(_nothing)
        self._index = {position: index for index, position in enumerate(submodel.positions)}

    @property
    def block_modules(self) -> dict[int, nn.Module]:
        """The kept blocks, by original position."""
        kept = self.model.get_submodule(self.prefix)
        return {position: kept.get_submodule(str(index)) for position, index in self._index.items()}

    @property
    def checkpointing(self) -> bool:
        return self.work.checkpointing

    @property
    def pad_token_id(self) -> int:
        return int(self.model.config.get_text_config().pad_token_id)

    def loss(self, batch: Batch) -> Tensor:
        """The task's mean loss on a batch."""
        return task.loss(self.model, batch, self.work.task)

    def canonical(self, local_name: str) -> str:
        """The original model's name of a tensor or module of this submodel."""
        index, rest = blocks.place(self.prefix, local_name)
        return local_name if index is None else f"{self.prefix}.{self.submodel.positions[index]}.{rest}"

    def local(self, canonical: str) -> str | None:
        """The name in this submodel, whether or not it exists there; None when its block or its part is dropped."""
        position, rest = blocks.place(self.prefix, canonical)
        if position is None:
            return canonical
        if position not in self._index or self._pruned(position, rest):
            return None
        return f"{self.prefix}.{self._index[position]}.{rest}"

    def _pruned(self, position: int, rest: str) -> bool:
        child = rest.partition(".")[0]
        return isinstance(getattr(self.block_modules[position], child, None), Pruned)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What requires a gradient, by canonical name."""
        return {self.canonical(name): value for name, value in self.model.named_parameters() if value.requires_grad}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values in, by canonical name; those of dropped blocks and parts are passed over.

        Raises WireError for a name that the model does not have, or a shape that is not its own.
        """
        own = {**dict(self.model.named_parameters(remove_duplicate=False)), **dict(self.model.named_buffers())}
        for name, value in tensors.items():
            local = self.local(name)
            if local is not None:
                self._fill_one(name, own.get(local), value)

    def _fill_one(self, name: str, target: Tensor | None, value: Tensor) -> None:
        if target is None:
            raise WireError(f"tensor {name} has no place in this model: nothing of that name is mounted")
        if target.shape != value.shape:
            raise WireError(f"tensor {name} has the shape {tuple(value.shape)}, expected {tuple(target.shape)}")
        if self._is_streamed(name):
            raise UsageError(f"tensor {name} belongs to a streamed block: call make_writable on its position first")
        if target.requires_grad:
            with torch.no_grad():
                target.copy_(value)
        else:  # a frozen weight may be shared with whoever holds it for the next job
            target.data = value.to(target.device, target.dtype, copy=True)

    def _is_streamed(self, name: str) -> bool:
        position, rest = blocks.place(self.prefix, name)
        return position in self.streamed and rest in self.streamed[position].empty

    def make_writable(self, position: int) -> None:
        """Let the base weights of a kept block be trained: private, resident whatever the holding, with gradients."""
        block = next(block for block in self.submodel.blocks if block.position == position)
        if streamed := self.streamed.pop(position, None):
            streamed.detach()
        path = self._source.path(block)
        module = self.block_modules[position]
        own = entries(path).keys() & dict(module.named_parameters()).keys()
        places = _places(module)
        for name, tensor in read_tensors(path, RESIDENT, _dtype(self.work), self.work.accelerator, names=own).items():
            _put(places, (name,), tensor, trainable=True)

    def close(self) -> None:
        """Let go of the frozen weights; what was trained stays whole for whoever still refers to it."""
        for streamed in self.streamed.values():
            streamed.detach()
        self.streamed = {}
        for parameter in self.model.parameters():
            parameter.grad = None
            if not parameter.requires_grad:
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        gc.collect()
        _return_free_pages()
        if self.work.accelerator == "cuda":
            torch.cuda.empty_cache()


def _return_free_pages() -> None:
    """Have the C library give freed weights back to the system; glibc keeps those below its mapping threshold."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


class Source:
    """Where the weights come from: files by hash, and who reads them."""

    def __init__(self, open_content: Callable[[str], Path], read: ReadWeights = read_tensors) -> None:
        self.open_content = open_content
        self.read = read

    def path(self, block: Block) -> Path:
        if block.content is None:
            raise ModelError(f"block {block.position} names no content: fill it in from the base model")
        return self.open_content(block.content)


def _nothing(content: str) -> Path:
    raise ModelError(f"content {content} was asked for, but this submodel is only an outline")


class Pruned(nn.Module):
    """What stands where a part was dropped; it has no weights."""


class AddsNothing(Pruned):
    """A part whose output is added to the residual stream outside it: a zero without memory."""

    def __init__(self, *, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *inputs: Any, **named: Any) -> Any:
        hidden = inputs[0] if inputs else named["hidden_states"]
        zero = hidden.new_zeros(()).expand(hidden.shape)
        return (zero, None) if self.attention else zero


class PassesResidual(Pruned):
    """A part that adds the residual stream and norms the sum itself (BERT): gives the stream back untouched."""

    def __init__(self, *, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if self.attention:
            return (inputs[0] if inputs else named["hidden_states"]), None
        return inputs[-1]


class PassesOn(Pruned):
    """A step before the last one of a dropped part, or its norm."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def _check_positions(submodel: Submodel, count: int) -> None:
    positions = submodel.positions
    if list(positions) != sorted(set(positions)) or not all(0 <= position < count for position in positions):
        raise ModelError(f"a submodel keeps some of the blocks 0…{count - 1} in their order, got {positions}")


def _cut(model: PreTrainedModel, anatomy: Anatomy, submodel: Submodel) -> None:
    kept = nn.ModuleList(anatomy.blocks[position] for position in submodel.positions)
    owner, _, name = anatomy.prefix.rpartition(".")
    setattr(model.get_submodule(owner), name, kept)
    for config in {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }.values():
        _cut_config(config, len(anatomy.blocks), submodel.positions)
    for block, module in zip(submodel.blocks, kept, strict=True):
        _prune(module, block, post_norm=anatomy.post_norm)


def _cut_config(config: PreTrainedConfig, count: int, positions: tuple[int, ...]) -> None:
    """The number of layers and every list with one item per layer follow the kept positions."""
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == count:
            setattr(config, name, [value[position] for position in positions])
    config.num_hidden_layers = len(positions)


def _prune(module: nn.Module, block: Block, *, post_norm: bool) -> None:
    parts = blocks.part_names(module, post_norm=post_norm)
    if not parts and not block.whole:
        raise ModelError(f"block {block.position} cannot be divided into attention and feed-forward: keep it whole")
    for part, names in parts.items():
        if part not in block.parts:
            prune_part(module, names, attention=part == ATTENTION, post_norm=post_norm)


def prune_part(block: nn.Module, names: tuple[str, ...], *, attention: bool, post_norm: bool) -> None:
    """Only the last step meets the residual stream; where norms stand behind sums, one inside it sums there too."""
    steps = [name for name in names if not blocks.is_norm(block.get_submodule(name))]
    sums_inside = post_norm and any(blocks.is_norm(module) for module in block.get_submodule(steps[-1]).modules())
    for name in names:
        setattr(block, name, PassesOn())
    last = PassesResidual if sums_inside else AddsNothing
    setattr(block, steps[-1], last(attention=attention))


def _make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give buffers that no checkpoint holds (rotary frequencies, position ids) their values, off the meta device."""
    for module in model.modules():
        own = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in own:
            module._buffers[name] = torch.empty_like(getattr(module, name), device=device)  # noqa: SLF001 -- no setter
        if own:
            model._init_weights(module)  # noqa: SLF001 -- Hugging Face's own values; parameters are still on meta


def _dtype(work: Workload) -> torch.dtype:
    return blocks.COMPUTE_DTYPES[work.dtype]


def _fill_outside(built: Built, path: Path, head: set[str]) -> dict[str, tuple[int, ...]]:
    """Read what lies outside the blocks; the parameters of a new head, which the file lacks, by shape."""
    stored = entries(path)
    work = built.work
    places = _places(built.model)
    holding = RESIDENT if work.holding == STREAMED else work.holding
    read = built._source.read(path, holding, _dtype(work), work.accelerator, names=list(stored))  # noqa: SLF001 -- its maker
    buffers, filled = blocks.stored_buffers(built.model).keys(), {}
    new = {}
    for names, shape in checkpoint.wanted(built.model):
        if blocks.place(built.prefix, names[0])[0] is not None:
            continue
        if names[0] in stored:
            value = _fitting(path, names[0], read[names[0]], shape)
            if names[0] in buffers:
                filled[names[0]] = value
            else:
                _put(places, names, value)
        elif names[0] in head:
            new[names[0]] = shape
        else:
            raise ModelError(f"{path} lacks {names[0]}: it is not the outside part of this model")
    blocks.fill_buffers(built.model, filled)
    return new


def _fitting(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ModelError(f"{path}: {name} has the shape {tuple(tensor.shape)}, expected {shape}")
    return tensor


_Places = dict[str, tuple[nn.Module, str]]


def _places(model: nn.Module) -> _Places:
    """The module and attribute behind every parameter name."""
    return {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def _put(places: _Places, names: tuple[str, ...], tensor: Tensor, *, trainable: bool = False) -> None:
    """Put one tensor under all its names: tied weights stay one."""
    parameter = nn.Parameter(tensor, requires_grad=trainable)
    for name in names:
        module, own = places[name]
        module.register_parameter(own, parameter)


def _make_head(
    built: Built, config: Mapping[str, Any], new: Mapping[str, tuple[int, ...]], seed: int, *, trainable: bool
) -> None:
    places = _places(built.model)
    for name, value in checkpoint.new_head(config, new, seed).items():
        _put(places, (name,), value.to(built.work.accelerator, _dtype(built.work)), trainable=trainable)


def _fill_block(built: Built, block: Block, work: Workload) -> None:
    source = built._source  # noqa: SLF001 -- its maker
    path = source.path(block)
    module = built.block_modules[block.position]
    stored = entries(path)
    wanted = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    buffers = {name: tuple(buffer.shape) for name, buffer in blocks.stored_buffers(module).items()}
    wrong = [name for name, shape in {**wanted, **buffers}.items() if name not in stored or stored[name].shape != shape]
    if wrong:
        raise ModelError(f"{path}: {wrong[0]} of block {block.position} is missing or has another shape")
    if buffers:  # they are few and written to: never streamed or mapped
        read = source.read(path, RESIDENT, _dtype(work), work.accelerator, names=list(buffers))
        blocks.fill_buffers(module, read)
    places = _places(module)
    if work.holding != STREAMED and not block.streamed:
        read = source.read(path, work.holding, _dtype(work), work.accelerator, names=list(wanted))
        for name, tensor in read.items():
            _put(places, (name,), tensor)
        return
    built.streamed[block.position] = StreamedBlock(module, path, _dtype(work), work.accelerator)


def _read_ahead(built: Built) -> None:
    """While a block that its method streams computes, the next such block is read."""
    chosen = [block.position for block in built.submodel.blocks if block.streamed]
    for position, following in pairwise(chosen):
        built.streamed[position].read_ahead(built.streamed[following])


def _check_filled(model: nn.Module) -> None:
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise ModelError(f"{type(model).__name__}: {empty[0]} was given no value")


def prepare(built: Built) -> None:
    """Train mode, and gradient checkpointing where the workload asks for it (ModelError where a model has none)."""
    built.model.train()
    if built.work.checkpointing:
        if not built.model.supports_gradient_checkpointing:
            raise ModelError(
                f"a {built.shape.architecture} model cannot recompute its blocks: leave out --checkpointing"
            )
        enable = getattr(built.model, "activation_checkpointing_enable", built.model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        built.model.disable_input_require_grads()  # else the backward pass would run down to the embeddings
        for streamed in built.streamed.values():
            streamed.enable_checkpointing()
