"""What is learned: examples, shards, batches, loss and quality.

Used on the node and on the controller; torch, numpy and safetensors are imported inside functions only, and no
tokenizer is needed.  A *shard* is one safetensors file with one client's examples:

    input_ids   int32 (tokens,)         all examples, one after another
    offsets     int64 (examples + 1,)   example i is input_ids[offsets[i] : offsets[i + 1]]
    labels      int64 (examples,)       sequence classification: the class of each
    loss_from   int64 (examples,)       causal LM: index of the first token whose prediction counts
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import DataError, WireError
from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

TASKS = (SEQUENCE_CLASSIFICATION, CAUSAL_LM)
#: The label of a position whose prediction does not count (the value that torch's cross entropy skips).
NOT_COUNTED = -100
#: Name of the per-example integers in a shard, by task.
_TARGETS = {SEQUENCE_CLASSIFICATION: "labels", CAUSAL_LM: "loss_from"}
_FORMAT = 1


@dataclass(frozen=True)
class Example:
    """One text as tokens.  `label`: its class; `loss_from`: first token whose prediction counts (causal LM)."""

    ids: Sequence[int]
    label: int | None = None
    loss_from: int = 1


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model is fed, right-padded: all int64.

    input_ids, attention_mask   (examples, width)
    labels                      (examples,) classes; causal LM: (examples, width), NOT_COUNTED where no loss is taken
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens without the padding."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Quality:
    """How good a model is: mean cross entropy in nats (per example, or per counted token), share of right answers."""

    loss: float
    accuracy: float
    examples: int


@dataclass(frozen=True, eq=False)
class Shard:
    """One client's examples in private memory; `targets` are the classes or, for a causal LM, `loss_from`."""

    task: str
    labels: int  # number of classes; 0 for a causal LM
    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    targets: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Sequence[Example], task: str, labels: int = 0) -> Shard:
        """Put examples into one shard.  DataError when there are none, or one has no token or no valid label."""
        import numpy as np

        _check_examples(examples, task, labels)
        lengths = [0, *(len(example.ids) for example in examples)]
        flat = np.fromiter((token for example in examples for token in example.ids), np.int32, sum(lengths))
        return cls(task, labels, flat, np.cumsum(lengths, dtype=np.int64), _targets(examples, task))

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read a shard file.  WireError when it is not one, is damaged, or its arrays do not belong together."""
        about, arrays = _read_arrays(path)
        try:
            task, labels = about["task"], int(about["labels"])
            shard = cls(task, labels, arrays["input_ids"], arrays["offsets"], arrays[_TARGETS[task]])
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"shard {path}: task, label count or an array is missing or wrong ({error!r})") from None
        _check_arrays(shard, path)
        return shard

    def save(self, path: Path) -> str:
        """Write the file, whole or not at all, and return the SHA-256 of its bytes (equal for equal shards)."""
        from safetensors.numpy import save

        # One metadata entry only: the format does not fix the order of several, and the bytes are hashed.
        about = json.dumps({"format": _FORMAT, "task": self.task, "labels": self.labels})
        arrays = {"input_ids": self.input_ids, "offsets": self.offsets, _TARGETS[self.task]: self.targets}
        content = save(arrays, metadata={"shard": about})
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(path)
        return hashlib.sha256(content).hexdigest()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [int(stop - start) for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def label_counts(self) -> tuple[int, ...]:
        """Examples of each class; empty for a causal LM."""
        import numpy as np

        if self.task != SEQUENCE_CLASSIFICATION:
            return ()
        return tuple(np.bincount(self.targets, minlength=self.labels).tolist())

    def batch(self, indices: Sequence[int], length: int, pad_id: int, *, exact: bool = False) -> Batch:
        """The named examples, cut to `length` tokens and padded to the longest of them (`exact`: to `length`)."""
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


def logits(model: Any, batch: Batch) -> torch.Tensor:
    """fp32 logits of the model's own forward: (examples, classes) or (examples, width, vocabulary)."""
    # A key-value cache is of no use here and would hold the keys and values of every block.
    options = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
    found: torch.Tensor = output.logits
    return found.float()


def targets(batch: Batch, task: str) -> torch.Tensor:
    """What each row of logits is compared with; causal LM: the next token (labels move, so logits need no copy)."""
    from torch.nn.functional import pad

    return batch.labels if task == SEQUENCE_CLASSIFICATION else pad(batch.labels[:, 1:], (0, 1), value=NOT_COUNTED)


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
        if not len(example.ids):
            raise DataError(f"example {place} has no token")
        if task == SEQUENCE_CLASSIFICATION and (example.label is None or not 0 <= example.label < labels):
            raise DataError(f"example {place}: label {example.label} is not one of the {labels} classes")


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


def _check_arrays(shard: Shard, path: Path) -> None:
    ids, offsets, of_each = shard.input_ids, shard.offsets, shard.targets
    kinds = (ids.dtype.str, offsets.dtype.str, of_each.dtype.str)
    if kinds != ("<i4", "<i8", "<i8") or not ids.ndim == offsets.ndim == of_each.ndim == 1:
        raise WireError(f"shard {path}: expected flat int32 tokens and int64 offsets and targets, got {kinds}")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(ids) or (offsets[1:] <= offsets[:-1]).any():
        raise WireError(f"shard {path}: the offsets do not divide {len(ids)} tokens into examples")
    if len(of_each) != len(shard):
        raise WireError(f"shard {path}: {len(shard)} examples, but {len(of_each)} {_TARGETS[shard.task]}")
    classes = shard.task == SEQUENCE_CLASSIFICATION
    if (ids < 0).any() or (of_each < 0).any() or (classes and (of_each >= shard.labels).any()):
        raise WireError(f"shard {path}: a token or a {_TARGETS[shard.task]} value is out of range")
