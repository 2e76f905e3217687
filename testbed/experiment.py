"""An experiment is a matrix of runs.  Its cells are told apart by what decides their result, and by nothing else.

A cell's identity is the SHA-256 of its method with all settings, its run's configuration, its devices, and the content
of model and data where these are files.  Neither the label nor the place of a file has a part in it: a cell that was
run is found again whatever it is called now, and a changed setting makes another cell.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.config import default_inventory, load_inventory
from testbed.data_sources import HUB, SUFFIXES
from testbed.durable import plain
from testbed.errors import ConfigError, UsageError
from testbed.experiment_file import DEFAULT, DataEntry, ExperimentFile, MethodEntry
from testbed.inventory import Inventory
from testbed.options import HELD_OUT_LIMIT, partition_settings
from testbed.package_data import data_folder
from testbed.plugins import make_method
from testbed.run import RunConfig
from testbed.spelling import did_you_mean
from testbed.yaml_file import FileModel, complaint, read_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

#: Files of a model's folder that a run reads.
_MODEL_SUFFIXES = frozenset({".json", ".safetensors"})


@dataclass(frozen=True)
class Cell:
    """One run of the matrix: what decides it, and what the file calls its parts."""

    label: str
    config: RunConfig
    inventory: Inventory
    identity: str  # SHA-256
    circumstances: tuple[str, ...] = ()  # inventory, model and data by their names, where the file has several

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def row(self) -> str:
        """What cells that differ in the seed only have in common."""
        return ", ".join((self.label, *self.circumstances))

    @property
    def title(self) -> str:
        return f"{self.row}, seed {self.seed}"


@dataclass(frozen=True)
class Experiment:
    """The cells, in the order in which they are run."""

    name: str
    path: Path
    cells: tuple[Cell, ...]

    def only(self, labels: Sequence[str]) -> Experiment:
        """The cells of these labels, all where there are none; raises UsageError for a label that no cell has."""
        known = dict.fromkeys(cell.label for cell in self.cells)
        for label in labels:
            if label not in known:
                raise UsageError(f'{self.path}: there is no label "{label}"; {did_you_mean(label, known)}')
        return replace(self, cells=tuple(cell for cell in self.cells if not labels or cell.label in labels))


def load_experiment(name: Path) -> Experiment:
    """Read an experiment's file, or the one of that name that comes along.

    Raises ConfigError for whatever in it is wrong, before anything is run.
    """
    path = _file_of(name)
    file = read_file(path, ExperimentFile, "an experiment")
    return Experiment(file.name, path, _cells(path, file))


def _file_of(name: Path) -> Path:
    bundled = {path.stem: path for path in data_folder("experiments").glob("*.yaml")}
    return bundled[str(name)] if not name.exists() and str(name) in bundled else name


# ── the matrix ──────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class _Choice:
    """One value along an axis of the matrix: what the file calls it, what the run takes, what tells it apart."""

    name: str
    value: Any
    content: Any


def _cells(path: Path, file: ExperimentFile) -> tuple[Cell, ...]:
    """Every method with the first seed comes before any with the second: what is there can be compared early on."""
    inventories = [_inventory(path, index, text) for index, text in enumerate(file.inventories)]
    models = [_model(path, index, name) for index, name in enumerate(file.models)]
    data = [_data(path, index, entry) for index, entry in enumerate(file.data)]
    with _placed(path, "run"):
        _run_config("", {}, _options(file.run))
    configs = {label: _config(path, label, entry, _options(file.run)) for label, entry in file.methods.items()}
    return tuple(
        _cell(label, replace(config, seed=seed), (inventory, model, dataset), (inventories, models, data))
        for inventory in inventories
        for model in models
        for dataset in data
        for seed in file.seeds
        for label, config in configs.items()
    )


def _cell(
    label: str, config: RunConfig, chosen: tuple[_Choice, _Choice, _Choice], axes: tuple[Sequence[_Choice], ...]
) -> Cell:
    inventory, model, data = chosen
    whole = replace(config, model=model.value, data=data.value)
    content = {
        "config": {**_asked_for(whole), "model": model.content, "data": data.content},
        "devices": inventory.content,
    }
    names = tuple(choice.name for choice, axis in zip(chosen, axes, strict=True) if len(axis) > 1)
    return Cell(label, whole, inventory.value, _identity(content), names)


def _asked_for(noun: DataclassInstance) -> dict[str, Any]:
    """The fields that ask for something: one that is new, and empty, makes no other cell of one that is done."""
    known = dataclasses.asdict(noun)
    return {name: value for name, value in known.items() if value or type(value) in (int, float)}


def _identity(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


# ── methods and their options ───────────────────────────────────────────────────────────────────────────────────────
def _config(path: Path, label: str, entry: MethodEntry, common: Mapping[str, Any]) -> RunConfig:
    name = entry.method or label
    with _placed(path, "methods", label):
        make_method(name, {})
    with _placed(path, "methods", label, "set"):
        settings = make_method(name, {key: _text(value) for key, value in entry.set.items()})
    with _placed(path, "methods", label, "run"):
        return _run_config(name, dataclasses.asdict(settings), {**common, **_options(entry.run)})


def _run_config(method: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> RunConfig:
    own = {name: value for name, value in options.items() if name not in {"partition", "no_cap"}}
    return RunConfig(
        method=method,
        settings=settings,
        partition=partition_settings(options.get("partition", "iid")),
        capped=not options.get("no_cap", False),
        **own,
    )


def _options(options: FileModel) -> dict[str, Any]:
    return options.model_dump(exclude_none=True)


def _text(value: object) -> str:
    """A setting as `--set` would have it."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value)


@contextmanager
def _placed(path: Path, *keys: str) -> Iterator[None]:
    """Say of an error in what was asked for where in the file it stands."""
    try:
        yield
    except UsageError as error:
        raise ConfigError(f"{path}: {'.'.join(keys)}: {error}") from None


# ── inventories, models and data ────────────────────────────────────────────────────────────────────────────────────
def _inventory(path: Path, index: int, text: str) -> _Choice:
    file = default_inventory() if text == DEFAULT else _existing(path, ("inventories", index), text, "an inventory")
    inventory = load_inventory(file)
    return _Choice(text, inventory, [_asked_for(device) for device in inventory])


def _model(path: Path, index: int, name: str) -> _Choice:
    if name == DEFAULT:
        return _Choice(name, None, None)
    if "/" not in name and not (path.parent / name / "config.json").is_file():
        return _Choice(name, name, name)
    folder = _existing(path, ("models", index), name, "a model's folder")
    files = [file for file in sorted(folder.glob("*")) if file.suffix in _MODEL_SUFFIXES]
    return _Choice(name, str(folder), {file.name: _file_content(file) for file in files})


def _data(path: Path, index: int, entry: DataEntry) -> _Choice:
    value: dict[str, Any] = {"columns": entry.columns, "held_out_limit": HELD_OUT_LIMIT}
    others = entry.model_dump(exclude_none=True, exclude={*entry.columns, "name"})
    value |= others if entry.name == DEFAULT else {"name": entry.name, **others}
    content = dict(value)
    for key in ("name", "held_out"):
        if _is_path(value.get(key)):
            file = _existing(path, ("data", index, key), value[key], "a file or folder")
            value[key], content[key] = str(file), _content(file)
    return _Choice(entry.name, value, content)


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
