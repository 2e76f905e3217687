"""What is learned: examples, shards, batches, loss and quality.

Used on the node and on the controller; torch, numpy and safetensors are imported inside functions only, and no
tokenizer is needed.  A *shard* is one safetensors file with one client's examples.  Of texts:

    input_ids   int32 (tokens,)         all examples, one after another
    offsets     int64 (examples + 1,)   example i is input_ids[offsets[i] : offsets[i + 1]]
    labels      int64 (examples,)       sequence classification: the class of each
    loss_from   int64 (examples,)       causal LM: index of the first token whose prediction counts

Of images:

    pixel_values   uint8 (examples, channels, height, width)
    labels         int64 (examples,)      the class of each
    mean, std      float32 (channels,)    a model is fed (pixel / 255 − mean) / std
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import DataError, WireError
from testbed.method import CAUSAL_LM, IMAGE_CLASSIFICATION, SEQUENCE_CLASSIFICATION

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

TASKS = (SEQUENCE_CLASSIFICATION, CAUSAL_LM, IMAGE_CLASSIFICATION)
#: The label of a position whose prediction does not count (the value that torch's cross entropy skips).
NOT_COUNTED = -100
#: Name of the per-example integers in a shard, by task.
_TARGETS = {SEQUENCE_CLASSIFICATION: "labels", CAUSAL_LM: "loss_from", IMAGE_CLASSIFICATION: "labels"}
_FORMAT = 1
_BRIGHTEST = 255  # the highest value of a pixel


@dataclass(frozen=True)
class Example:
    """One text as tokens, or one image.

    `label`: its class; `loss_from`: first token whose prediction counts (causal LM); `pixels`: (channels, height,
    width).
    """

    ids: Sequence[int] = ()
    label: int | None = None
    loss_from: int = 1
    pixels: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of the pixels of some images, channel by channel, with black at 0 and white at 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Sequence[NDArray[np.uint8]]) -> Scale:
        """Summed as integers: the same on every machine.  A channel that never changes has the deviation 1."""
        import numpy as np

        count = sum(image[0].size for image in images)
        sums = sum(image.sum((1, 2), np.int64) for image in images)
        squares = sum((image.astype(np.int64) ** 2).sum((1, 2)) for image in images)
        mean = sums / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return cls(
            tuple((mean / _BRIGHTEST).tolist()), tuple((np.where(std > 0, std, _BRIGHTEST) / _BRIGHTEST).tolist())
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model is fed.  Texts are right-padded, and all int64; images have pixels in place of tokens.

    input_ids, attention_mask   (examples, width); a mask of None: no text is padded
    labels                      (examples,) classes; causal LM: (examples, width), NOT_COUNTED where no loss is taken
    pixel_values                float32 (examples, channels, height, width)
    """

    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    pixel_values: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens without the padding; an image counts as one."""
        if self.attention_mask is not None:
            return int(self.attention_mask.sum())
        return len(self.labels) if self.input_ids is None else self.input_ids.numel()

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class Quality:
    """How good a model is: mean cross entropy in nats (per example, or per counted token), share of right answers."""

    loss: float
    accuracy: float
    examples: int


@dataclass(frozen=True, eq=False)
class Shard(ABC):
    """One client's examples in private memory; `targets` are the classes or, for a causal LM, `loss_from`."""

    task: str
    labels: int  # number of classes; 0 for a causal LM
    targets: NDArray[np.int64]

    @staticmethod
    def of(examples: Sequence[Example], task: str, labels: int = 0, scale: Scale | None = None) -> Shard:
        """Put examples into one shard; `scale` is of images (None: these images' own).

        DataError when there are none, or one has no token, no pixels of the others' shape, or no valid label.
        """
        _check_examples(examples, task, labels)
        if task == IMAGE_CLASSIFICATION:
            return ImageShard.of_images(examples, labels, scale)
        return TextShard.of_texts(examples, task, labels)

    @staticmethod
    def open(path: Path) -> Shard:
        """Read a shard file.  WireError when it is not one, is damaged, or its arrays do not belong together."""
        about, arrays = _read_arrays(path)
        try:
            task, labels = about["task"], int(about["labels"])
            targets = arrays[_TARGETS[task]]
            kind = ImageShard if task == IMAGE_CLASSIFICATION else TextShard
            shard = kind.from_arrays(task, labels, targets, arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"shard {path}: task, label count or an array is missing or wrong ({error!r})") from None
        shard.check(path)
        return shard

    def save(self, path: Path) -> str:
        """Write the file, whole or not at all, and return the SHA-256 of its bytes (equal for equal shards)."""
        from safetensors.numpy import save

        # One metadata entry only: the format does not fix the order of several, and the bytes are hashed.
        about = json.dumps({"format": _FORMAT, "task": self.task, "labels": self.labels})
        content = save({**self.arrays(), _TARGETS[self.task]: self.targets}, metadata={"shard": about})
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(path)
        return hashlib.sha256(content).hexdigest()

    @abstractmethod
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the file holds beside the targets."""

    @abstractmethod
    def check(self, path: Path) -> None:
        """Raise WireError when the arrays do not belong together."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens of each example; an image counts as one."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def label_counts(self) -> tuple[int, ...]:
        """Examples of each class; empty for a causal LM."""
        import numpy as np

        if self.task == CAUSAL_LM:
            return ()
        return tuple(np.bincount(self.targets, minlength=self.labels).tolist())

    @abstractmethod
    def batch(self, indices: Sequence[int], length: int, pad_id: int, *, exact: bool = False) -> Batch:
        """The named examples, cut to `length` tokens and padded to the longest of them (`exact`: to `length`).

        Images are of one size: length and padding mean nothing to them.
        """


