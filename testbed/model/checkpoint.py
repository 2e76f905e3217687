"""A base model, block by block: a Hugging Face folder split once into content-addressed files.

A folder of an image model may hold no weights: then they are drawn (testbed.model.image_weights), and kept likewise.

Every block is one file whose tensors are named relative to the block, so that equal weights at different positions
are one content; everything outside the blocks (embeddings, final norm, head) is another, with canonical names: those
of the original full model, at the original position.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from testbed.errors import ModelError
from testbed.method import IMAGE_CLASSIFICATION, RESIDENT, ModelShape, Submodel
from testbed.model import blocks, initial, tensorfile
from testbed.model.content import ContentStore
from testbed.model.image_weights import initial_value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from testbed.model.tensorfile import Entry

__all__ = ["BaseModel", "ContentStore", "new_head"]

_FORMAT = 1  # of the split, of drawn weights and of the cache
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt"}
_OLDER_VIT = {
    "vit.layers.": "vit.encoder.layer.",
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


@dataclass(frozen=True)
class BaseModel:
    """A base model whose weights lie in a content store."""

    folder: Path
    store: ContentStore
    task: str
    labels: int
    config: dict[str, Any]  # as the folder states it
    shape: ModelShape
    blocks: tuple[str, ...]  # content of the block at each position
    outside: str  # content of embeddings, final norm and head
    config_hash: str
    head: Mapping[str, tuple[int, ...]]  # new parameters that the checkpoint lacks: canonical name and shape

    @classmethod
    def open(cls, folder: Path, store: ContentStore, task: str, labels: int) -> BaseModel:
        """Split a Hugging Face folder (config.json, model.safetensors or its shards) for a task.

        An image model without any weights gets initial ones, the same for the same configuration.
        Holds a few MiB at a time; a folder that has not changed since is not read again.
        Raises ModelError naming the file that is missing, unreadable, quantised or not of the configured model.
        """
        config = read_config(folder)
        skeleton = blocks.skeleton(config, task, labels, "float32")
        split = _cached_split(folder, store, skeleton, task, labels)
        head = {name: tuple(size) for name, size in split["head"].items()}
        shape = blocks.shape_of(skeleton, config, split["stored_dtype"], head)
        config_hash = store.put_bytes(json.dumps(config, sort_keys=True).encode())
        return cls(
            folder, store, task, labels, config, shape, tuple(split["blocks"]), split["outside"], config_hash, head
        )

    def tensors(self, content: str) -> dict[str, Tensor]:
        """The tensors of a block (or of the outside) as stored, by the names in that file."""
        return tensorfile.read_tensors(self.store.path(content), RESIDENT)

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Keep a new block, its tensors named relative to the block; the hash of its content."""
        return tensorfile.put_tensors(self.store, tensors)

    def fill_in(self, submodel: Submodel) -> Submodel:
        """The same submodel, with the base model's own content where a block names none."""
        filled = (replace(block, content=block.content or self.blocks[block.position]) for block in submodel.blocks)
        return replace(submodel, blocks=tuple(filled))

    def new_head(self, seed: int) -> dict[str, Tensor]:
        """Initial values of the parameters that the checkpoint lacks, float32, by canonical name."""
        return new_head(self.config, self.head, seed)


