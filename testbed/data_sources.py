"""Rows of a data set: from the docstring corpus, a user's file, or the Hugging Face hub."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed.docstrings import load_docstrings
from testbed.errors import DataError
from testbed.method import IMAGE_CLASSIFICATION, SEQUENCE_CLASSIFICATION
from testbed.spelling import did_you_mean

DOCSTRINGS = "docstrings"
DIGITS = "digits"
HUB = "hf:"
SUFFIXES = (".jsonl", ".csv", ".parquet")
ALPACA = "alpaca"
TEMPLATES = (ALPACA,)
#: The classes of the default data: the packages with most docstrings outside the held-out modules.
DOCSTRING_CLASSES = ("matplotlib", "pandas", "scipy", "sklearn", "stdlib", "sympy", "torch", "transformers")

_PLAIN_WORDS = ("text", "label", "id")
_TEMPLATE_WORDS = ("instruction", "input", "response", "label", "id")
#: Our word → what the data may call it, too: Alpaca's own columns are instruction, input and output.
_ALSO_CALLED = {"response": "output"}
_OPTIONAL_WORDS = frozenset({"input", "label", "id"})
_ALPACA_OPENING = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class DataSpec:
    """Which data, and what of it: plain values, kept in the run's record.

    name              "docstrings", a .jsonl, .csv or .parquet file, or "hf:OWNER/NAME[:CONFIGURATION]"; of images
                      "digits", or a folder with one folder of images for each class
    columns           our word (text, label, id; with a template: instruction, input, response) → the data's column
    template          "alpaca": causal LM on instruction data, loss on the response only
    held_out          share of the rows, or a file (images: a folder), or (hub) a split's name; docstrings are held
                      out by module
    per_class, limit  at most so many training examples, of each class and in all (docstrings: 1,000 per class)
    held_out_limit    at most so many held-out examples (docstrings: 100 per class)
    length            tokens of an example at most, the closing token included; no matter for images
    """

    name: str = DOCSTRINGS
    task: str = SEQUENCE_CLASSIFICATION
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    held_out: float | str | None = None
    per_class: int | None = None
    limit: int | None = None
    held_out_limit: int | None = None
    length: int = 128


@dataclass(frozen=True)
class Row:
    """One text.  `prompt` comes before it and is never trained on; `label` and `id` may be missing.

    Or one image: `text` is the SHA-256 of its content, `id` where it stands.
    """

    text: str
    prompt: str = ""
    label: str | None = None
    id: str | None = None


def read_rows(spec: DataSpec, cache_dir: Path, say: Callable[[str], None]) -> tuple[list[Row], list[Row] | None]:
    """Training rows, and held-out rows where the data itself says which these are (else None).

    Raises DataError when the data is missing, unreadable or without a column that was asked for.
    """
    if spec.name == DOCSTRINGS:
        return _docstring_rows(spec, cache_dir, say)
    if spec.name.startswith(HUB):
        return _hub_rows(spec, say)
    if spec.name == DIGITS or Path(spec.name).expanduser().is_dir():
        raise DataError(
            f"data {spec.name!r}: images are for the task '{IMAGE_CLASSIFICATION}', not for '{spec.task}': give "
            f"--task {IMAGE_CLASSIFICATION}, or name texts: '{DOCSTRINGS}', a file ({', '.join(SUFFIXES)}) or "
            f"'{HUB}OWNER/NAME'"
        )
    train = list(_rows(spec, spec.name, _read_file(spec.name)))
    if not isinstance(spec.held_out, str):
        return train, None
    return train, list(_rows(spec, spec.held_out, _read_file(spec.held_out)))


def read_records(name: str, split: str, say: Callable[[str], None]) -> list[tuple[str, dict[str, Any]]]:
    """The records of a file, or of a split of a data set on the hub, as they are, each with its place in words.

    Raises DataError when there are none, or they cannot be read.
    """
    found = list(_hub_records(name, split, say) if name.startswith(HUB) else _read_file(name))
    if not found:
        raise DataError(f"data {name!r}: it holds no rows")
    return found


# ── docstrings ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _docstring_rows(spec: DataSpec, cache_dir: Path, say: Callable[[str], None]) -> tuple[list[Row], list[Row]]:
    if spec.columns or spec.template or spec.held_out is not None:
        raise DataError("data 'docstrings': columns, template and held_out are for your own data; leave them out")
    texts = [text for text in load_docstrings(cache_dir, say) if text.package in DOCSTRING_CLASSES]
    rows = [(t.held_out, Row(t.text, label=t.package, id=f"{t.package}/{t.module}")) for t in texts]
    return [row for held_out, row in rows if not held_out], [row for held_out, row in rows if held_out]


# ── files ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _read_file(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a file, each with its place in words."""
    path = Path(name).expanduser()
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(
            f"data {name!r} cannot be read: expected '{DOCSTRINGS}', a file ({', '.join(SUFFIXES)}), or "
            f"'{HUB}OWNER/NAME' for the Hugging Face hub"
        )
    if not path.is_file():
        raise DataError(f"data {name!r}: there is no such file (looked in {path.resolve().parent})")
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data {name!r}: cannot be read as UTF-8 text: {error}") from None


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _json_object(path, number, line)


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"data '{path}', line {number}: not valid JSON ({error}): {line.strip()[:60]!r}") from None
    if not isinstance(record, dict):
        raise DataError(
            f"data '{path}', line {number}: expected an object such as {{\"text\": …}}, got {line.strip()[:60]}"
        )
    return record


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for record in reader:
                if None in record or None in record.values():
                    raise DataError(
                        f"data '{path}', line {reader.line_num}: expected {len(reader.fieldnames or ())} columns "
                        "as in the header; quote fields that hold commas or line breaks"
                    )
                yield f"line {reader.line_num}", record
        except csv.Error as error:
            raise DataError(f"data '{path}', line {reader.line_num}: not valid CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            records = (record for batch in file.iter_batches() for record in batch.to_pylist())
            yield from ((f"row {number}", record) for number, record in enumerate(records, 1))
    except ArrowException as error:
        raise DataError(f"data '{path}': not a Parquet file, or damaged ({error})") from None


# ── the Hugging Face hub ───────────────────────────────────────────────────────────────────────────────────────────
def _hub_rows(spec: DataSpec, say: Callable[[str], None]) -> tuple[list[Row], list[Row] | None]:
    train = list(_rows(spec, spec.name, _hub_records(spec.name, "train", say)))
    if not isinstance(spec.held_out, str):
        return train, None
    return train, list(_rows(spec, spec.name, _hub_records(spec.name, spec.held_out, say)))


def _hub_records(name: str, split: str, say: Callable[[str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    say(f"loading {name} ({split}) from the Hugging Face hub or its cache")
    table = _load_hub(name, split)
    names = {column: getattr(feature, "names", None) for column, feature in table.features.items()}
    for number, record in enumerate(table, 1):
        yield f"{split} row {number}", {key: _class_name(value, names[key]) for key, value in record.items()}


def _class_name(value: Any, names: Sequence[str] | None) -> Any:
    """The name of a class that the hub stores as its number (-1: no label)."""
    if not names or not isinstance(value, int):
        return value
    return names[value] if value >= 0 else None


def _load_hub(name: str, split: str) -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    owner_name, _, configuration = name.removeprefix(HUB).partition(":")
    try:
        return datasets.load_dataset(owner_name, configuration or None, split=split)
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data {name!r}, split {split!r}: the Hugging Face hub could not give it ({_one_line(error)}). Check the "
            "name and the connection (HF_ENDPOINT names a mirror, HF_TOKEN opens private data); or save it as a "
            f"{' or '.join(SUFFIXES)} file and name that file"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ── columns ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _rows(spec: DataSpec, name: str, records: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Row]:
    """Rows with our words in place of the columns; texts without any character are left out."""
    placed = list(records)
    if not placed:
        raise DataError(f"data {name!r}: it holds no rows")
    columns = _columns(spec, name, list(dict.fromkeys(key for _, record in placed for key in record)))
    for place, record in placed:
        row = _row(spec, columns, f"data {name!r}, {place}", record)
        if row.text.strip():
            yield row


def _columns(spec: DataSpec, name: str, known: Sequence[str]) -> dict[str, str]:
    """Our word → column, for every word that the data has; a mapped or needed column must exist."""
    words = _TEMPLATE_WORDS if spec.template else _PLAIN_WORDS
    unknown = [word for word in spec.columns if word not in words]
    if unknown:
        of = f"the template '{spec.template}'" if spec.template else "data without a template"
        raise DataError(f"data {name!r}: '{unknown[0]}' is no column of {of}; {did_you_mean(unknown[0], words)}")
    chosen = {word: spec.columns.get(word) or _column_of(word, known) for word in words}
    needed = {"label"} if spec.task == SEQUENCE_CLASSIFICATION else set()
    for word, column in chosen.items():
        wanted = word in spec.columns or word in needed or word not in _OPTIONAL_WORDS
        if wanted and column not in known:
            hint = f"; {say_column(word)}" if word not in spec.columns else ""
            raise DataError(
                f"data {name!r}: there is no column {column!r} for '{word}'; {did_you_mean(column, known)}{hint}"
            )
    return {word: column for word, column in chosen.items() if column in known}


def say_column(word: str) -> str:
    """How a user says which column holds one of our words."""
    return f"name it with --data-set {word}=COLUMN (in an experiment's file: {word}: COLUMN, beside the data's name)"


def _column_of(word: str, known: Sequence[str]) -> str:
    also = _ALSO_CALLED.get(word, word)
    return also if word not in known and also in known else word


def _row(spec: DataSpec, columns: Mapping[str, str], place: str, record: Mapping[str, Any]) -> Row:
    values = {word: record.get(column) for word, column in columns.items()}
    label, natural_id = _name(values.get("label")), _name(values.get("id"))
    if spec.task == SEQUENCE_CLASSIFICATION and label is None:
        raise DataError(f"{place}: there is no label in column {columns['label']!r}; classification needs one per row")
    if spec.template:
        prompt = alpaca_prompt(_text(values, "instruction", place), _text(values, "input", place))
        return Row(_text(values, "response", place), prompt, label, natural_id)
    return Row(_text(values, "text", place), label=label, id=natural_id)


def _text(values: Mapping[str, Any], word: str, place: str) -> str:
    value = values.get(word)
    if value is None and word in _OPTIONAL_WORDS:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text for '{word}', got {value!r:.60}")
    return value


def _name(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The Alpaca prompt as alpaca-lora and FedIT's Shepherd write it; no input section where there is no input."""
    paired = ", paired with an input that provides further context" if context else ""
    section = f"### Input:\n{context}\n\n" if context else ""
    return f"{_ALPACA_OPENING.format(paired=paired)}\n\n### Instruction:\n{instruction}\n\n{section}### Response:\n"
