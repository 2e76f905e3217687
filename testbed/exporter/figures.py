"""The series of one process as they stand now: set by whoever knows something, read by a scrape, from any thread."""

from __future__ import annotations

import threading
from collections import ChainMap
from typing import TYPE_CHECKING

from testbed.exporter.families import COUNTER, FAMILIES
from testbed.run_record import finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prometheus_client import CollectorRegistry, Metric

    from testbed.exporter.families import Family


class Figures:
    """Values by family and labels."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held over several calls, they are seen together or not at all
        self._values: dict[str, dict[tuple[str, ...], float]] = {}

    def set(self, name: str, value: float | None, **labels: str | None) -> None:
        """What a series says from now on; None, or no finite number: nothing, it is gone."""
        key, value = _key(FAMILIES[name], labels), finite(value)
        with self.lock:
            series = self._values.setdefault(name, {})
            if value is None:
                series.pop(key, None)
            else:
                series[key] = float(value)

    def add(self, name: str, value: float, **labels: str | None) -> None:
        """Count on, from 0."""
        key = _key(FAMILIES[name], labels)
        with self.lock:
            series = self._values.setdefault(name, {})
            series[key] = series.get(key, 0.0) + value

    def get(self, name: str, **labels: str | None) -> float | None:
        """What a series says now; None when there is none."""
        return self._values.get(name, {}).get(_key(FAMILIES[name], labels))

    def labels(self, name: str, **only: str) -> list[dict[str, str]]:
        """The labels of all series of a family that have these values."""
        names = FAMILIES[name].labels
        with self.lock:
            found = [dict(zip(names, key, strict=True)) for key in self._values.get(name, {})]
        return [labels for labels in found if only.items() <= labels.items()]

    def forget(self, name: str, **only: str) -> None:
        """Remove all series of a family that have these labels."""
        with self.lock:
            for labels in self.labels(name, **only):
                self.set(name, None, **labels)

    def become(self, other: Figures) -> None:
        """Say what another one says, and nothing else."""
        with self.lock:
            self._values = other._values

    def snapshot(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Family → values of its labels, in order → value."""
        with self.lock:
            return {name: dict(series) for name, series in self._values.items() if series}


class _Together:
    """A collector for prometheus_client: every family once, whoever adds to it."""

    def __init__(self, figures: Sequence[Figures]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        snapshots = [each.snapshot() for each in self._figures]
        for name in dict.fromkeys(name for snapshot in snapshots for name in snapshot):
            yield _metric(FAMILIES[name], dict(ChainMap(*(snapshot.get(name, {}) for snapshot in snapshots))))


def registry_of(*figures: Figures) -> CollectorRegistry:
    """A registry of our own: nothing of the process or of another library comes along."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Together(figures))
    return registry


def _key(family: Family, labels: dict[str, str | None]) -> tuple[str, ...]:
    if labels.keys() != set(family.labels):
        raise ValueError(f"{family.name}: expected the labels {family.labels}, got {tuple(labels)}")
    return tuple(labels[name] or "" for name in family.labels)


def _metric(family: Family, series: dict[tuple[str, ...], float]) -> Metric:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    made = CounterMetricFamily if family.kind == COUNTER else GaugeMetricFamily
    metric = made(family.name, family.about, labels=family.labels)
    for key, value in series.items():
        metric.add_metric(key, value)
    return metric
