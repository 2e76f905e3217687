"""What a report is made of: runs with their figures, put together where they differ in the seed alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from testbed.costs import round_costs
from testbed.report import summarise
from testbed.run_record import FINISHED
from testbed.statistics import Estimate, estimate
from testbed.stopping import FACT

if TYPE_CHECKING:
    from testbed.costs import RoundCost
    from testbed.experiments.cells import Standing
    from testbed.job import Result
    from testbed.report import DeviceSummary, RunSummary
    from testbed.run_record import RoundRecord
    from testbed.store import RunFolder

#: Series of one figure that eyes and colours can still tell apart.
SHOWN = 8


@dataclass(frozen=True)
class Evidence:
    """One run as a report reads it: everything comes from its folder, and once."""

    folder: RunFolder
    summary: RunSummary

    @classmethod
    def of(cls, folder: RunFolder, target: float | None = None) -> Evidence:
        return cls(folder, summarise(folder, target))

    @property
    def run(self) -> str:
        return self.summary.run

    @property
    def seed(self) -> int:
        """Its seed; 0 where an old record has none."""
        return self.summary.seed or 0

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return self.folder.config

    @cached_property
    def inventory(self) -> Mapping[str, Any]:
        return self.folder.record.inventory

    @cached_property
    def versions(self) -> Mapping[str, Any]:
        return self.folder.record.versions

    @cached_property
    def results(self) -> tuple[Result, ...]:
        """Of every job, without the list of tensors that it sent, which no report shows."""
        return tuple(replace(result, tensors=()) for result in self.folder.results())

    @cached_property
    def rounds(self) -> tuple[RoundRecord, ...]:
        return tuple(self.folder.rounds())

    @cached_property
    def costs(self) -> tuple[RoundCost, ...]:
        return tuple(round_costs(self.folder))

    @cached_property
    def stopped(self) -> Mapping[str, Any] | None:
        """Which end was met (a Stop of `testbed.stopping` as plain data); None where its rounds alone decided."""
        stop = self.folder.status.facts.get(FACT)
        return stop if isinstance(stop, Mapping) else None

    @property
    def examples(self) -> int | None:
        """Held-out examples behind the last quality: an accuracy moves in steps of one in so many."""
        counts = [record.quality.get("examples") for record in self.rounds if record.quality]
        return int(counts[-1]) if counts and counts[-1] else None


@dataclass(frozen=True)
class Group:
    """Runs of one label that differ in the seed alone: one for each seed, finished ones where there is any."""

    label: str  # the method, or what the experiment calls it
    circumstances: tuple[str, ...]  # inventory, model, data, disturbance by name, where a report has several
    runs: tuple[Evidence, ...]
    disturbance: str | None = None  # the last of the circumstances, where runs are told apart by it

    @property
    def name(self) -> str:
        return ", ".join((self.label, *self.circumstances))

    @property
    def first(self) -> Evidence:
        return self.runs[0]

    @property
    def until(self) -> Mapping[str, Any]:
        """What ends its runs early: budgets, a target."""
        return self.first.config.get("until") or {}

    @property
    def resolution(self) -> float:
        """The least step of an accuracy; 0 where the number of examples is not known."""
        counts = [run.examples for run in self.runs]
        known = [count for count in counts if count]
        return 1 / min(known) if known else 0.0

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(device.device for run in self.runs for device in run.summary.devices))

    def on(self, device: str) -> list[DeviceSummary]:
        """What each run says of a device."""
        return [found for run in self.runs for found in run.summary.devices if found.device == device]

    def by_seed(self, figure: Callable[[Evidence], float | None]) -> dict[int, float]:
        """Of the runs that have the figure."""
        values = {run.seed: figure(run) for run in self.runs}
        return {seed: value for seed, value in values.items() if value is not None}

    def over(self, figure: Callable[[RunSummary], float | None], resolution: float = 0.0) -> Estimate | None:
        """A figure over the runs; None where one of them lacks it: a mean of some would pass for the mean of all."""
        return over([figure(run.summary) for run in self.runs], resolution)

    def middle(self, figure: Callable[[RunSummary], float | None]) -> float | None:
        found = self.over(figure)
        return None if found is None else found.mean


@dataclass(frozen=True)
class Material:
    """All runs of a report, in their order, and what they have in common."""

    runs: tuple[Evidence, ...]
    groups: tuple[Group, ...]
    reference: str  # the label that the others are compared with
    target: float | None = None
    standings: tuple[Standing, ...] = ()
    notes: tuple[str, ...] = ()  # of runs that no mean counts

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(group.label for group in self.groups))

    @property
    def circumstances(self) -> tuple[tuple[str, ...], ...]:
        return tuple(dict.fromkeys(group.circumstances for group in self.groups))

    def under(self, circumstances: tuple[str, ...]) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.circumstances == circumstances)

    def reference_of(self, group: Group) -> Group | None:
        """The reference under the same circumstances; None for the reference itself, and where it has no run."""
        if group.label == self.reference:
            return None
        return next((each for each in self.under(group.circumstances) if each.label == self.reference), None)

    @property
    def lacking(self) -> tuple[str, ...]:
        """The note of a table that does not count all of an experiment's runs yet; () where it does."""
        asked = Counter(standing.cell.row for standing in self.standings)
        done = {group.name: len(group.runs) for group in self.groups}
        rows = [f"{row} {done.get(row, 0)} of {count}" for row, count in asked.items() if done.get(row, 0) < count]
        return (f"Not all runs are done: {'; '.join(rows)}.",) if rows else ()

    @cached_property
    def shown(self) -> tuple[str, ...]:
        """The labels that figures draw: all, or where these are too many the reference and the best of the others."""
        if len(self.labels) <= SHOWN:
            return self.labels
        others = sorted((label for label in self.labels if label != self.reference), key=self._quality, reverse=True)
        chosen = {self.reference, *others[: SHOWN - 1]}
        return tuple(label for label in self.labels if label in chosen)

    def _quality(self, label: str) -> float:
        """Accuracy, or where there is none the loss turned round; of the first circumstances that have it."""
        for figure, sign in ((_accuracy, 1.0), (_loss, -1.0)):
            for group in self.groups:
                value = group.middle(figure) if group.label == label else None
                if value is not None:
                    return sign * value
        return float("-inf")

    def drawn(self, groups: Iterable[Group]) -> list[Group]:
        return [group for group in groups if group.label in self.shown]

    def not_drawn(self, groups: Iterable[Group]) -> tuple[str, ...]:
        """The note of a figure that does not draw every label; () where it does."""
        labels = dict.fromkeys(group.label for group in groups)
        drawn = [label for label in labels if label in self.shown]
        if len(drawn) == len(labels):
            return ()
        return (f"Drawn are {len(drawn)} of {len(labels)} methods: {self.reference} and the best; the table has all.",)

    @property
    def choice(self) -> tuple[str, ...]:
        """Which labels figures draw, for the page's beginning; () where they draw all."""
        left = [label for label in self.labels if label not in self.shown]
        if not left:
            return ()
        text = (
            f"Curves, peaks, phases and time lines are drawn of {self.reference} and the {SHOWN - 1} best others only"
        )
        return (f"{text}, by their quality at the end. Not drawn, but in every table: {'; '.join(left)}.",)

    @property
    def order(self) -> tuple[str, ...]:
        """Names of series, those that figures draw first: their colours are the most distinct."""
        ordered = [*self.shown, *self.labels]
        names = [group.name for label in dict.fromkeys(ordered) for group in self.groups if group.label == label]
        return tuple(dict.fromkeys([*ordered, *names]))

    @property
    def replayed(self) -> bool:
        """Whether a power was played back and not measured."""
        summaries = [device.energy for run in self.runs for device in run.summary.devices]
        return any(energy.gross.replayed for energy in summaries if energy is not None)

    @property
    def emulated(self) -> bool:
        """Whether a device was emulated: its seconds are those of the machine that emulates it."""
        return any(device.emulated for run in self.runs for device in run.summary.devices)


def over(values: Sequence[float | None], resolution: float = 0.0) -> Estimate | None:
    """The estimate over runs; None where one of them lacks the figure, or there is no run.

    Runs that agree to the last digit counted the same thing: that is no interval of no width.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    found = estimate(known, resolution=resolution)
    return found if found.half_width != 0 else replace(found, low=None, high=None)


def counted(runs: Sequence[Evidence]) -> tuple[Evidence, ...]:
    """Of the runs of one group those that its means count: one for each seed, the last; finished ones, if any is."""
    finished = [run for run in runs if run.summary.state == FINISHED] or runs
    by_seed = {run.seed: run for run in finished}
    return tuple(by_seed[seed] for seed in sorted(by_seed))


def _accuracy(run: RunSummary) -> float | None:
    return run.accuracy


def _loss(run: RunSummary) -> float | None:
    return run.loss
