"""From the command line's words to settings: `--data-set text=body`, `--partition dirichlet:0.3`, `--set rank=8`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from testbed.byte_text import parse_bytes
from testbed.data import DataSpec, PartitionSpec
from testbed.errors import ConfigError, UsageError
from testbed.partition import BY_LABEL, DIRICHLET, PARTITIONS
from testbed.run import BYTES, ENDS
from testbed.spelling import did_you_mean

#: Words of `--data-set` that name a column of the data.
COLUMNS = ("text", "label", "id", "instruction", "input", "response")
_NUMBERS = ("per_class", "limit", "held_out_limit")
_WORDS = ("template", "held_out")
#: Held-out examples that a run is judged on, unless --data-set held_out_limit says otherwise.
HELD_OUT_LIMIT = 400


def pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, as often as given.  Raises UsageError for a text without an equals sign."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} {text}: expected NAME=VALUE")
        found[name] = value
    return found


def data_settings(name: str | None, texts: Sequence[str]) -> dict[str, Any]:
    """Fields of DataSpec from `--data NAME` (None: the task's own data) and `--data-set NAME=VALUE`."""
    named = {} if name is None else {"name": name}
    spec: dict[str, Any] = {**named, "columns": {}, "held_out_limit": HELD_OUT_LIMIT}
    for word, value in pairs("--data-set", texts).items():
        if word in COLUMNS:
            spec["columns"][word] = value
        elif word in _NUMBERS:
            spec[word] = _number(f"--data-set {word}", value, int)
        elif word in _WORDS:
            spec[word] = _share(value) if word == "held_out" else value
        else:
            raise UsageError(f"--data-set {word}: {did_you_mean(word, (*COLUMNS, *_NUMBERS, *_WORDS))}")
    return spec


def partition_settings(text: str) -> dict[str, Any]:
    """Fields of PartitionSpec from KIND or KIND:NUMBER (dirichlet:0.5, label:2)."""
    kind, colon, number = text.partition(":")
    if kind not in PARTITIONS:
        raise UsageError(f"--partition {text}: {did_you_mean(kind, PARTITIONS)}")
    if not colon:
        return {"kind": kind}
    if kind == DIRICHLET:
        return {"kind": kind, "alpha": _number("--partition dirichlet", number, float)}
    if kind == BY_LABEL:
        return {"kind": kind, "classes_per_client": _number("--partition label", number, int)}
    raise UsageError(f"--partition {text}: {kind} takes no number")


def until_settings(texts: Sequence[str]) -> dict[str, float]:
    """What ends a run early, from `--until NAME=NUMBER`; bytes with a unit, too: "bytes=50 MiB"."""
    found = {}
    for name, text in pairs("--until", texts).items():
        if name not in ENDS:
            raise UsageError(f"--until {name}: {did_you_mean(name, ENDS)}")
        found[name] = until_amount(name, text, f"--until {name}")
    return found


def until_amount(name: str, value: str | float, place: str) -> float:
    """One end's amount in its base unit; raises UsageError naming `place`, also for bytes without a unit."""
    if name == BYTES:
        try:
            return parse_bytes(str(value))
        except ConfigError as error:
            raise UsageError(f"{place}: {error}") from None
    return float(value) if not isinstance(value, str) else _number(place, value, float)


def spec_of(given: dict[str, Any], task: str, length: int) -> DataSpec:
    """The data spec of a run's record; task and length are the run's own."""
    known = {field.name for field in dataclasses.fields(DataSpec)}
    return DataSpec(**{**{k: v for k, v in given.items() if k in known}, "task": task, "length": length})


def partition_of(given: dict[str, Any]) -> PartitionSpec:
    """The partition of a run's record."""
    return PartitionSpec(**given)


def _number(option: str, text: str, kind: type[int | float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise UsageError(
            f"{option}: expected {'a whole number' if kind is int else 'a number'}, got {text!r}"
        ) from None


def _share(text: str) -> float | str:
    """A share between 0 and 1, or the name of a file or of a split."""
    try:
        return float(text)
    except ValueError:
        return text