@dataclass(frozen=True, eq=False)
class TextShard(Shard):
    """Texts as tokens, one after another."""

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @classmethod
    def of_texts(cls, examples: Sequence[Example], task: str, labels: int) -> TextShard:
        import numpy as np

        lengths = [0, *(len(example.ids) for example in examples)]
        flat = np.fromiter((token for example in examples for token in example.ids), np.int32, sum(lengths))
        return cls(task, labels, _targets(examples, task), flat, np.cumsum(lengths, dtype=np.int64))

    @classmethod
    def from_arrays(cls, task: str, labels: int, targets: NDArray[Any], arrays: dict[str, NDArray[Any]]) -> TextShard:
        return cls(task, labels, targets, arrays["input_ids"], arrays["offsets"])

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"input_ids": self.input_ids, "offsets": self.offsets}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> list[int]:
        return [int(stop - start) for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def batch(self, indices: Sequence[int], length: int, pad_id: int, *, exact: bool = False) -> Batch:
        import numpy as np
        import torch

        rows = [self._row(index, length) for index in indices]
        width = length if exact else max(len(row) for row in rows)
        input_ids = np.full((len(rows), width), pad_id, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for place, row in enumerate(rows):
            input_ids[place, : len(row)] = row
            mask[place, : len(row)] = 1
        labels = self._labels(indices, input_ids, mask)
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(mask), torch.from_numpy(labels))

    def _row(self, index: int, length: int) -> NDArray[np.int32]:
        import numpy as np

        row = self.input_ids[self.offsets[index] : self.offsets[index + 1]]
        if len(row) > length and self.task == SEQUENCE_CLASSIFICATION:
            return np.concatenate([row[: length - 1], row[-1:]])  # the closing token is what decoders classify by
        return row[:length]

    def _labels(self, indices: Sequence[int], ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.int64]:
        import numpy as np

        targets = self.targets[list(indices)]
        if self.task == SEQUENCE_CLASSIFICATION:
            return targets
        counted = (mask == 1) & (np.arange(ids.shape[1]) >= targets[:, None])
        return np.where(counted, ids, NOT_COUNTED)

    def check(self, path: Path) -> None:
        ids, offsets, of_each = self.input_ids, self.offsets, self.targets
        kinds = (ids.dtype.str, offsets.dtype.str, of_each.dtype.str)
        if kinds != ("<i4", "<i8", "<i8") or not ids.ndim == offsets.ndim == of_each.ndim == 1:
            raise WireError(f"shard {path}: expected flat int32 tokens and int64 offsets and targets, got {kinds}")
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(ids) or (offsets[1:] <= offsets[:-1]).any():
            raise WireError(f"shard {path}: the offsets do not divide {len(ids)} tokens into examples")
        if len(of_each) != len(self):
            raise WireError(f"shard {path}: {len(self)} examples, but {len(of_each)} {_TARGETS[self.task]}")
        classes = self.task == SEQUENCE_CLASSIFICATION
        if (ids < 0).any() or (of_each < 0).any() or (classes and (of_each >= self.labels).any()):
            raise WireError(f"shard {path}: a token or a {_TARGETS[self.task]} value is out of range")


@dataclass(frozen=True, eq=False)
class ImageShard(Shard):
    """Images of one size, as pixels; they are scaled when a batch is made, because so they take a quarter of it."""

    pixel_values: NDArray[np.uint8]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @classmethod
    def of_images(cls, examples: Sequence[Example], labels: int, scale: Scale | None) -> ImageShard:
        import numpy as np

        images = [example.pixels for example in examples if example.pixels is not None]
        known = scale or Scale.of(images)
        mean, std = np.array(known.mean, np.float32), np.array(known.std, np.float32)
        return cls(IMAGE_CLASSIFICATION, labels, _targets(examples, IMAGE_CLASSIFICATION), np.stack(images), mean, std)

    @classmethod
    def from_arrays(cls, task: str, labels: int, targets: NDArray[Any], arrays: dict[str, NDArray[Any]]) -> ImageShard:
        return cls(task, labels, targets, arrays["pixel_values"], arrays["mean"], arrays["std"])

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"pixel_values": self.pixel_values, "mean": self.mean, "std": self.std}

    def __len__(self) -> int:
        return len(self.pixel_values)

    @cached_property
    def lengths(self) -> list[int]:
        return [1] * len(self)

    def batch(self, indices: Sequence[int], length: int, pad_id: int, *, exact: bool = False) -> Batch:  # noqa: ARG002 -- of texts
        import numpy as np
        import torch

        chosen = list(indices)
        bright = self.pixel_values[chosen].astype(np.float32) / np.float32(_BRIGHTEST)
        scaled = (bright - self.mean[:, None, None]) / self.std[:, None, None]
        return Batch(None, None, torch.from_numpy(self.targets[chosen]), torch.from_numpy(scaled))

    def check(self, path: Path) -> None:
        import numpy as np

        pixels, labels, mean, std = self.pixel_values, self.targets, self.mean, self.std
        kinds = (pixels.dtype.str, labels.dtype.str, mean.dtype.str, std.dtype.str)
        if kinds != ("|u1", "<i8", "<f4", "<f4") or pixels.ndim != 4 or labels.ndim != 1 or not pixels.size:
            raise WireError(f"shard {path}: expected uint8 images, int64 labels, float32 mean and std, got {kinds}")
        if not mean.shape == std.shape == pixels.shape[1:2] or not np.isfinite(mean).all() or not (std > 0).all():
            raise WireError(f"shard {path}: mean and std do not scale images of {pixels.shape[1]} channels")
        if len(labels) != len(pixels):
            raise WireError(f"shard {path}: {len(pixels)} examples, but {len(labels)} labels")
        if (labels < 0).any() or (labels >= self.labels).any():
            raise WireError(f"shard {path}: a labels value is out of range")


