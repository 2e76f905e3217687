"""From the rows of a user's file to questions: with choices, or with an answer to be generated.

The words of `--data-set` say which column is what; without one the first of the usual names that is there is taken:

    question    question, prompt, instruction       choices   a list; or the columns A, B, C, …
    answer      answer, answerKey, label, …         input     a context, of `template=alpaca` only
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed.data_sources import DOCSTRINGS, HUB, TEMPLATES, alpaca_prompt, read_records
from testbed.errors import DataError, UsageError
from testbed.spelling import did_you_mean
from testbed.task import shuffled

#: The prompt unless `--prompt` says otherwise: that of ARC in lm-evaluation-harness.
PROMPT = "Question: {question}\nAnswer:"

INDEX, NUMBER, LETTER, TEXT = "index", "number", "letter", "text"
_READINGS = (INDEX, NUMBER, LETTER, TEXT)
_QUESTION = ("question", "prompt", "instruction")
_ANSWERS = ("answer", "answerKey", "label", "response", "target", "output")
_COMMON_WORDS = ("question", "answer", "input", "template", "split")
CHOICE_WORDS = (*_COMMON_WORDS, "choices", "answer_as")
ANSWER_WORDS = _COMMON_WORDS


@dataclass(frozen=True)
class Source:
    """The user's data and how they are read; `limit`: at most so many items, drawn at random but always the same."""

    name: str
    words: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        template = self.words.get("template")
        if template is not None and template not in TEMPLATES:
            raise UsageError(f"--data-set template={template}: {did_you_mean(template, TEMPLATES)}")
        if template is not None and self.prompt is not None:
            raise UsageError("--prompt and --data-set template: both say what the model is asked; choose one of them")

    @property
    def template(self) -> bool:
        return "template" in self.words

    @property
    def split(self) -> str:
        return self.words.get("split", "test")

    def check_words(self, known: Sequence[str], of: str) -> None:
        """Raise UsageError for a word of `--data-set` that `of` does not have."""
        for word in self.words:
            if word not in known:
                raise UsageError(f"--data-set {word}: --as {of} has no such word; {did_you_mean(word, known)}")

    def record(self, items: Sequence[Any], available: int) -> dict[str, Any]:
        """What data it was, by content: the SHA-256 of the items as they were asked, and of the file."""
        text = json.dumps([vars(item) for item in items], ensure_ascii=False, sort_keys=True)
        path = Path(self.name).expanduser()
        return {
            "name": self.name,
            "split": self.split if self.name.startswith(HUB) else None,
            "columns": dict(self.words),
            "items": len(items),
            "available": available,
            "sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        }


@dataclass(frozen=True)
class Choice:
    """A question with its choices; `right` is the index of the answer."""

    prompt: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Asked:
    """A question with the answers that are right."""

    prompt: str
    answers: tuple[str, ...]


def choices_of(source: Source, say: Callable[[str], None]) -> tuple[list[Choice], dict[str, Any]]:
    """Questions with choices, and the data's record.

    Raises DataError for rows without choices, or whose answer is not among them.
    """
    source.check_words(CHOICE_WORDS, "multiple_choice")
    reading = source.words.get("answer_as")
    if reading is not None and reading not in _READINGS:
        raise UsageError(f"--data-set answer_as={reading}: {did_you_mean(reading, _READINGS)}")
    rows, available = _rows(source, say)
    columns = _Columns(source, rows)
    named = columns.of_choices()
    items = []
    for place, record in rows:
        texts, labels = _choices(place, record, named)
        answer = columns.value(place, record, "answer", _ANSWERS)
        items.append(Choice(columns.prompt(place, record), texts, _right(place, answer, texts, labels, reading)))
    return items, source.record(items, available)


def questions_of(source: Source, say: Callable[[str], None]) -> tuple[list[Asked], dict[str, Any]]:
    """Questions whose answer is generated, and the data's record; a list of answers means any of them."""
    source.check_words(ANSWER_WORDS, "exact_match")
    rows, available = _rows(source, say)
    columns = _Columns(source, rows)
    items = []
    for place, record in rows:
        answer = columns.value(place, record, "answer", _ANSWERS)
        answers = tuple(str(each) for each in (answer if isinstance(answer, list) else [answer]))
        if not answers:
            raise DataError(f"{place}: the list of answers is empty")
        items.append(Asked(columns.prompt(place, record), answers))
    return items, source.record(items, available)


def drawn(count: int, limit: int | None) -> list[int]:
    """Which of so many items are asked, in their order."""
    return sorted(shuffled(count, "evaluate")[:limit]) if limit is not None else list(range(count))


_Placed = tuple[str, Mapping[str, Any]]


def _rows(source: Source, say: Callable[[str], None]) -> tuple[list[_Placed], int]:
    if source.name == DOCSTRINGS:
        raise DataError(f"data '{DOCSTRINGS}' has texts and their packages, no questions; name a file of questions")
    found = read_records(source.name, source.split, say)
    named = [(f"data {source.name!r}, {place}", record) for place, record in found]
    return [named[index] for index in drawn(len(named), source.limit)], len(named)


class _Columns:
    """Which column is what, in this data."""

    def __init__(self, source: Source, rows: Sequence[_Placed]) -> None:
        self.source = source
        self.known = list(dict.fromkeys(key for _, record in rows for key in record))
        self._chosen: dict[str, str] = {}

    def _column(self, word: str, usual: Sequence[str]) -> str:
        if word not in self._chosen:
            asked = self.source.words.get(word)
            found = [name for name in ([asked] if asked else usual) if name in self.known]
            if not found:
                raise DataError(
                    f"data {self.source.name!r}: there is no column {asked or usual[0]!r} for '{word}'; "
                    f"{did_you_mean(asked or usual[0], self.known)}; name it with --data-set {word}=COLUMN"
                )
            self._chosen[word] = found[0]
        return self._chosen[word]

    def value(self, place: str, record: Mapping[str, Any], word: str, usual: Sequence[str]) -> Any:
        column = self._column(word, usual)
        value = record.get(column)
        if value is None or value == "":
            raise DataError(f"{place}: there is nothing in column {column!r}, which is its '{word}'")
        return value

    def prompt(self, place: str, record: Mapping[str, Any]) -> str:
        if self.source.template:
            return self._instruction(place, record)
        text = self.source.prompt or PROMPT
        known = dict(record)
        if "{question" in text and ("question" in self.source.words or "question" not in known):
            known["question"] = self.value(place, record, "question", _QUESTION)
        try:
            return text.format_map(known)
        except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
            raise DataError(
                f"{place}: the prompt {text!r} cannot be filled in ({type(error).__name__}: {error}); in braces stand "
                f"columns, of which there are: {', '.join(self.known)}"
            ) from None

    def _instruction(self, place: str, record: Mapping[str, Any]) -> str:
        question = str(self.value(place, record, "question", _QUESTION))
        asked = self.source.words.get("input")
        context = record.get(self._column("input", ("input",))) if asked or "input" in self.known else ""
        return alpaca_prompt(question, "" if context is None else str(context))

    def of_choices(self) -> tuple[str, ...]:
        """The column with the list, or those with one choice each."""
        asked = self.source.words.get("choices")
        names = tuple(asked.split(",")) if asked else ("choices",) if "choices" in self.known else self._lettered()
        for name in names or ("choices",):
            if name not in self.known:
                raise DataError(
                    f"data {self.source.name!r}: there is no column {name!r} for 'choices'; "
                    f"{did_you_mean(name, self.known)}; name it with --data-set choices=COLUMN, or one column for each "
                    "choice with --data-set choices=COLUMN,COLUMN,…"
                )
        return names

    def _lettered(self) -> tuple[str, ...]:
        """The columns A, B, C, … as far as there are any."""
        found = tuple(letter for letter in string.ascii_uppercase if letter in self.known)
        return found if found == tuple(string.ascii_uppercase[: len(found)]) and len(found) > 1 else ()


def _choices(
    place: str, record: Mapping[str, Any], columns: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The choices of a row, and their labels where the data has its own (as ARC's choices do)."""
    if len(columns) > 1:
        values: Any = [record.get(column) for column in columns]
        values = values[: next((i for i, value in enumerate(values) if value is None or value == ""), len(values))]
        labels: Any = columns
    else:
        values, labels = _listed(record.get(columns[0]))
    if not isinstance(values, list) or len(values) < 2:
        raise DataError(f"{place}: expected two choices or more in {', '.join(columns)}, got {values!r:.80}")
    texts = tuple(str(value) for value in values)
    if not all(texts):
        raise DataError(f"{place}: a choice in {', '.join(columns)} is empty")
    return texts, tuple(map(str, labels)) if labels else None


def _listed(cell: Any) -> tuple[Any, Any]:
    """A list, an object of text and label, or either of them as JSON in a text."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            return cell, None
    if isinstance(cell, Mapping) and isinstance(cell.get("text"), list):
        return cell["text"], cell.get("label")
    return cell, None


def _right(place: str, answer: Any, texts: Sequence[str], labels: Sequence[str] | None, reading: str | None) -> int:
    """The index of the answer; DataError where it is none of the choices, or could be more than one of them."""
    found = dict(_readings(str(answer).strip(), texts, labels))
    if reading is not None:
        found = {key: index for key, index in found.items() if key == reading}
    else:
        found.pop(NUMBER, None)  # counted from 1: only where that is said
    indices = sorted(set(found.values()))
    if len(indices) == 1:
        return indices[0]
    if indices:
        said = ", ".join(f"{texts[index]!r} as {key}" for key, index in found.items())
        raise DataError(
            f"{place}: the answer {answer!r} can be read in more than one way ({said}); say which with --data-set "
            "answer_as=index (from 0), number (from 1), letter or text"
        )
    how = f", read as {reading}" if reading else ""
    raise DataError(
        f"{place}: the answer {answer!r}{how} is none of the {len(texts)} choices "
        f"{[text[:40] for text in texts]!r:.300}; it is an index from 0, a letter from A or the choice's very text; "
        "numbers from 1 need --data-set answer_as=number"
    )


def _readings(answer: str, texts: Sequence[str], labels: Sequence[str] | None) -> Iterator[tuple[str, int]]:
    letters = list(labels or string.ascii_uppercase[: len(texts)])
    if answer in letters:
        yield LETTER, letters.index(answer)
    elif answer.upper() in letters:
        yield LETTER, letters.index(answer.upper())
    if [text.strip() for text in texts].count(answer) == 1:
        yield TEXT, [text.strip() for text in texts].index(answer)
    if answer.isdecimal() and answer not in letters:
        if int(answer) < len(texts):
            yield INDEX, int(answer)
        if 1 <= int(answer) <= len(texts):
            yield NUMBER, int(answer) - 1
