"""Load a data set, choose and tokenise its examples, and divide them among clients.

    DataSpec ─► load_data ─► DataSet ─► split ─► Split            (images: load_images)
                                │                  │
                                └── shard(indices) ┘─► one safetensors file for each client (task.py)

What is chosen, and what is held out, depends on the data alone and never on a run's seed: runs with different seeds
are judged on the same held-out examples.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.data_sources import DOCSTRINGS, TEMPLATES, DataSpec, Row, read_rows
from testbed.errors import DataError
from testbed.image_source import pixels_of, read_image_rows
from testbed.method import CAUSAL_LM, IMAGE_CLASSIFICATION, SEQUENCE_CLASSIFICATION
from testbed.partition import NATURAL, PARTITIONS, PartitionSpec, Split, divide
from testbed.spelling import did_you_mean
from testbed.task import TASKS, Example, Scale, Shard, shuffled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "PARTITIONS",
    "DataSet",
    "DataSpec",
    "PartitionSpec",
    "Split",
    "check_same",
    "load_data",
    "load_images",
    "split",
]

HELD_OUT_SHARE = 0.1
DOCSTRINGS_PER_CLASS = 1000
DOCSTRINGS_HELD_OUT_PER_CLASS = 100


@dataclass(frozen=True)
class DataSet:
    """Examples to train on and examples to judge by.  A text's row keeps its words; `record` is JSON."""

    task: str
    classes: tuple[str, ...]  # names, by label; empty for a causal LM
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    train_rows: tuple[Row, ...]
    held_out_rows: tuple[Row, ...]
    vocabulary: int  # of the tokenizer; 0 of images
    record: Mapping[str, Any]
    scale: Scale | None = None  # of the training images

    @cached_property
    def sha256(self) -> str:
        """Content hash of every text or image, with its prompt, label, id and side; the tokenizer has no part in it."""
        digest = hashlib.sha256(self.task.encode())
        for side, rows in ((b"train", self.train_rows), (b"held out", self.held_out_rows)):
            digest.update(side)
            for row in rows:
                fields = (row.prompt, row.text, row.label or "", row.id or "")
                digest.update("\0".join(fields).encode("utf-8", "surrogatepass") + b"\1")
        return digest.hexdigest()

    def only(self, indices: Iterable[int]) -> DataSet:
        """The same, with only these training examples, in the order of the data set."""
        kept = sorted(set(indices))
        return replace(
            self, train=tuple(self.train[i] for i in kept), train_rows=tuple(self.train_rows[i] for i in kept)
        )

    def shard(self, indices: Sequence[int]) -> Shard:
        """One client's training examples."""
        return Shard.of([self.train[i] for i in indices], self.task, len(self.classes), self.scale)

    def held_out_shard(self) -> Shard:
        return Shard.of(self.held_out, self.task, len(self.classes), self.scale)


def load_data(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    say: Callable[[str], None] = lambda _: None,
) -> DataSet:
    """Read, choose and tokenise.  Raises DataError with the way out when the data cannot serve the task."""
    _check_spec(spec)
    train, held_out = _chosen(spec, *read_rows(spec, cache_dir, say))
    classes = _classes(spec, train, held_out)
    train_rows, train_examples = _tokenised(spec, tokenizer, classes, train, say)
    held_out_rows, held_out_examples = _tokenised(spec, tokenizer, classes, held_out, say)
    return DataSet(
        task=spec.task,
        classes=classes,
        train=train_examples,
        held_out=held_out_examples,
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        vocabulary=len(tokenizer),
        record=_record(spec, classes, train_rows, held_out_rows, say),
    )


def load_images(spec: DataSpec, shape: tuple[int, int, int], say: Callable[[str], None] = lambda _: None) -> DataSet:
    """Read, choose and resize to `shape` (channels, height, width): that of the model's images.

    What scales the pixels is taken from the training images.  Raises DataError with the way out when the data cannot
    serve the task.
    """
    _check_spec(spec)
    train, held_out = _chosen(spec, *read_image_rows(spec))
    classes = _classes(spec, train, held_out)
    train_examples = _image_examples(spec.name, train, classes, shape)
    scale = Scale.of([example.pixels for example in train_examples if example.pixels is not None])
    return DataSet(
        task=spec.task,
        classes=classes,
        train=train_examples,
        held_out=_image_examples(
            spec.held_out if isinstance(spec.held_out, str) else spec.name, held_out, classes, shape
        ),
        train_rows=tuple(train),
        held_out_rows=tuple(held_out),
        vocabulary=0,
        record={**_record(spec, classes, train, held_out, say), "image_shape": list(shape), **asdict(scale)},
        scale=scale,
    )


