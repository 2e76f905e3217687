"""A run as experiment trackers have it: parameters, metrics by round, figures of the whole, and tags."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from testbed.costs import round_costs
from testbed.exports.rows import run_row
from testbed.report import summarise

if TYPE_CHECKING:
    from testbed.store import RunFolder

#: The tag by which an exported run is found again.
RUN_TAG = "testbed_run"
#: Of the run's row: figures that trackers plot and sort by.
_FIGURES = (
    "accuracy", "accuracy_best", "loss", "loss_best", "seconds", "rounds", "majority", "bag_of_words", "no_fine_tuning",
    "clients", "clients_refused", "jobs_failed", "bytes_down", "bytes_up", "measurement_bytes", "deployed_bytes",
    "tokens_per_second", "peak_worst_bytes", "energy_joules", "energy_low_joules", "energy_high_joules",
)  # fmt: skip
_TAGS = ("method", "seed", "experiment", "label", "state", "emulated", "energy_valid", "energy_replayed", "commit")
#: Of a configuration: told elsewhere, or too long to be a parameter.
_LEFT_OUT = frozenset({"settings", "split", "shards", "classes", "data_record", "reference", "experiment"})


@dataclass(frozen=True)
class Tracked:
    """What both trackers are given.  Nothing that was not measured is among it: a tracker has no null."""

    run: str
    parameters: Mapping[str, Any]
    rounds: tuple[tuple[int, Mapping[str, float]], ...]  # round, counted from 1 as a step → metric → value
    figures: Mapping[str, float]
    tags: Mapping[str, str]


def tracked(folder: RunFolder) -> Tracked:
    """A run as it stands.  Raises StoreError for what cannot be read."""
    values = run_row(folder, summarise(folder)).values
    tags = {name: str(values[name]) for name in _TAGS if values.get(name) is not None}
    return Tracked(
        folder.run_id,
        dict(_parameters(folder.config)),
        tuple(_rounds(folder)),
        {name: float(values[name]) for name in _FIGURES if values.get(name) is not None},
        {RUN_TAG: folder.run_id, **tags},
    )


def _parameters(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The configuration, flat: `settings.rank`; lists and the like as JSON."""
    for name, value in config.items():
        if name not in _LEFT_OUT:
            yield from _flat(name, value)
    yield from _flat("settings", config.get("settings") or {})


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        yield name, json.dumps(value, ensure_ascii=False)
    else:
        yield name, value


def _rounds(folder: RunFolder) -> Iterator[tuple[int, dict[str, float]]]:
    """Quality, training loss, and costs: sums up to the end of each round, as the table `rounds` has them."""
    costs = {cost.round: cost for cost in round_costs(folder)}
    for record in folder.rounds():
        cost = costs[record.round]
        told = {
            "accuracy": cost.accuracy,
            "loss": cost.loss,
            "train_loss": record.train_loss,
            "learning_rate": record.learning_rate,
            "participants": record.participants,
            "finished": record.finished,
            "round_seconds": record.seconds,
            "total_seconds": cost.seconds,
            "total_joules": cost.joules,
            "total_bytes_down": cost.bytes_down,
            "total_bytes_up": cost.bytes_up,
        }
        yield record.round + 1, {name: float(value) for name, value in told.items() if value is not None}
