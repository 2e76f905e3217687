"""From a user's file to texts: for perplexity, and with a class for a classifier.  Read as a run reads its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from testbed.cache import cache_folder
from testbed.data import examples_of
from testbed.data_sources import HUB, DataSpec, Row, read_rows
from testbed.errors import DataError
from testbed.evaluation.items import Source, drawn
from testbed.evaluation.likelihood import first_token, prompt_tokens
from testbed.evaluation.perplexity import Text
from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION
from testbed.spelling import did_you_mean
from testbed.task import Example

TEXT_WORDS = ("text", "instruction", "input", "response", "template", "split")
CLASS_WORDS = ("text", "label", "split")
_OPTIONS = ("template", "split")
_NO_LIMIT = 1 << 30  # tokens: windows take a text of any length


def texts_of(source: Source, tokenizer: Any, say: Callable[[str], None]) -> tuple[list[Text], dict[str, Any]]:
    """Plain texts, or with a template prompts and responses; and the data's record."""
    source.check_words(TEXT_WORDS, "perplexity")
    spec, rows, available = _rows(source, CAUSAL_LM, _NO_LIMIT, say)
    encode = _responses if source.template else _plain
    return encode(spec, tokenizer, rows), source.record(rows, available)


def labelled_of(
    source: Source, tokenizer: Any, classes: Sequence[str], length: int, say: Callable[[str], None]
) -> tuple[list[Example], dict[str, Any]]:
    """Texts with their class; DataError for a class that the run does not know."""
    source.check_words(CLASS_WORDS, "multiple_choice for a sequence classifier")
    spec, rows, available = _rows(source, SEQUENCE_CLASSIFICATION, length, say)
    strange = sorted({row.label for row in rows if row.label is not None} - set(classes))
    if strange:
        raise DataError(
            f"data {source.name!r}: {strange[0]!r} is no class of the run ({len(strange)} such); "
            f"{did_you_mean(strange[0], classes)}"
        )
    examples = [example for example in examples_of(spec, tokenizer, classes, rows) if example]
    return examples, source.record(rows, available)


def _rows(source: Source, task: str, length: int, say: Callable[[str], None]) -> tuple[DataSpec, list[Row], int]:
    columns = {word: column for word, column in source.words.items() if word not in _OPTIONS}
    spec = DataSpec(
        name=source.name,
        task=task,
        columns=columns,
        template=source.words.get("template"),
        held_out=source.split if source.name.startswith(HUB) else None,
        length=length,
    )
    everything, held_out = read_rows(spec, cache_folder(), say)
    rows = everything if held_out is None else held_out
    if not rows:
        raise DataError(f"data {source.name!r}: none of its texts has a character")
    return spec, [rows[index] for index in drawn(len(rows), source.limit)], len(rows)


def _plain(_: DataSpec, tokenizer: Any, rows: Sequence[Row]) -> list[Text]:
    opening = first_token(tokenizer)
    encoded = [(row, prompt_tokens(tokenizer, row.text)) for row in rows]
    return [Text((*ids,) if ids[0] == opening else (opening, *ids), 1, _size(row.text)) for row, ids in encoded]


def _responses(spec: DataSpec, tokenizer: Any, rows: Sequence[Row]) -> list[Text]:
    examples = examples_of(spec, tokenizer, (), rows)
    return [
        Text(tuple(map(int, example.ids)), example.loss_from, _size(row.text))
        for row, example in zip(rows, examples, strict=True)
        if example
    ]


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