def split(dataset: DataSet, partition: PartitionSpec, clients: int, seed: int) -> Split:
    """Divide the training examples among clients; the same seed gives the same shards.

    Raises DataError when there are too few examples, labels or ids, or a client would get nothing.
    """
    if dataset.task == IMAGE_CLASSIFICATION and partition.kind == NATURAL:
        raise DataError(
            f"partition '{NATURAL}': images say of no user that they are theirs; use iid, dirichlet or label"
        )
    return divide(dataset.train_rows, partition, clients, seed)


def check_same(dataset: DataSet, recorded_sha256: str) -> None:
    """Raise DataError when the data is not what a run began with."""
    if dataset.sha256 != recorded_sha256:
        name = dataset.record["name"]
        old = "install the package versions of then" if name == DOCSTRINGS else "bring the old content back"
        raise DataError(
            f"data {name!r} has changed since the run began (content {dataset.sha256[:12]}, recorded "
            f"{recorded_sha256[:12]}); {old}, or start a new run"
        )


# ── what is asked ──────────────────────────────────────────────────────────────────────────────────────────────────
def _check_spec(spec: DataSpec) -> None:
    if spec.task not in TASKS:
        raise DataError(f"data: task {spec.task!r} does not exist; {did_you_mean(spec.task, TASKS)}")
    if spec.template is not None and spec.template not in TEMPLATES:
        raise DataError(f"data: template {spec.template!r} does not exist; {did_you_mean(spec.template, TEMPLATES)}")
    if spec.template and spec.task != CAUSAL_LM:
        raise DataError(f"data: a template needs the task '{CAUSAL_LM}', got '{spec.task}'")
    if isinstance(spec.held_out, float | int) and not 0 < spec.held_out < 1:
        raise DataError(f"data: held_out: expected a share between 0 and 1 or a file or split, got {spec.held_out}")
    for name, least in (("per_class", 1), ("limit", 1), ("held_out_limit", 1), ("length", 2)):
        value = getattr(spec, name)
        if value is not None and value < least:
            raise DataError(f"data: {name}: expected {least} or more, got {value}")


# ── which rows ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _chosen(spec: DataSpec, train: list[Row], held_out: list[Row] | None) -> tuple[list[Row], list[Row]]:
    if held_out is None:
        train, held_out = _hold_out(spec, train)
    per_class, held_out_per_class = spec.per_class, None
    if spec.name == DOCSTRINGS:
        per_class, held_out_per_class = spec.per_class or DOCSTRINGS_PER_CLASS, DOCSTRINGS_HELD_OUT_PER_CLASS
    kept = _choose(train, per_class, spec.limit)
    judged = _choose(held_out, held_out_per_class, spec.held_out_limit)
    if not kept or not judged:
        raise DataError(
            f"data {spec.name!r}: {len(kept)} {_kind(spec)} to train on, {len(judged)} held out; both need some"
        )
    return kept, judged


def _kind(spec: DataSpec) -> str:
    return "images" if spec.task == IMAGE_CLASSIFICATION else "texts"


def _hold_out(spec: DataSpec, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    share = HELD_OUT_SHARE if spec.held_out is None else float(spec.held_out)
    count = max(1, round(share * len(rows)))
    held_out = set(shuffled(len(rows), "held out")[:count])
    return (
        [row for place, row in enumerate(rows) if place not in held_out],
        [rows[place] for place in sorted(held_out)],
    )


def _choose(rows: Sequence[Row], per_class: int | None, limit: int | None) -> list[Row]:
    """At most so many, drawn at random but always the same, in the order of the data."""
    seen: Counter[str | None] = Counter()
    chosen = []
    for place in shuffled(len(rows), "choose"):
        label = rows[place].label
        if per_class is None or seen[label] < per_class:
            seen[label] += 1
            chosen.append(place)
    if limit is not None:  # drawn anew: common classes reached their share first, and would crowd the others out
        chosen = [chosen[index] for index in shuffled(len(chosen), "limit")[:limit]]
    return [rows[place] for place in sorted(chosen)]


def _classes(spec: DataSpec, train: Sequence[Row], held_out: Sequence[Row]) -> tuple[str, ...]:
    if spec.task == CAUSAL_LM:
        return ()
    names = {row.label for row in train if row.label is not None}
    if len(names) < 2:
        source = "the folders" if spec.task == IMAGE_CLASSIFICATION else "--data-set label=COLUMN"
        raise DataError(
            f"data {spec.name!r}: classification needs two classes or more, the training {_kind(spec)} have only "
            f"{sorted(names)}; check {source} and the limits"
        )
    strange = {row.label for row in held_out if row.label is not None} - names
    if strange:
        raise DataError(
            f"data {spec.name!r}: held-out classes {sorted(strange)[:5]} do not occur in the training {_kind(spec)}"
        )
    return tuple(sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)))


