"""What stands along the axes of an experiment: inventories, models, data, and options of its runs.

What tells a choice apart is its content: the place of a file has no part in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.config import default_inventory, load_inventory
from testbed.data_sources import HUB, SUFFIXES
from testbed.errors import ConfigError
from testbed.experiments.file import DEFAULT, DataEntry
from testbed.options import HELD_OUT_LIMIT
from testbed.yaml_file import complaint

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

#: Files of a model's folder that a run reads.
_MODEL_SUFFIXES = frozenset({".json", ".safetensors"})


@dataclass(frozen=True)
class Choice:
    """One value along an axis of the matrix: what the file calls it, what the run takes, what tells it apart."""

    name: str
    value: Any
    content: Any


def inventory_choice(path: Path, index: int, text: str) -> Choice:
    """An inventory of the file at `path`; raises ConfigError."""
    file = default_inventory() if text == DEFAULT else _existing(path, ("inventories", index), text, "an inventory")
    inventory = load_inventory(file)
    return Choice(text, inventory, [asked_for(device) for device in inventory])


def model_choice(path: Path, index: int, name: str) -> Choice:
    """A base model; raises ConfigError for a folder that is not there."""
    if name == DEFAULT:
        return Choice(name, None, None)
    if "/" not in name and not (path.parent / name / "config.json").is_file():
        return Choice(name, name, name)
    folder = _existing(path, ("models", index), name, "a model's folder")
    files = [file for file in sorted(folder.glob("*")) if file.suffix in _MODEL_SUFFIXES]
    return Choice(name, str(folder), {file.name: _file_content(file) for file in files})


def data_choice(path: Path, index: int, entry: DataEntry) -> Choice:
    """A data set, as `RunConfig.data` has it; raises ConfigError for a file that is not there."""
    value: dict[str, Any] = {"columns": entry.columns, "held_out_limit": HELD_OUT_LIMIT}
    others = entry.model_dump(exclude_none=True, exclude={*entry.columns, "name"})
    value |= others if entry.name == DEFAULT else {"name": entry.name, **others}
    content = dict(value)
    for key in ("name", "held_out"):
        if _is_path(value.get(key)):
            file = _existing(path, ("data", index, key), value[key], "a file or folder")
            value[key], content[key] = str(file), _content(file)
    return Choice(entry.name, value, content)


def varied_options(vary: Mapping[str, Sequence[Any]]) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every combination of the options that vary, with what each is called where there are several of it."""
    found = []
    for values in itertools.product(*vary.values()):
        options = dict(zip(vary, values, strict=True))
        found.append((tuple(f"{name} {value}" for name, value in options.items() if len(vary[name]) > 1), options))
    return found


def asked_for(noun: DataclassInstance) -> dict[str, Any]:
    """The fields that ask for something: one that is new, and empty, makes no other cell of one that is done."""
    known = dataclasses.asdict(noun)
    return {name: value for name, value in known.items() if value or type(value) in (int, float)}


def _is_path(text: object) -> bool:
    return isinstance(text, str) and not text.startswith(HUB) and ("/" in text or Path(text).suffix in SUFFIXES)


def _existing(path: Path, keys: Sequence[str | int], text: str, what: str) -> Path:
    """Where the file or folder stands; raises ConfigError when there is none."""
    found = (path.parent / Path(text).expanduser()).resolve()
    if not found.exists():
        raise ConfigError(f"{complaint(path, keys, what, text)}: there is no {found}")
    return found


def _content(path: Path) -> Any:
    """The hash of a file, or of every file below a folder by its place there."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        return {str(file.relative_to(path)): _file_content(file) for file in files}
    return _file_content(path)


@cache
def _file_content(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
