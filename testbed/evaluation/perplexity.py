"""Perplexity of texts, per token and per byte.

    perplexity      exp(Σ nats / Σ tokens): comparable between models of one tokenizer only
    bits_per_byte   Σ nats / (ln 2 · Σ bytes), UTF-8: comparable between any models

Of a plain text every token counts, the first behind the tokenizer's first (or else last) token, as in
lm-evaluation-harness (output_type: loglikelihood_rolling).  Of instruction data (`template=alpaca`) the response
counts, with the token that closes it, behind the prompt: the run's own loss; a prompt that does not fit beside its
response is cut from the left.  A text longer than the model takes is divided into windows of that length.  A window
begins `stride` tokens behind the one before, and of it those tokens count that did not yet.  With a stride as long as
the window, as the harness has it and as is the default, windows overlap in one token only, and a token behind an edge
is predicted from few.
Source: EleutherAI/lm-evaluation-harness, lm_eval/utils.py, `get_rolling_token_windows` (0.4.13).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.errors import DataError, UsageError
from testbed.evaluation.figures import MEAN, PERPLEXITY, Outcome, Scores
from testbed.evaluation.likelihood import Span, losses

TOKENS = "perplexity"
BYTES = "bits_per_byte"
DEFINITION = (
    "exp of the mean negative log-likelihood per token (perplexity), and the same in bits per UTF-8 byte "
    "(bits_per_byte), each over all texts together"
)


@dataclass(frozen=True)
class Text:
    """A text as tokens, of which those from `counted` on count, and the UTF-8 bytes that these are."""

    tokens: tuple[int, ...]
    counted: int
    size_bytes: int

    def __post_init__(self) -> None:
        if not self.size_bytes:
            raise DataError("a text without any byte has no perplexity")


def examine(model: Any, texts: Sequence[Text], most: int, batch_size: int, stride: int | None = None) -> Outcome:
    """Perplexity of the texts; `most`: tokens that the model takes at once, `stride`: None for as many."""
    if stride is not None and not 1 <= stride <= most:
        raise UsageError(f"--stride {stride}: expected 1 to {most}, the tokens that the model takes at once")
    fitted = [_fitted(text, most) for text in texts]
    spans = [(index, span) for index, text in enumerate(fitted) for span in windows(text, most, stride or most)]
    nats = [0.0] * len(texts)
    for (index, _), loss in zip(spans, losses(model, [span for _, span in spans], batch_size), strict=True):
        nats[index] += loss
    scores = {
        TOKENS: Scores(nats, [float(len(text.tokens) - text.counted) for text in texts], PERPLEXITY),
        BYTES: Scores([loss / math.log(2) for loss in nats], [float(text.size_bytes) for text in texts], MEAN),
    }
    cut = sum(len(ours.tokens) < len(text.tokens) for ours, text in zip(fitted, texts, strict=True))
    divided = len({index for index, span in spans if len(span.tokens) < len(fitted[index].tokens)})
    return Outcome.of(scores, {"prompts_cut_from_the_left": cut, "texts_in_several_windows": divided})


def windows(text: Text, most: int, stride: int) -> Iterator[Span]:
    """Spans that together count every token once; at most `most` tokens of each are fed."""
    done, length = text.counted, len(text.tokens)
    while done < length:
        stop = min(length, max(most + 1, done + stride))
        start = max(0, stop - most - 1)
        yield Span(text.tokens[start:stop], done - start)
        done = stop


def _fitted(text: Text, most: int) -> Text:
    """The same with as much of the prompt as fits beside the response, and at least its last token."""
    kept = max(1, most + 1 - (len(text.tokens) - text.counted))
    return text if text.counted <= kept else Text(text.tokens[text.counted - kept :], kept, text.size_bytes)
