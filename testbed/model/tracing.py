"""What a submodel's passes allocate, tensor by tensor, found by running them on fake tensors: nothing is allocated.

The model is the very one that a job builds (same skeleton, same cut, same adapters), its tensors have shapes and no
values, and every operator's outputs are counted while anything, autograd included, still refers to them.  So the
structure (what each architecture's norms, gates, attention and loss save) is read off the real code.  Blocks of one
kind behave alike: one of each is traced, after the first ones, which differ.
"""

from __future__ import annotations

import json
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from testbed.method import IMAGE_CLASSIFICATION, Block, Outfit, Phase, Submodel, Workload
from testbed.model import blocks
from testbed.model import submodel as building
from testbed.task import Batch, blank_batch, inputs, logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

PAGE_BYTES = 4096
#: An allocation of at least this size has pages of its own: testbed.node.runtime sets the allocator so.
MMAP_THRESHOLD_BYTES = 1 << 16
_CHUNK_HEAD_BYTES = 80  # what glibc adds to an aligned allocation


@dataclass(frozen=True)
class Section:
    """A stretch of a pass: `kept` bytes stay when it ends (negative: freed), at most `peak` above its start live."""

    kept: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Weights:
    """Bytes of the parameters of a block, or of all that lies outside the blocks."""

    frozen: int = 0
    adapters: int = 0  # parameters that a method mounted
    trained: int = 0  # every parameter that has a gradient, mounted ones included
    trained_elements: int = 0
    largest_trained: int = 0  # the largest of them
    largest_frozen: int = 0


@dataclass(frozen=True)
class BlockTrace:
    weights: Weights
    forward: Section
    backward: Section