def write_shard(path: Path, examples: Sequence[Example], task: str, labels: int = 0) -> str:
    """Write one client's examples and return the SHA-256 of the file.  DataError when they are no shard."""
    return Shard.of(examples, task, labels).save(path)


def batch_indices(shard_len: int, batch_size: int, seed: int, round_index: int, client: int, step: int) -> list[int]:
    """Examples of local step `step` (from 0 in every round): one shuffled pass over the shard after the other.

    Pure integers and the same on every machine.  A shard smaller than a batch gives all of its examples.
    """
    size = min(batch_size, shard_len)
    passes = (divmod(position, shard_len) for position in range(step * size, (step + 1) * size))
    return [_pass(shard_len, seed, round_index, client, number)[place] for number, place in passes]


def shuffled(count: int, *key: object) -> list[int]:
    """Permutation of range(count) drawn from `key`: the same on every machine and Python version.

    Only `Random.random` is promised to stay the same between Python versions, so shuffle and sample are not used.
    """
    draw = random.Random("/".join(map(str, key))).random
    keys = [draw() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def blank_batch(task: str, batch_size: int, length: int, image_shape: Sequence[int] = ()) -> Batch:
    """A batch of nothing in particular, to trace a model's passes on; `image_shape`: channels, height, width.

    It has padding, as batches of more than one text have; a single text needs none.
    """
    import torch

    if task == IMAGE_CLASSIFICATION:
        pixels = torch.zeros((batch_size, *image_shape), dtype=torch.float32)
        return Batch(None, None, torch.zeros(batch_size, dtype=torch.int64), pixels)
    size = (batch_size, length)
    mask = torch.ones(size, dtype=torch.int64) if batch_size > 1 else None
    labels = torch.zeros(size if task == CAUSAL_LM else size[:1], dtype=torch.int64)
    return Batch(torch.zeros(size, dtype=torch.int64), mask, labels)


def inputs(model: Any, batch: Batch) -> dict[str, torch.Tensor | None]:
    """What the forward of a model, or of its backbone, is called with; pixels are of the type it computes in."""
    if batch.pixel_values is not None:
        return {"pixel_values": batch.pixel_values.to(model.dtype)}
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def logits(model: Any, batch: Batch) -> torch.Tensor:
    """fp32 logits of the model's own forward (fp64 of an fp64 model).

    (examples, classes), or (examples, width, vocabulary).
    """
    import torch

    # A key-value cache is of no use here and would hold the keys and values of every block.
    options = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    found: torch.Tensor = model(**inputs(model, batch), **options).logits
    return found if found.dtype == torch.float64 else found.float()


def targets(batch: Batch, task: str) -> torch.Tensor:
    """What each row of logits is compared with; causal LM: the next token (labels move, so logits need no copy)."""
    from torch.nn.functional import pad

    return pad(batch.labels[:, 1:], (0, 1), value=NOT_COUNTED) if task == CAUSAL_LM else batch.labels


def loss(model: Any, batch: Batch, task: str) -> torch.Tensor:
    """Mean cross entropy over what counts (examples, or predicted tokens); a scalar, 0 when nothing counts."""
    wanted = targets(batch, task)
    return _summed_loss(logits(model, batch), wanted) / (wanted != NOT_COUNTED).sum().clamp(min=1)


def evaluate_batches(
    model: Any, shard: Shard, batch_size: int, length: int, pad_id: int, device: torch.device | str = "cpu"
) -> Quality:
    """Quality of a model on every example of a shard; batches of like length, always the same ones."""
    import torch

    training = model.training
    model.eval()
    total, right, count = 0.0, 0, 0
    try:
        with torch.no_grad():
            for indices in _by_length(shard, batch_size):
                batch = shard.batch(indices, length, pad_id).to(device)
                wanted, found = targets(batch, shard.task), logits(model, batch)
                total += float(_summed_loss(found, wanted))
                right += int((found.argmax(-1) == wanted).sum())  # no class or token is NOT_COUNTED
                count += int((wanted != NOT_COUNTED).sum())
    finally:
        model.train(training)
    return Quality(total / max(count, 1), right / max(count, 1), len(shard))


def _summed_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(found.flatten(0, -2), wanted.flatten(), ignore_index=NOT_COUNTED, reduction="sum")


def _by_length(shard: Shard, batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(shard)), key=shard.lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@lru_cache(maxsize=4)
def _pass(shard_len: int, seed: int, round_index: int, client: int, number: int) -> list[int]:
    return shuffled(shard_len, "batches", seed, round_index, client, number)


def _check_examples(examples: Sequence[Example], task: str, labels: int) -> None:
    if task not in TASKS:
        raise DataError(f"task {task!r} is not known; known: {', '.join(TASKS)}")
    if not examples:
        raise DataError("a shard needs at least one example, got none")
    for place, example in enumerate(examples):
        if task == IMAGE_CLASSIFICATION:
            _check_pixels(place, example, examples[0])
        elif not len(example.ids):
            raise DataError(f"example {place} has no token")
        if task != CAUSAL_LM and (example.label is None or not 0 <= example.label < labels):
            raise DataError(f"example {place}: label {example.label} is not one of the {labels} classes")


def _check_pixels(place: int, example: Example, first: Example) -> None:
    if example.pixels is None or first.pixels is None:
        raise DataError(f"example {place} has no pixels")
    if example.pixels.ndim != 3 or example.pixels.shape != first.pixels.shape:
        raise DataError(
            f"example {place} has the shape {example.pixels.shape}: images of one shape (channels, height, width) are "
            f"needed, the first has {first.pixels.shape}"
        )


def _targets(examples: Sequence[Example], task: str) -> NDArray[np.int64]:
    import numpy as np

    if task == CAUSAL_LM:
        return np.array([example.loss_from for example in examples], np.int64)
    return np.array([example.label for example in examples], np.int64)


def _read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["shard"])
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    except FileNotFoundError:
        raise WireError(f"shard {path}: there is no such file") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WireError(f"shard {path}: not a shard, or damaged ({error})") from None
