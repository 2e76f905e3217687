"""Divide training examples among clients, by the partitioners of flwr-datasets.

The draw depends on the seed and on the data alone, so every method of a comparison gets the same shards.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from testbed.errors import DataError
from testbed.spelling import did_you_mean
from testbed.task import shuffled

if TYPE_CHECKING:
    from testbed.data_sources import Row

IID = "iid"
DIRICHLET = "dirichlet"
BY_LABEL = "label"
NATURAL = "natural"
PARTITIONS = (IID, DIRICHLET, BY_LABEL, NATURAL)
_NAMED = "name its column with --data-set {0}=COLUMN (in an experiment's file: {0}: COLUMN)"


@dataclass(frozen=True)
class PartitionSpec:
    """How training examples are divided among clients.

    kind   iid        equal shares, drawn at random
           dirichlet  each class is divided by shares drawn from Dirichlet(alpha): the smaller, the more uneven
           label      every client holds `classes_per_client` classes (others may stay unused; the record says which)
           natural    by the data's own id column; where there are more ids than clients, clients hold several
    """

    kind: str = IID
    alpha: float = 0.5
    classes_per_client: int = 2


@dataclass(frozen=True)
class Split:
    """Places in the data set's training examples, one tuple for each client; `record` is JSON, kept with the run."""

    shards: tuple[tuple[int, ...], ...]
    record: Mapping[str, Any]


def divide(rows: Sequence[Row], spec: PartitionSpec, clients: int, seed: int) -> Split:
    """Divide examples, with their labels and natural ids where they have some, among clients.

    Raises DataError when it cannot be done, or would leave a client without examples.
    """
    labels, ids = _all_or_none([row.label for row in rows]), _all_or_none([row.id for row in rows])
    _check(len(rows), spec, clients)
    _check_columns(labels, ids, spec, clients)
    shards = _load(_partitioner(spec, clients, seed), _columns(labels, ids, len(rows), spec, seed))
    if spec.kind == NATURAL:
        shards = _deal(shards, clients, seed)
    empty = [client for client, shard in enumerate(shards) if not shard]
    if empty:
        raise DataError(f"partition '{spec.kind}': clients {empty} would get no example; use fewer clients")
    return Split(shards, _record(shards, labels, ids, len(rows)) | asdict(spec) | {"seed": seed})


def _all_or_none(values: Sequence[str | None]) -> list[str]:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def _check(count: int, spec: PartitionSpec, clients: int) -> None:
    if spec.kind not in PARTITIONS:
        raise DataError(f"partition '{spec.kind}' does not exist; {did_you_mean(spec.kind, PARTITIONS)}")
    if clients < 1:
        raise DataError(f"expected at least one client, got {clients}")
    if count < clients:
        raise DataError(f"{count} training examples cannot be divided among {clients} clients; use fewer clients")
    if spec.kind == DIRICHLET and not spec.alpha > 0:
        raise DataError(f"partition 'dirichlet': expected an alpha above 0, got {spec.alpha}")


def _check_columns(labels: Sequence[str], ids: Sequence[str], spec: PartitionSpec, clients: int) -> None:
    if spec.kind in {DIRICHLET, BY_LABEL} and not labels:
        raise DataError(f"partition '{spec.kind}' needs a label for every text: {_NAMED.format('label')}, or use iid")
    if spec.kind == NATURAL and not ids:
        raise DataError(f"partition 'natural' needs an id for every text: {_NAMED.format('id')}, or use iid")
    if spec.kind == BY_LABEL and not 1 <= spec.classes_per_client <= len(set(labels)):
        raise DataError(
            f"partition 'label': {spec.classes_per_client} classes per client were asked for, the data has "
            f"{len(set(labels))}; choose a number between 1 and that"
        )
    if spec.kind == NATURAL and len(set(ids)) < clients:
        raise DataError(f"partition 'natural': {len(set(ids))} different ids for {clients} clients; use fewer clients")


def _columns(
    labels: Sequence[str], ids: Sequence[str], count: int, spec: PartitionSpec, seed: int
) -> dict[str, Sequence[Any]]:
    """What the partitioner is shown: each example's place, and what it divides by."""
    if spec.kind == IID:
        return {"place": shuffled(count, "iid", seed)}  # the partitioner only cuts; it leaves the order to us
    if spec.kind == NATURAL:
        return {"place": range(count), "id": ids}
    number = {name: place for place, name in enumerate(sorted(set(labels)))}
    return {"place": range(count), "label": [number[name] for name in labels]}


def _partitioner(spec: PartitionSpec, clients: int, seed: int) -> Any:
    # flwr-datasets reports its use to its makers unless told otherwise; it reads this when it is imported.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from flwr_datasets import partitioner

    if spec.kind == IID:
        return partitioner.IidPartitioner(clients)
    if spec.kind == NATURAL:
        return partitioner.NaturalIdPartitioner("id")
    if spec.kind == DIRICHLET:
        return partitioner.DirichletPartitioner(clients, "label", spec.alpha, min_partition_size=1, seed=seed)
    return partitioner.PathologicalPartitioner(
        clients, "label", spec.classes_per_client, class_assignment_mode="first-deterministic", seed=seed
    )


def _load(partitioner: Any, columns: Mapping[str, Sequence[Any]]) -> tuple[tuple[int, ...], ...]:
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({name: list(values) for name, values in columns.items()})
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
        warnings.simplefilter("ignore")  # about draws that it repeats, and classes left unused: our record says so
        try:
            count = partitioner.num_partitions
            return tuple(tuple(partitioner.load_partition(part)["place"]) for part in range(count))
        except ValueError as error:
            raise DataError(
                f"the data cannot be divided so: {str(error).strip()} Use fewer clients, a larger alpha or another "
                "partition."
            ) from None


def _deal(of_ids: tuple[tuple[int, ...], ...], clients: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Whole ids to clients in turn, in a shuffled order."""
    order = shuffled(len(of_ids), "natural", seed)
    return tuple(tuple(place for i in order[client::clients] for place in of_ids[i]) for client in range(clients))


def _record(shards: Sequence[Sequence[int]], labels: Sequence[str], ids: Sequence[str], count: int) -> dict[str, Any]:
    used = {place for shard in shards for place in shard}
    return {
        "examples": [len(shard) for shard in shards],
        "unused_examples": count - len(used),
        "labels": [dict(sorted(Counter(labels[place] for place in shard).items())) for shard in shards if labels],
        "unused_labels": sorted(set(labels) - {labels[place] for place in used}) if labels else [],
        "ids": [len({ids[place] for place in shard}) for shard in shards if ids],
        "sha256": hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
        "flwr_datasets": importlib.metadata.version("flwr-datasets"),
    }
