"""The finished runs of an experiment, by method and circumstances, and each method against the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from testbed.costs import RoundCost, round_costs
from testbed.experiments.cells import DONE
from testbed.quantities import number_text
from testbed.report import summarise
from testbed.reports.exhibits import Column, Table, Value, bytes_column, figure_column, name_column, seconds_column
from testbed.statistics import CONFIDENCE, MIN_RUNS, Estimate, Paired, estimate, paired
from testbed.stopping import FACT

if TYPE_CHECKING:
    from testbed.experiments.cells import Standing
    from testbed.experiments.experiment import Experiment
    from testbed.report import RunSummary


@dataclass(frozen=True)
class DoneRun:
    """A finished run with what it has cost by the end of each round, and why it ended, where it was given ends."""

    summary: RunSummary
    costs: tuple[RoundCost, ...]
    stopped: Mapping[str, Any] | None = None  # testbed.stopping.Stop as plain data

    @property
    def examples(self) -> int | None:
        """Held-out examples that it was judged on."""
        known = [cost.quality["examples"] for cost in self.costs if cost.quality and cost.quality.get("examples")]
        return int(known[-1] or 0) if known else None

    @property
    def last(self) -> RoundCost | None:
        return self.costs[-1] if self.costs else None


Figure = Callable[[DoneRun], float | None]


@dataclass(frozen=True)
class Row:
    """A method under the same circumstances, with all of its seeds."""

    name: str
    label: str
    circumstances: tuple[str, ...]
    disturbance: str | None
    seeds: tuple[int, ...]
    runs: Mapping[int, DoneRun]  # seed → its finished run

    @property
    def done_text(self) -> str:
        return f"{len(self.runs)} of {len(self.seeds)}"

    @property
    def resolution(self) -> float:
        """The least step of an accuracy: one held-out example; 0 where their number is not known."""
        known = [run.examples for run in self.runs.values() if run.examples]
        return 1 / min(known) if known else 0.0

    def by_seed(self, figure: Figure) -> dict[int, float]:
        """Of the runs that have the figure."""
        found = {seed: figure(run) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def over_seeds(self, figure: Figure, resolution: float = 0.0) -> Estimate | None:
        """None where a finished run lacks the figure, or there is none: a mean of the others would pass for all."""
        found = self.by_seed(figure)
        if not found or len(found) < len(self.runs):
            return None
        return estimate(list(found.values()), resolution=resolution)


@dataclass(frozen=True)
class Outcome:
    """What has come of an experiment so far."""

    experiment: Experiment
    standings: tuple[Standing, ...]
    rows: tuple[Row, ...]
    done: Mapping[str, DoneRun]  # identity of a cell → its run; two labels for the same cell share it

    @classmethod
    def of(cls, experiment: Experiment, standings: Sequence[Standing]) -> Outcome:
        """Reads the run folders of the cells that are done.  Raises StoreError for one that cannot be read."""
        done: dict[str, DoneRun] = {}
        groups: dict[str, list[Standing]] = {}
        for standing in standings:
            groups.setdefault(standing.cell.row, []).append(standing)
            if standing.state == DONE and standing.run is not None and standing.cell.identity not in done:
                run, stopped = standing.run, standing.run.status.facts.get(FACT)
                done[standing.cell.identity] = DoneRun(summarise(run), tuple(round_costs(run)), stopped)
        rows = tuple(_row(name, members, done) for name, members in groups.items())
        return cls(experiment, tuple(standings), rows, done)

    def reference_of(self, row: Row) -> Row | None:
        """The reference under the same circumstances; None for the reference itself."""
        if row.label == self.experiment.reference:
            return None
        return next((each for each in self._beside(row) if each.label == self.experiment.reference), None)

    def against_reference(self, row: Row, figure: Figure, *, higher_is_better: bool, resolution: float = 0.0) -> Paired:
        """Paired on the seeds; the error is shared by all that are compared under these circumstances."""
        reference = self.reference_of(row)
        others = [each for each in self._beside(row) if each.label != self.experiment.reference]
        theirs = reference.by_seed(figure) if reference else {}
        return paired(
            row.by_seed(figure),
            theirs,
            higher_is_better=higher_is_better,
            comparisons=max(1, len(others)),
            resolution=max(resolution, reference.resolution if reference and resolution else 0.0),
        )

    def _beside(self, row: Row) -> list[Row]:
        return [each for each in self.rows if each.circumstances == row.circumstances]


def _row(name: str, members: Sequence[Standing], done: Mapping[str, DoneRun]) -> Row:
    cell = members[0].cell
    runs = {each.cell.seed: done[each.cell.identity] for each in members if each.cell.identity in done}
    return Row(name, cell.label, cell.circumstances, cell.disturbance, tuple(each.cell.seed for each in members), runs)


# ── where the methods stand in the end ──────────────────────────────────────────────────────────────────────────────
METHOD = name_column("method", "Method")
SEEDS = name_column("seeds", "Seeds")
COSTS = (
    seconds_column("seconds", "Time"),
    Column("joules", "Energy (J)", lambda value: number_text(value, 1)),
    bytes_column("bytes", "Bytes"),
)


def comparison_columns(outcome: Outcome, heading: str, column: Callable[[str, str], Column]) -> tuple[Column, ...]:
    """The difference to the reference and the verdict."""
    reference = outcome.experiment.reference
    return column("difference", f"{heading} less {reference}'s"), name_column("verdict", "Verdict")


def compared(row: Row, found: Paired, outcome: Outcome) -> tuple[Value, Value]:
    """Of a row; nothing of the reference itself, and of one that has no reference beside it."""
    return (None, None) if outcome.reference_of(row) is None else (found.difference, found.verdict)


def intervals_note(outcome: Outcome) -> str:
    """What the intervals and verdicts of a table are."""
    return (
        f"± is half of Student's t interval at {100 * CONFIDENCE:.0f} % over the seeds; differences are paired on the "
        f"seed, and those beside each other share its error (Bonferroni).  With fewer than {MIN_RUNS} runs there is "
        f"neither.  The reference is {outcome.experiment.reference}."
    )


def end_table(outcome: Outcome) -> Table:
    """Every method over its seeds, after its last round."""
    columns = (
        METHOD, SEEDS, figure_column("accuracy", "Accuracy"), figure_column("loss", "Loss"), *COSTS,
        *comparison_columns(outcome, "Accuracy", figure_column),
    )  # fmt: skip
    rows = tuple(_end_row(row, outcome) for row in outcome.rows)
    return Table("over_seeds", "over seeds", intervals_note(outcome), columns, rows)


def _end_row(row: Row, outcome: Outcome) -> tuple[Value, ...]:
    found = outcome.against_reference(row, accuracy, higher_is_better=True, resolution=row.resolution)
    return (
        row.name,
        row.done_text,
        row.over_seeds(accuracy, row.resolution),
        row.over_seeds(loss),
        *costs(row, lambda run: run.last),
        *compared(row, found, outcome),
    )


def costs(row: Row, which: Callable[[DoneRun], RoundCost | None]) -> tuple[Value, Value, Value]:
    """Seconds, joules and bytes by the end of one round of each run."""

    def figure(value: Callable[[RoundCost], float | None]) -> Figure:
        return lambda run: None if (cost := which(run)) is None else value(cost)

    return (
        row.over_seeds(figure(lambda cost: cost.seconds)),
        row.over_seeds(figure(lambda cost: cost.joules)),
        row.over_seeds(figure(lambda cost: cost.bytes)),
    )


def accuracy(run: DoneRun) -> float | None:
    return run.summary.accuracy


def loss(run: DoneRun) -> float | None:
    return run.summary.loss