def new_head(config: Mapping[str, Any], head: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Initial values of a new head; the same everywhere for the same seed."""
    spread = config.get("initializer_range") or 0.02
    return {name: initial.head(shape, spread, seed, name) for name, shape in head.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.  Raises ModelError when it is missing or unreadable."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): expected a Hugging Face model folder") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{path} names no model_type: expected a Hugging Face model folder")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.  Raises ModelError where there are none, or a shard is missing."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(f"{folder} has no model.safetensors: save the model with save_pretrained, which writes it")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} cannot be read ({error}): download or copy it again") from error
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}, named in {index.name}: download or copy them again")
    return [folder / name for name in shards]


def _cached_split(folder: Path, store: ContentStore, model: PreTrainedModel, task: str, labels: int) -> dict[str, Any]:
    drawn = task == IMAGE_CLASSIFICATION and not _has_weights(folder)
    files = [] if drawn else weight_files(folder)
    cache = store.folder / f"split-{_key(folder, files, task, labels)}.json"
    try:
        split: dict[str, Any] = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        split = {}
    if split and all(store.has(content) for content in [*split["blocks"], split["outside"]]):
        return split
    split = _drawn(store, model, task) if drawn else _split(_Stored(folder, files, model), store, model, task)
    draft = cache.with_suffix(f".{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}")
    draft.write_text(json.dumps(split), encoding="utf-8")
    draft.replace(cache)
    return split


def _has_weights(folder: Path) -> bool:
    """Of whatever format: weights that cannot be read are no reason to draw others."""
    return any(path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json") for path in folder.iterdir())


def _key(folder: Path, files: list[Path], task: str, labels: int) -> str:
    states = [(path, path.stat()) for path in [folder / "config.json", *files]]
    stamps = [f"{path.resolve()}:{state.st_mtime_ns}:{state.st_size}" for path, state in states]
    return hashlib.sha256("\n".join([f"{_FORMAT}:{task}:{labels}", *stamps]).encode()).hexdigest()


def _split(found: _Stored, store: ContentStore, model: PreTrainedModel, task: str) -> dict[str, Any]:
    anatomy = blocks.find(model)
    of_block: dict[int, dict[str, Entry]] = defaultdict(dict)
    outside: dict[str, Entry] = {}
    head: dict[str, tuple[int, ...]] = {}
    behind = blocks.head_names(model, anatomy, task)
    for names, shape in wanted(model):
        entry = found.entry(names, shape, optional=names[0] in behind)
        position, rest = blocks.place(anatomy.prefix, names[0])
        if entry is None:
            head[names[0]] = shape
        elif position is None:
            outside[names[0]] = entry
        else:
            of_block[position][rest] = entry
    contents = [tensorfile.put_entries(store, of_block[position]) for position in range(len(anatomy.blocks))]
    stored = next(iter(of_block[0].values())).dtype
    return {
        "blocks": contents,
        "outside": tensorfile.put_entries(store, outside),
        "head": head,
        "stored_dtype": _STORED_DTYPES[stored],
    }


def _drawn(store: ContentStore, model: PreTrainedModel, task: str) -> dict[str, Any]:
    """The split of a model that has no weights yet; one block at a time is in memory."""
    anatomy = blocks.find(model)
    behind = blocks.head_names(model, anatomy, task)
    named: dict[int | None, dict[str, str]] = defaultdict(dict)
    for names, _ in wanted(model):
        position, rest = blocks.place(anatomy.prefix, names[0])
        named[position][rest] = names[0]
    head = {name: list(model.get_parameter(name).shape) for name in named[None] if name in behind}
    outside = {name: name for name in named[None] if name not in behind}

    def put(names: Mapping[str, str]) -> str:
        return tensorfile.put_tensors(store, {rest: initial_value(model, name) for rest, name in names.items()})

    return {
        "blocks": [put(named[position]) for position in range(len(anatomy.blocks))],
        "outside": put(outside),
        "head": head,
        "stored_dtype": "float32",
    }


def wanted(model: PreTrainedModel) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Every stored tensor of a model once: its names (several when tied, the first is the canonical one), its shape."""
    aliases: dict[int, list[str]] = defaultdict(list)
    shapes = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases[id(tensor)].append(name)
        shapes[id(tensor)] = tuple(tensor.shape)
    for key, names in aliases.items():
        yield tuple(names), shapes[key]


class _Stored:
    """The tensors of a checkpoint, found under the names that savers of several generations gave them."""

    def __init__(self, folder: Path, files: list[Path], model: PreTrainedModel) -> None:
        self.folder = folder
        self.prefix = f"{model.base_model_prefix}."
        self.counters = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
        self.tensors: dict[str, Entry] = {}
        for path in files:
            self.tensors |= {_modern(name): entry for name, entry in tensorfile.entries(path).items()}

    def entry(self, names: tuple[str, ...], shape: tuple[int, ...], *, optional: bool) -> Entry | None:
        """The tensor stored under one of its names; None only for an optional one."""
        found = [self.tensors[name] for name in self._candidates(names) if name in self.tensors]
        fitting = [entry for entry in found if entry.shape == shape]
        if fitting:
            return fitting[0] if names[0] in self.counters else _floating(fitting[0])
        if optional:
            return None
        stored = f"it has the shape {found[0].shape}" if found else "it is not there"
        raise ModelError(
            f"{self.folder}: the configuration asks for {names[0]} with the shape {shape}, but {stored}:"
            " config.json and the weights do not belong together"
        )

    def _candidates(self, names: tuple[str, ...]) -> Iterator[str]:
        """A bare model's checkpoint lacks the prefix that the task's model puts before its backbone."""
        for name in names:
            for known in (name, _older_vit(name)):
                yield known
                yield known.removeprefix(self.prefix)


def _modern(name: str) -> str:
    """BERT's oldest checkpoints call a norm's weight and bias gamma and beta."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{ {'gamma': 'weight', 'beta': 'bias'}.get(last, last) }" if stem else name


def _older_vit(name: str) -> str:
    """Under which name a ViT's checkpoint has a tensor: savers keep those of transformers 4."""
    for ours, theirs in _OLDER_VIT.items():
        name = name.replace(ours, theirs)
    return name


def _floating(entry: Entry) -> Entry:
    if entry.dtype not in _STORED_DTYPES:
        raise ModelError(
            f"{entry.path}: {entry.name} is stored as {entry.dtype}: quantised checkpoints (int8, int4) are not"
            " supported, use the float32 or bfloat16 original"
        )
    return entry