@dataclass(frozen=True)
class Trace:
    """The passes of a submodel in the order of time: before, blocks forward, head, head backward, blocks backward."""

    outside: Weights
    before: Section  # embeddings, positions, masks
    blocks: tuple[BlockTrace, ...]  # the first of each kind, in order
    head: Section
    head_backward: Section
    kinds: tuple[str, ...]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the bytes of all storages that operators have made and that somebody still refers to."""

    def __init__(self, granule: Callable[[int], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.live = 0
        self._peak = 0
        self._start = 0
        self._granule = granule
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return made

    def known(self, tensor: Tensor) -> None:
        """Do not count a tensor that was there before."""
        storage = tensor.untyped_storage()
        self._seen[storage._cdata] = weakref.ref(storage)  # noqa: SLF001 -- a storage's only identity

    def section(self) -> Section:
        """What happened since the last call."""
        ended = Section(self.live - self._start, self._peak - self._start)
        self._start = self._peak = self.live
        return ended

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # noqa: SLF001 -- a storage's only identity
        if key in self._seen and self._seen[key]() is not None:
            return
        size = self._granule(storage.nbytes())
        self._seen[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.live += size
        self._peak = max(self._peak, self.live)

    def _drop(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.live -= size


def cpu_granule(size: int) -> int:
    """Resident bytes of one allocation on the CPU."""
    if size < MMAP_THRESHOLD_BYTES:
        return size
    return -(-(size + _CHUNK_HEAD_BYTES) // PAGE_BYTES) * PAGE_BYTES


def cuda_granule(size: int) -> int:
    """Bytes that the caching allocator hands out for one allocation on the GPU."""
    return -(-size // 512) * 512


def trace(phase: Phase, config: Mapping[str, Any], work: Workload) -> Trace:
    """The trace of a phase; remembered for every phase whose blocks are of the same kinds."""
    text = _text(phase.config or config)
    names = kinds(phase, text, work)
    chosen = tuple(block for index, block in enumerate(phase.blocks) if names[index] not in names[:index])
    return _trace(
        text,
        _Passes(
            work.task, work.labels, work.dtype, work.checkpointing, work.accelerator,
            phase.batch_size, phase.length, phase.backward, phase.head, phase.trained_elements > 0, phase.outfit,
            tuple(position for position in phase.writable if any(block.position == position for block in chosen)),
            phase.outside_writable,
        ),
        tuple(Block(block.position, None, block.parts) for block in chosen),
        tuple(dict.fromkeys(names)),
    )  # fmt: skip


def kinds_of(phase: Phase, config: Mapping[str, Any], work: Workload) -> tuple[str, ...]:
    """The kind of each block of the phase: `Trace.kinds` says which of the traced blocks stands for it."""
    return kinds(phase, _text(phase.config or config), work)


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True, default=str)


def kinds(phase: Phase, config: str, work: Workload) -> tuple[str, ...]:
    """A word for each block of the phase; blocks with the same word allocate alike.

    The first two, and the first two that are trained, have words of their own: below those nothing needs a gradient,
    and what goes into the very first block stays (a block's input is let go of while the next one runs).
    """
    known = _block_kinds(config, work.task, work.labels)
    words = []
    below = 0
    for index, block in enumerate(phase.blocks):
        adapted = phase.outfit is not None and phase.outfit.trains(block.position)
        written = block.position in phase.writable
        own = f"{known[block.position]} {'+'.join(sorted(block.parts))} {adapted} {written}"
        words.append(f"{own} {min(index, 2)} {min(below, 2)}")
        below += adapted or written
    return tuple(words)


@lru_cache(maxsize=32)
def _block_kinds(config: str, task: str, labels: int) -> tuple[str, ...]:
    """What distinguishes the blocks of a model: parameter shapes, and the kind of layer where the model has several."""
    model = blocks.skeleton(json.loads(config), task, labels, "float32")
    listed = vars(model.config.get_text_config()).get("layer_types")  # a ResNet's class names those that there are
    shapes: dict[str, int] = {}
    found = []
    for index, block in enumerate(blocks.find(model).blocks):
        layer = f"{[(name, tuple(value.shape)) for name, value in block.named_parameters()]}"
        found.append(f"{shapes.setdefault(layer, len(shapes))}{listed[index] if listed else ''}")
    return tuple(found)


@dataclass(frozen=True)
class _Passes:
    """All that a trace depends on beside model and blocks."""

    task: str
    labels: int
    dtype: str
    checkpointing: bool
    accelerator: str
    batch_size: int
    length: int
    backward: bool
    head: bool
    train_head: bool
    outfit: Outfit | None
    writable: tuple[int, ...]
    outside_writable: bool


@lru_cache(maxsize=512)
def _trace(config: str, passes: _Passes, kept: tuple[Block, ...], names: tuple[str, ...]) -> Trace:
    plain = json.loads(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        built, mounted = _fake(plain, passes, Submodel(kept))
        granule = cuda_granule if passes.accelerator == "cuda" else cpu_granule
        counter = LiveBytes(granule)
        for tensor in [*built.model.parameters(), *built.model.buffers()]:
            counter.known(tensor)
        sections = _run(built, passes, counter)
    count = len(kept)
    weights = [_sum(module.parameters(), mounted) for module in built.block_modules.values()]
    forward = sections.forward
    backward = [Section()] * (count - len(sections.backward)) + sections.backward  # the lowest may need none
    return Trace(
        _sum(_outside(built), mounted),
        sections.before,
        tuple(BlockTrace(*of) for of in zip(weights, forward, backward, strict=True)),
        sections.head,
        sections.head_backward,
        names,
    )


def _fake(config: Mapping[str, Any], passes: _Passes, submodel: Submodel) -> tuple[building.Built, set[int]]:
    """The model as `testbed.model.submodel.build` makes it, on fake tensors, and the ids of what a method mounted."""
    work = Workload(task=passes.task, labels=passes.labels, dtype=passes.dtype, checkpointing=passes.checkpointing)
    built, head = building.outline(config, submodel, work)
    _fill(built, head if passes.train_head else set(), passes.writable, outside=passes.outside_writable)
    own = {id(parameter) for parameter in built.model.parameters()}
    if passes.outfit is not None:
        passes.outfit.mount(built)
    building.prepare(built)
    return built, {id(parameter) for parameter in built.model.parameters()} - own


def _fill(built: building.Built, head: set[str], writable: tuple[int, ...], *, outside: bool) -> None:
    """Give every parameter a fake value, tied ones the same."""
    made: dict[int, nn.Parameter] = {}
    opened = {f"{built.prefix}.{built.submodel.positions.index(position)}." for position in writable}
    for name, parameter in list(built.model.named_parameters(remove_duplicate=False)):
        trained = name in head or any(name.startswith(prefix) for prefix in opened)
        trained = trained or (outside and not name.startswith(f"{built.prefix}."))
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), trained)
        path, _, own = name.rpartition(".")
        built.model.get_submodule(path).register_parameter(own, made[id(parameter)])


def _outside(built: building.Built) -> list[nn.Parameter]:
    return [value for name, value in built.model.named_parameters() if not name.startswith(f"{built.prefix}.")]


def _sum(parameters: Iterable[nn.Parameter], mounted: set[int]) -> Weights:
    """The bytes of some parameters, `mounted` being the ids of those that a method brought."""
    every = list(parameters)
    trained = [value for value in every if value.requires_grad]
    frozen = [value.nbytes for value in every if id(value) not in mounted]
    return Weights(
        frozen=sum(frozen),
        adapters=sum(value.nbytes for value in every if id(value) in mounted),
        trained=sum(value.nbytes for value in trained),
        trained_elements=sum(value.numel() for value in trained),
        largest_trained=max((value.nbytes for value in trained), default=0),
        largest_frozen=max(frozen, default=0),
    )


class _Sections:
    """The sections of a pass as they end, in the order of time."""

    def __init__(self, counter: LiveBytes) -> None:
        self._counter = counter
        self.before = self.head = self.head_backward = Section()
        self.forward: list[Section] = []
        self.backward: list[Section] = []
        self.forward_over = False  # with checkpointing, blocks are entered and left once more in the backward pass

    def entered(self) -> None:
        """The first block is entered."""
        self.before = self._counter.section()

    def left(self) -> None:
        """A block is left; the model lets go of what went into it only in the next section."""
        self.forward.append(self._counter.section())

    def computed(self) -> None:
        self.forward_over = True
        self.head = self._counter.section()

    def gradient_arrived(self, *, last: bool) -> None:
        """The gradient of a block's output is there: the section above it has ended."""
        section = self._counter.section()
        if last:
            self.head_backward = section
        else:
            self.backward.insert(0, section)

    def ended(self) -> None:
        self.backward.insert(0, self._counter.section())


def _run(built: building.Built, passes: _Passes, counter: LiveBytes) -> _Sections:
    sections = _Sections(counter)
    batch = _batch(built, passes)
    with _watched(list(built.block_modules.values()), sections), counter:
        if not passes.backward:
            with torch.no_grad():
                made = logits(built.model, batch) if passes.head else _backbone(built, batch)
            sections.computed()
            del made
            return sections
        value = built.loss(batch) if passes.outfit is None else passes.outfit.loss(built, batch)
        sections.computed()
        torch.autograd.backward(value)
        sections.ended()
    return sections


def _backbone(built: building.Built, batch: Batch) -> Any:
    return built.model.base_model(**inputs(built.model, batch))


def _batch(built: building.Built, passes: _Passes) -> Batch:
    shape = blocks.image_shape(built.model.config) if passes.task == IMAGE_CLASSIFICATION else ()
    return blank_batch(passes.task, passes.batch_size, passes.length, shape)


@contextmanager
def _watched(modules: list[nn.Module], sections: _Sections) -> Iterator[None]:
    """Report when each block is entered and left, and when the gradient of its output arrives."""
    handles = [modules[0].register_forward_pre_hook(_entering(sections))]
    last = len(modules) - 1
    handles += [
        module.register_forward_hook(_leaving(sections, last=index == last)) for index, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(sections: _Sections) -> Callable[..., None]:
    return lambda *_: None if sections.forward_over else sections.entered()


def _leaving(sections: _Sections, *, last: bool) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if sections.forward_over:
            return
        sections.left()
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: sections.gradient_arrived(last=last))

    return hook