# ── tokens ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def examples_of(
    spec: DataSpec, tokenizer: PreTrainedTokenizerFast, classes: Sequence[str], rows: Sequence[Row]
) -> Iterator[Example | None]:
    """The example of each row, as a run trains on it; None where there is nothing to learn within the length."""
    label_of = {name: label for label, name in enumerate(classes)}
    encode = _instruction_examples if spec.template else _text_examples
    return encode(spec, tokenizer, rows, label_of)


def _tokenised(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerFast,
    classes: Sequence[str],
    rows: Sequence[Row],
    say: Callable[[str], None],
) -> tuple[tuple[Row, ...], tuple[Example, ...]]:
    """Rows that have something to learn, and their examples."""
    encoded = examples_of(spec, tokenizer, classes, rows)
    pairs = [(row, example) for row, example in zip(rows, encoded, strict=True) if example]
    if not pairs:
        raise DataError(
            f"data {spec.name!r}: no text has a token to learn within length {spec.length}; raise the length"
        )
    if len(pairs) < len(rows):
        say(f"{len(rows) - len(pairs)} of {len(rows)} texts left out: nothing to learn within {spec.length} tokens")
    return tuple(row for row, _ in pairs), tuple(example for _, example in pairs)


def _text_examples(
    spec: DataSpec, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], label_of: Mapping[str, int]
) -> Iterator[Example | None]:
    """The text with the special tokens that its tokenizer gives it, closed by the end-of-text token if there is one."""
    texts = [row.text for row in rows]
    least = 1 if spec.task == SEQUENCE_CLASSIFICATION else 2
    encoded = tokenizer(texts, truncation=True, max_length=spec.length, split_special_tokens=True)["input_ids"]
    for row, ids in zip(rows, encoded, strict=True):
        closed = _closed(ids, tokenizer.eos_token_id, spec.length)
        label = label_of[row.label] if spec.task == SEQUENCE_CLASSIFICATION and row.label is not None else None
        yield Example(closed, label) if len(closed) >= least else None


def _instruction_examples(
    spec: DataSpec, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], _: Mapping[str, int]
) -> Iterator[Example | None]:
    """Prompt and response; only the response counts.  None where the prompt alone fills the length."""
    plain = {"split_special_tokens": True, "verbose": False}  # longer than the model takes: it is cut below
    prompts = tokenizer([row.prompt for row in rows], **plain)["input_ids"]
    responses = tokenizer([row.text for row in rows], add_special_tokens=False, **plain)["input_ids"]
    for prompt, response in zip(prompts, responses, strict=True):
        opening = prompt[:-1] if prompt[-1] == tokenizer.eos_token_id else prompt
        whole = _closed([*opening, *response[: spec.length]], tokenizer.eos_token_id, spec.length)
        yield Example(whole, loss_from=len(opening)) if len(opening) < spec.length - 1 else None


def _closed(ids: Sequence[int], eos: int | None, length: int) -> list[int]:
    if eos is None or (len(ids) <= length and ids and ids[-1] == eos):
        return list(ids[:length])
    return [*ids[: length - 1], eos]


# ── pixels ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _image_examples(
    name: str, rows: Sequence[Row], classes: Sequence[str], shape: tuple[int, int, int]
) -> tuple[Example, ...]:
    label_of = {own: label for label, own in enumerate(classes)}
    return tuple(
        Example(label=label_of[row.label or ""], pixels=pixels)
        for row, pixels in zip(rows, pixels_of(name, rows, shape), strict=True)
    )


# ── what is recorded ───────────────────────────────────────────────────────────────────────────────────────────────
def _record(
    spec: DataSpec, classes: Sequence[str], train: Sequence[Row], held_out: Sequence[Row], say: Callable[[str], None]
) -> dict[str, Any]:
    seen = {(row.prompt, row.text) for row in train}
    in_both = sum((row.prompt, row.text) in seen for row in held_out)
    if in_both:
        exactly = "byte for byte" if spec.task == IMAGE_CLASSIFICATION else "word for word"
        say(f"{in_both} of {len(held_out)} held-out {_kind(spec)} stand in the training data too, {exactly}")
    return {
        **asdict(spec),
        "classes": list(classes),
        "train_examples": len(train),
        "held_out_examples": len(held_out),
        "held_out_by": "module" if spec.name == DOCSTRINGS else spec.held_out or HELD_OUT_SHARE,
        f"held_out_{_kind(spec)}_also_in_train": in_both,
    }
