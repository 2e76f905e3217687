"""What is reached without any fine-tuning of the model: the numbers that stand beside every table of quality."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.method import CAUSAL_LM, IMAGE_CLASSIFICATION

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from testbed.data import DataSet
    from testbed.task import Example

MAJORITY_CLASS = "majority class"
BAG_OF_WORDS = "bag of words"
UNIGRAM = "unigram"
#: Raise it whenever a change here changes a number: cached values of an older format are then ignored.
_FORMAT = 1


@dataclass(frozen=True)
class Baseline:
    """Held-out quality of something simple.  `loss`: nats per token of a causal LM.  None: not measured."""

    name: str
    accuracy: float | None
    loss: float | None = None


def baselines(
    dataset: DataSet, seed: int, cache_dir: Path, say: Callable[[str], None] = lambda _: None
) -> tuple[Baseline, ...]:
    """Every baseline of the data set's task, from the cache where the same content was measured before.

    Give `dataset.only(…)` of the examples that the clients hold together, so that both learn from the same texts.
    """
    cache = cache_dir / f"baselines-{_FORMAT}-{_key(dataset)}-{seed}.json"
    known = _read(cache)
    if known is None:
        say("measuring the baselines (once for this data; kept in the cache)")
        known = _measure(dataset, seed)
        _write(cache, known)
    return known


def majority_class(dataset: DataSet) -> float:
    """Held-out accuracy of always answering the most frequent class of the training examples."""
    (most_frequent, _), *_ = Counter(example.label for example in dataset.train).most_common(1)
    return sum(example.label == most_frequent for example in dataset.held_out) / len(dataset.held_out)


def bag_of_words(dataset: DataSet, seed: int) -> float | None:
    """Held-out accuracy of logistic regression on TF-IDF (sublinear) of the whole texts, not cut to a length.

    None where it cannot be had: no text has a word, or the training examples have one class only.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    labels = [example.label for example in dataset.train]
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    try:
        known = vectorizer.fit_transform(row.text for row in dataset.train_rows)
    except ValueError:  # an empty vocabulary
        return None
    if len(set(labels)) < 2:
        return None
    model = LogisticRegression(max_iter=1000, random_state=seed).fit(known, labels)
    answers = model.predict(vectorizer.transform(row.text for row in dataset.held_out_rows))
    right = sum(int(answer) == example.label for answer, example in zip(answers, dataset.held_out, strict=True))
    return right / len(dataset.held_out)


def unigram(dataset: DataSet) -> tuple[float, float]:
    """Held-out cross entropy (nats per counted token) of the training tokens' add-one frequencies, and the accuracy
    of always answering the most frequent token.
    """
    counts = Counter(_counted(dataset.train))
    held_out = Counter(_counted(dataset.held_out))
    total, asked = counts.total() + dataset.vocabulary, held_out.total()
    loss = -sum(times * math.log((counts[token] + 1) / total) for token, times in held_out.items()) / asked
    return loss, held_out[counts.most_common(1)[0][0]] / asked


def _counted(examples: Iterable[Example]) -> Iterator[int]:
    for example in examples:
        yield from example.ids[max(1, example.loss_from) :]


def _measure(dataset: DataSet, seed: int) -> tuple[Baseline, ...]:
    if dataset.task == CAUSAL_LM:
        loss, accuracy = unigram(dataset)
        return (Baseline(UNIGRAM, accuracy, loss),)
    majority = Baseline(MAJORITY_CLASS, majority_class(dataset))
    if dataset.task == IMAGE_CLASSIFICATION:  # no words
        return (majority,)
    return (majority, Baseline(BAG_OF_WORDS, bag_of_words(dataset, seed)))


def _key(dataset: DataSet) -> str:
    """Hash of the content and of the counted tokens: a causal LM's baseline depends on both."""
    digest = hashlib.sha256(dataset.sha256.encode())
    if dataset.task == CAUSAL_LM:
        for examples in (dataset.train, dataset.held_out):
            digest.update(str(Counter(_counted(examples)).most_common()).encode())
        digest.update(str(dataset.vocabulary).encode())
    return digest.hexdigest()[:24]


def _read(cache: Path) -> tuple[Baseline, ...] | None:
    try:
        return tuple(Baseline(**entry) for entry in json.loads(cache.read_text()))
    except (OSError, ValueError, TypeError):  # none yet, or damaged: measured again
        return None


def _write(cache: Path, known: Sequence[Baseline]) -> None:
    partial = cache.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):  # a cache that cannot be written costs time, and no result
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(json.dumps([asdict(baseline) for baseline in known]))
            partial.replace(cache)
        finally:
            partial.unlink(missing_ok=True)
