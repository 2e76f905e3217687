"""How likely a causal language model finds tokens, given those before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from testbed.errors import DataError
from testbed.task import Batch, logits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Tokens of which those from `counted` on are predicted; what the model is fed ends before the last."""

    tokens: tuple[int, ...]
    counted: int

    def __post_init__(self) -> None:
        if not 1 <= self.counted < len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens cannot be counted from {self.counted}")


def span_of(context: Sequence[int], continuation: Sequence[int], most: int) -> tuple[Span, bool]:
    """The continuation behind as much of its context as the model takes, and whether some was cut from the left.

    At most `most` tokens are fed, as in lm-evaluation-harness: the last of the continuation is predicted only.
    Raises DataError for a continuation that does not fit by itself.
    """
    if not continuation:
        raise DataError("an answer has no token of its own behind its prompt: it is blank, or the tokenizer drops it")
    if len(continuation) > most:
        raise DataError(f"an answer of {len(continuation)} tokens is longer than the {most} that the model takes")
    kept = context[-(most + 1 - len(continuation)) :]
    return Span((*kept, *continuation), len(kept)), len(kept) < len(context)


def first_token(tokenizer: Any) -> int:
    """What stands before a text without context: the tokenizer's first token, else its last; DataError without both."""
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise DataError("the tokenizer has neither a bos nor an eos token: nothing can stand before a text's first")
    return int(found)


def split_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows it, split as lm-evaluation-harness does (`TemplateLM._encode_pair`).

    Both are tokenised as one text, which is cut where the context alone would end; blanks at the context's end belong
    to the continuation.  An empty context is the tokenizer's first token.
    """
    if not context:
        return [first_token(tokenizer)], _plain(tokenizer, continuation, add_special_tokens=False)
    bare = context.rstrip()
    if not bare:
        return [first_token(tokenizer)], _plain(tokenizer, context + continuation, add_special_tokens=False)
    opening, whole = _plain(tokenizer, bare), _plain(tokenizer, context + continuation)
    return (opening, whole[len(opening) :]) if opening else ([first_token(tokenizer)], whole)


def joined_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of its response, each tokenised by itself: as a run with a template trains on them."""
    return _plain(tokenizer, context), _plain(tokenizer, continuation, add_special_tokens=False)


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's tokens, of which there is at least one."""
    return _plain(tokenizer, prompt) or [first_token(tokenizer)]


def losses(model: Any, spans: Sequence[Span], batch_size: int) -> list[float]:
    """Of every span the summed negative log-likelihood of its counted tokens, in nats; batches of like length."""
    import torch

    found = [0.0] * len(spans)
    with torch.no_grad():
        for indices in _by_length(spans, batch_size):
            for index, nats in zip(indices, _batch_losses(model, [spans[i] for i in indices]), strict=True):
                found[index] = nats
    return found


def _plain(tokenizer: Any, text: str, **how: Any) -> list[int]:
    """Tokens without the closing one that some tokenizers add, which would end the text before its continuation."""
    ids: list[int] = tokenizer(text, verbose=False, **how)["input_ids"]
    closed = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if closed else ids


def _by_length(spans: Sequence[Span], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(spans)), key=lambda index: len(spans[index].tokens))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _batch_losses(model: Any, spans: Sequence[Span]) -> list[float]:
    from torch.nn.functional import cross_entropy

    batch, rows, columns, wanted = _batch(spans, model.device)
    each = cross_entropy(logits(model, batch)[rows, columns], wanted, reduction="none").double()
    return each.new_zeros(len(spans)).index_add_(0, rows, each).tolist()


def _batch(spans: Sequence[Span], device: Any) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """What is fed, right-padded, and of every counted token its row, the place that predicts it, and itself."""
    import torch

    width = max(len(span.tokens) for span in spans) - 1
    ids = torch.zeros(len(spans), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, span in enumerate(spans):
        ids[row, : len(span.tokens) - 1] = torch.tensor(span.tokens[:-1])
        mask[row, : len(span.tokens) - 1] = 1
    counted = [(r, place) for r, span in enumerate(spans) for place in range(span.counted, len(span.tokens))]
    rows = torch.tensor([row for row, _ in counted], device=device)
    columns = torch.tensor([place - 1 for _, place in counted], device=device)
    wanted = torch.tensor([spans[row].tokens[place] for row, place in counted], device=device)
    return Batch(ids.to(device), mask.to(device), ids[:, 0].to(device)), rows, columns, wanted
