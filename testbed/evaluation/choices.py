"""Multiple choice by log-likelihood, as lm-evaluation-harness defines it (output_type: multiple_choice).

Of the context c (the prompt) and each choice a the model gives log p(a | c), summed over a's tokens:

    accuracy                 the choice with the highest log p (a | c) is the answer: the harness' `acc`
    accuracy_per_character   the highest log p (a | c) / characters of a: its `acc_norm`
    accuracy_per_byte        the highest log p (a | c) / UTF-8 bytes of a: its `acc_bytes`

Of equals the first counts.  Between prompt and choice stands one blank, which belongs to the choice's tokens and not to
its length; none where the prompt ends in a blank, or comes of a template.  A context too long is cut from the left.
Source: EleutherAI/lm-evaluation-harness, lm_eval/api/task.py, `ConfigurableTask.process_results`, and
lm_eval/models/huggingface.py, `HFLM._loglikelihood_tokens` (0.4.13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from testbed.evaluation.figures import Outcome, Scores
from testbed.evaluation.items import Choice
from testbed.evaluation.likelihood import Span, joined_pair, losses, span_of, split_pair

ACCURACY = "accuracy"
PER_CHARACTER = "accuracy_per_character"
PER_BYTE = "accuracy_per_byte"
DEFINITION = (
    "the choice with the highest log-likelihood behind the prompt (accuracy; lm-evaluation-harness: acc), divided by "
    "its characters (accuracy_per_character: acc_norm) or its UTF-8 bytes (accuracy_per_byte: acc_bytes)"
)


def examine(
    model: Any, tokenizer: Any, items: Sequence[Choice], most: int, batch_size: int, *, template: bool = False
) -> Outcome:
    """How often the model finds the right choice the likeliest; `most`: tokens that it takes at once."""
    spans, cut = _spans(tokenizer, items, most, joined_pair if template else split_pair, template=template)
    likelihoods = iter([-nats for nats in losses(model, spans, batch_size)])
    rows = [[next(likelihoods) for _ in item.choices] for item in items]
    ways: dict[str, Callable[[str], int]] = {
        ACCURACY: lambda _: 1,
        PER_CHARACTER: len,
        PER_BYTE: lambda choice: len(choice.encode("utf-8", "surrogatepass")),
    }
    scores = {
        name: Scores([float(_best(item, row, size) == item.right) for item, row in zip(items, rows, strict=True)])
        for name, size in ways.items()
    }
    return Outcome.of(scores, {"prompts_cut_from_the_left": cut})


def guessing(items: Sequence[Choice]) -> dict[str, float]:
    """What blind guessing gives, and always naming the place at which the answer stands most often."""
    places = [item.right for item in items]
    return {
        "guessing": sum(1 / len(item.choices) for item in items) / len(items),
        "most_frequent_place": max(map(places.count, set(places))) / len(items),
    }


def _best(item: Choice, likelihoods: Sequence[float], size: Callable[[str], int]) -> int:
    each = [value / size(choice) for value, choice in zip(likelihoods, item.choices, strict=True)]
    return each.index(max(each))


def _spans(
    tokenizer: Any,
    items: Sequence[Choice],
    most: int,
    pair: Callable[[Any, str, str], tuple[list[int], list[int]]],
    *,
    template: bool,
) -> tuple[list[Span], int]:
    """Every item's choices, one after another, and how many items lost some of their prompt."""
    spans, cut_items = [], 0
    for item in items:
        between = "" if template or item.prompt[-1:].isspace() or not item.prompt else " "
        made = [span_of(*pair(tokenizer, item.prompt, between + choice), most) for choice in item.choices]
        spans += [span for span, _ in made]
        cut_items += any(cut for _, cut in made)
    return spans, cut_items
