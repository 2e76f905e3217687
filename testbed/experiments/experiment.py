"""An experiment is a matrix of runs.  Its cells are told apart by what decides their result, and by nothing else.

A cell's identity is the SHA-256 of its method with all settings, its run's configuration, its devices, and the content
of model and data where these are files.  Neither the label nor the place of a file has a part in it: a cell that was
run is found again whatever it is called now, and a changed setting makes another cell.

Cells are run in blocks, one for each seed, so that whatever has been done so far can be compared.  Within a block their
order is drawn, so that what drifts meanwhile (warmth, other work) does not fall on the same method every time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from testbed import disturbances
from testbed.durable import plain
from testbed.errors import ConfigError, UsageError
from testbed.experiments.choices import (
    Choice,
    asked_for,
    data_choice,
    inventory_choice,
    model_choice,
    varied_options,
)
from testbed.experiments.file import ExperimentFile, MethodEntry, ProtocolEntry
from testbed.inventory import Inventory
from testbed.options import partition_settings, until_amount
from testbed.package_data import data_folder
from testbed.plugins import make_method
from testbed.run import ACCURACY, RunConfig
from testbed.spelling import did_you_mean
from testbed.yaml_file import FileModel, read_file

#: What a run without the disturbances of a robustness protocol is called.
CLEAN = "clean"


@dataclass(frozen=True)
class Protocol:
    """How the methods are judged.  Empty: by where they stand after their last round.

    budgets       what a run may spend, in base units: "seconds", "joules", "bytes"
    target        the accuracy that a run is to reach
    disturbances  name → what every run is done under once more
    """

    budgets: Mapping[str, float] = field(default_factory=dict)
    target: float | None = None
    disturbances: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def until(self) -> dict[str, float]:
        """What ends a run early."""
        return {**self.budgets, **({} if self.target is None else {ACCURACY: self.target})}


@dataclass(frozen=True)
class Cell:
    """One run of the matrix: what decides it, and what the file calls its parts."""

    label: str
    config: RunConfig
    inventory: Inventory
    identity: str  # SHA-256
    circumstances: tuple[str, ...] = ()  # inventory, model, data, options and disturbance, where the file has several
    disturbance: str | None = None  # by name, or CLEAN: the last of the circumstances; None: the experiment knows none

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
    """The cells, in the order of the file."""

    name: str
    path: Path
    cells: tuple[Cell, ...]
    reference: str = ""  # the label that the others are compared with
    order_seed: int = 0
    protocol: Protocol = field(default_factory=Protocol)

    @property
    def drawn(self) -> tuple[Cell, ...]:
        """The cells in the order in which they are run: seed by seed, and within one as it was drawn."""
        seeds = dict.fromkeys(cell.seed for cell in self.cells)
        return tuple(cell for seed in seeds for cell in _block(self.cells, self.order_seed, seed))

    def only(self, labels: Sequence[str]) -> Experiment:
        """The cells of these labels, all where there are none; raises UsageError for a label that no cell has."""
        known = dict.fromkeys(cell.label for cell in self.cells)
        for label in labels:
            if label not in known:
                raise UsageError(f'{self.path}: there is no label "{label}"; {did_you_mean(label, known)}')
        cells = tuple(cell for cell in self.cells if not labels or cell.label in labels)
        reference = self.reference if not labels or self.reference in labels else cells[0].label
        return replace(self, cells=cells, reference=reference)


def load_experiment(name: Path) -> Experiment:
    """Read an experiment's file, or the one of that name that comes along.

    Raises ConfigError for whatever in it is wrong, before anything is run; UsageError where there is no such file.
    """
    path = _file_of(name)
    file = read_file(path, ExperimentFile, "an experiment")
    labels = tuple(file.methods)
    reference = file.reference or labels[0]
    if reference not in labels:
        raise ConfigError(f'{path}: reference: there is no label "{reference}"; {did_you_mean(reference, labels)}')
    protocol = _protocol(path, file.protocol)
    return Experiment(file.name, path, _cells(path, file, protocol), reference, file.order_seed, protocol)


def bundled() -> dict[str, Path]:
    """Name → file of the experiments that come along; inventories beside them are none."""
    return {path.stem: path for path in sorted(data_folder("experiments").glob("*.yaml")) if _is_experiment(path)}


def _is_experiment(path: Path) -> bool:
    return any(line.startswith("methods:") for line in path.read_text(encoding="utf-8").splitlines())


def _no_such_experiment(name: Path) -> UsageError:
    """The error for a name that is neither a file nor one that comes along."""
    known = did_you_mean(name.name.removesuffix(".yaml"), bundled())
    return UsageError(f"{name}: there is no such experiment file; {known} (these come along)")


def _file_of(name: Path) -> Path:
    if name.exists():
        return name
    known = bundled()
    if str(name) not in known:
        raise _no_such_experiment(name)
    return known[str(name)]


def _block(cells: Sequence[Cell], order_seed: int, seed: int) -> list[Cell]:
    """The cells of a seed in an order that is drawn for each of them alone: one more cell moves none of the others."""

    def drawn(cell: Cell) -> bytes:
        return hashlib.sha256(f"{order_seed}/{seed}/{cell.identity}".encode()).digest()

    return sorted((cell for cell in cells if cell.seed == seed), key=drawn)


# ── the matrix ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _cells(path: Path, file: ExperimentFile, protocol: Protocol) -> tuple[Cell, ...]:
    """All of them, in the order of the file."""
    axes = (
        [inventory_choice(path, index, text) for index, text in enumerate(file.inventories)],
        [model_choice(path, index, name) for index, name in enumerate(file.models)],
        [data_choice(path, index, entry) for index, entry in enumerate(file.data)],
    )
    _said_once(path, file, protocol)
    with _placed(path, "run"):
        _run_config("", {}, _options(file.run))
    common = _options(file.run)
    varied = [
        (names, {label: _config(path, label, entry, common, options) for label, entry in file.methods.items()})
        for names, options in varied_options(_options(file.vary))
    ]
    return tuple(
        _cell(label, replace(config, seed=seed, until=protocol.until or config.until), chosen, axes, names, disturbed)
        for chosen in itertools.product(*axes)
        for names, configs in varied
        for disturbed in _disturbed(protocol)
        for seed in file.seeds
        for label, config in configs.items()
    )


def _cell(
    label: str,
    config: RunConfig,
    chosen: Sequence[Choice],
    axes: Sequence[Sequence[Choice]],
    varied: tuple[str, ...],
    disturbed: tuple[str | None, Mapping[str, Any]],
) -> Cell:
    inventory, model, data = chosen
    disturbance, what = disturbed
    whole = replace(config, model=model.value, data=data.value, disturbances=what or config.disturbances)
    content = {
        "config": {**asked_for(whole), "model": model.content, "data": data.content},
        "devices": inventory.content,
    }
    names = tuple(choice.name for choice, axis in zip(chosen, axes, strict=True) if len(axis) > 1)
    circumstances = (*names, *varied, *(() if disturbance is None else (disturbance,)))
    return Cell(label, whole, inventory.value, _identity(content), circumstances, disturbance)


def _disturbed(protocol: Protocol) -> list[tuple[str | None, Mapping[str, Any]]]:
    """Every run once, or clean and once under each set of disturbances."""
    return [(CLEAN, {}), *protocol.disturbances.items()] if protocol.disturbances else [(None, {})]


def _identity(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


# ── methods, their options, and the protocol ────────────────────────────────────────────────────────────────────────
def _config(
    path: Path, label: str, entry: MethodEntry, common: Mapping[str, Any], varied: Mapping[str, Any]
) -> RunConfig:
    name = entry.method or label
    with _placed(path, "methods", label):
        make_method(name, {})
    with _placed(path, "methods", label, "set"):
        settings = make_method(name, {key: _text(value) for key, value in entry.set.items()})
    own = _options(entry.run)
    with _placed(path, "methods", label, "run"):
        config = _run_config(name, dataclasses.asdict(settings), {**common, **own})
    if not varied:
        return config
    with _placed(path, "vary"):
        return _run_config(name, dataclasses.asdict(settings), {**common, **varied, **own})


def _run_config(method: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> RunConfig:
    own = {name: value for name, value in options.items() if name not in {"partition", "no_cap"}}
    if "until" in own:
        own["until"] = {name: until_amount(name, value, f"until.{name}") for name, value in own["until"].items()}
    if "disturbances" in own:
        own["disturbances"] = disturbances.parse(own["disturbances"]).to_json()
    return RunConfig(
        method=method,
        settings=settings,
        partition=partition_settings(options.get("partition", "iid")),
        capped=not options.get("no_cap", False),
        **own,
    )


def _protocol(path: Path, entry: ProtocolEntry | None) -> Protocol:
    if entry is None:
        return Protocol()
    with _placed(path, "protocol", "quality_under_budget"):
        stated = _options(entry.quality_under_budget) if entry.quality_under_budget else {}
        budgets = {name: until_amount(name, value, name) for name, value in stated.items()}
        RunConfig("", until=budgets)
    found = {}
    for name, declared in (entry.robustness or {}).items():
        if name == CLEAN:
            raise ConfigError(f'{path}: protocol.robustness.{name}: expected another name: "{CLEAN}" is without any')
        with _placed(path, "protocol", "robustness"):
            found[name] = disturbances.parse(declared, name).to_json()
        if not found[name]:
            raise ConfigError(f"{path}: protocol.robustness.{name}: expected a mapping such as {{dropout: 0.3}}")
    return Protocol(budgets, entry.cost_to_target.accuracy if entry.cost_to_target else None, found)


def _said_once(path: Path, file: ExperimentFile, protocol: Protocol) -> None:
    """Raise ConfigError where an option stands in two places of which one would be forgotten in silence."""
    taken = dict.fromkeys(_options(file.vary), "vary")
    taken |= {"until": "protocol"} if protocol.until else {}
    taken |= {"disturbances": "protocol"} if protocol.disturbances else {}
    places = {"run": file.run, **{f"methods.{label}.run": entry.run for label, entry in file.methods.items()}}
    for place, options in places.items():
        for name in _options(options):
            if name in taken:
                raise ConfigError(f"{path}: {place}.{name}: {taken[name]} says it too; leave one of them out")


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
