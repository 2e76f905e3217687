"""A YAML file of the user, read and checked; a complaint names file, key path, what was expected and what stood there.

inventory/lab.yaml: devices.orin-1.budget.memory: expected bytes such as "4 GiB", got "4gb"
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from testbed.errors import ConfigError
from testbed.spelling import did_you_mean

KeyPath = tuple[str | int, ...]
Model = TypeVar("Model", bound="FileModel")
_SHOWN_CHARACTERS = 60


class FileModel(BaseModel):
    """Base of what a file may hold.  A field's `title` completes "expected …"; its `description` says what it does."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def read_file(path: Path, model: type[Model], what: str) -> Model:
    """Read the file as `model`; `what` names it in messages ("an inventory").  Raises ConfigError."""
    data = _parse(_text(path, what), path, what)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaints(error, model, path))) from None


def complaint(path: Path, keys: Sequence[str | int], expected: str, got: object) -> str:
    """One line of the form that every message about a file has."""
    return f"{path}: {_joined(keys)}expected {expected}, got {shown(got)}"


def shown(value: object) -> str:
    """A value as the user wrote it, more or less; "nothing" for None."""
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def expected_at(model: type[BaseModel], keys: Sequence[str | int]) -> str | None:
    """The title of the field at that key path, or of the nearest one around it."""
    found: Any = model
    title = None
    for key in keys:
        found, inner_title = _step(found, key)
        title = inner_title or title
    return title


def _step(annotation: Any, key: str | int) -> tuple[Any, str | None]:
    """The annotation and the title under one key: of a field, or of any value in `dict[str, Model]`."""
    model = _model_in(annotation)
    if model is None:
        return (get_args(annotation) or (None,))[-1], None
    field = model.model_fields.get(str(key))
    return (None, None) if field is None else (field.annotation, field.title)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model itself, or the one in `Model | None`; None for a mapping, whose next key is a name."""
    candidates = get_args(annotation) if get_origin(annotation) in {Union, UnionType} else (annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected {what} file, got nothing: there is no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: expected {what} file, got a folder") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected {what} file, got one that is no text (UTF-8)") from None
    except OSError as error:
        raise ConfigError(f"{path}: expected {what} file, got one that cannot be read: {error.strerror}") from None


def _parse(text: str, path: Path, what: str) -> dict[str, Any]:
    try:
        data = _load(text, path)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}: expected YAML, got {_problem(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: expected YAML, got {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected {what} (a mapping), got {shown(data)}")
    return data


def _load(text: str, path: Path) -> Any:
    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    if root is None:
        return None
    _refuse_duplicates(root, path)
    return loader.construct_document(root)


def _problem(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
    return f"an error{place}: {error.problem or error.context}"


def _refuse_duplicates(root: yaml.Node, path: Path) -> None:
    """YAML lets a later key overwrite an earlier one in silence: a device would vanish."""
    for keys, first, second in _duplicates(root, (), set()):
        lines = f"lines {first.start_mark.line + 1} and {second.start_mark.line + 1}"
        raise ConfigError(f"{path}: {_joined(keys)}expected each name once, got it twice ({lines})")


def _duplicates(node: yaml.Node, keys: KeyPath, seen: set[int]) -> Iterator[tuple[KeyPath, yaml.Node, yaml.Node]]:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates(item, (*keys, index), seen)
    elif isinstance(node, yaml.MappingNode):
        known: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = str(key.value)
            if name in known:
                yield (*keys, name), known[name], key
            known[name] = key
            yield from _duplicates(value, (*keys, name), seen)


def _complaints(error: ValidationError, model: type[BaseModel], path: Path) -> Iterator[str]:
    for detail in sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden"):  # causes first
        keys = detail["loc"]
        if detail["type"] == "extra_forbidden":
            yield f"{path}: {_joined(keys)}unknown key; {did_you_mean(str(keys[-1]), _keys_beside(model, keys))}"
        elif keys and keys[-1] == "[key]":
            expected = f"a name in its place ({_message(detail)})"
            yield complaint(path, keys[:-2], expected, detail["input"])
        elif detail["type"] == "missing":
            yield complaint(path, keys, expected_at(model, keys) or "a value", None)
        else:
            yield complaint(path, keys, expected_at(model, keys) or _message(detail), detail["input"])


def _keys_beside(model: type[BaseModel], keys: Sequence[str | int]) -> tuple[str, ...]:
    """The names that the mapping which holds the last key may have."""
    found: Any = model
    for key in keys[:-1]:
        found, _ = _step(found, key)
    inner = _model_in(found)
    return () if inner is None else tuple(inner.model_fields)


def _message(detail: Mapping[str, Any]) -> str:
    return (
        str(detail["msg"]).removeprefix("Input should be ").removeprefix("String should ").removeprefix("Value error, ")
    )


def _joined(keys: Sequence[str | int]) -> str:
    """`devices.orin-1.tags[0]: `, or nothing for the file as a whole."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return f"{text.removeprefix('.')}: " if text else ""
