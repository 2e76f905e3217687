"""Accuracy of a sequence classifier on labelled texts: the run's own accuracy, on another file.

The texts are tokenised, cut to the run's length and closed as in the run; the class with the highest logit is the
answer.  `loss` is the mean cross entropy in nats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from testbed.evaluation.figures import MEAN, Outcome, Scores
from testbed.method import SEQUENCE_CLASSIFICATION
from testbed.task import Example, Shard, logits

ACCURACY = "accuracy"
LOSS = "loss"
DEFINITION = (
    "the share of the texts whose class has the highest logit (accuracy), and the mean cross entropy in nats (loss), "
    "as the run itself is evaluated"
)


def examine(model: Any, examples: Sequence[Example], classes: int, length: int, batch_size: int) -> Outcome:
    """Accuracy and loss of the model on these examples."""
    import torch
    from torch.nn.functional import cross_entropy

    shard = Shard.of(examples, SEQUENCE_CLASSIFICATION, classes)
    order = sorted(range(len(shard)), key=shard.lengths.__getitem__)
    right, nats = [0.0] * len(shard), [0.0] * len(shard)
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = shard.batch(indices, length, model.config.pad_token_id or 0).to(model.device)
            found = logits(model, batch)
            each = cross_entropy(found, batch.labels, reduction="none").tolist()
            for index, hit, loss in zip(indices, (found.argmax(-1) == batch.labels).tolist(), each, strict=True):
                right[index], nats[index] = float(hit), loss
    return Outcome.of({ACCURACY: Scores(right), LOSS: Scores(nats, kind=MEAN)}, {})


def majority(examples: Sequence[Example]) -> dict[str, float]:
    """What always answering this file's most frequent class gives."""
    [(_, count)] = Counter(example.label for example in examples).most_common(1)
    return {"majority_class": count / len(examples)}
