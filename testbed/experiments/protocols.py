"""Methods judged by a protocol: quality under a budget, cost to a target, robustness.

The three are those of EdgeFlowerTune (arXiv:2605.08636).  Memory is a budget of the inventory: a method that does not
keep it has no run.  Each gives a table as plain data; `testbed.experiments.tables` prints it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from testbed.experiments.experiment import CLEAN
from testbed.experiments.outcome import (
    COSTS,
    METHOD,
    SEEDS,
    DoneRun,
    Outcome,
    Row,
    accuracy,
    compared,
    comparison_columns,
    costs,
    intervals_note,
)
from testbed.quantities import number_text
from testbed.reports.exhibits import Column, Table, Value, figure_column, name_column, seconds_column
from testbed.statistics import NOT_ENOUGH, estimate, paired
from testbed.stopping import ROUNDS, amount_text, first_reaching, within, within_budget

if TYPE_CHECKING:
    from testbed.costs import RoundCost
    from testbed.report import DeviceSummary

#: What stands in the place of a verdict where a run has not reached the target: its cost is more than any number.
NOT_REACHED = "not reached in every run"
_ROUNDS = figure_column("rounds", "Rounds", 1)


def protocol_tables(outcome: Outcome) -> list[Table]:
    """Those that the experiment's file asks for."""
    protocol = outcome.experiment.protocol
    tables = []
    if protocol.budgets:
        tables.append(quality_under_budget(outcome))
    if protocol.target is not None:
        tables.append(cost_to_target(outcome, protocol.target))
    if protocol.disturbances:
        tables.append(robustness(outcome))
    return tables


# ── quality under a budget ──────────────────────────────────────────────────────────────────────────────────────────
def quality_under_budget(outcome: Outcome) -> Table:
    """The accuracy of the last evaluated round within the budget."""
    columns = (
        METHOD, SEEDS, figure_column("accuracy", "Accuracy"), _ROUNDS, *COSTS, name_column("ended_by", "Ended by"),
        *comparison_columns(outcome, "Accuracy", figure_column),
    )  # fmt: skip
    budgets = outcome.experiment.protocol.budgets
    told = ", ".join(amount_text(name, amount) for name, amount in budgets.items())
    caption = (
        f"Accuracy after the last round that lay within {told}, and what it had cost by then (evaluation is no cost).  "
        f"A dash: no evaluated round lay within, or a figure was not measured.  {intervals_note(outcome)}"
    )
    rows = tuple(_budget_row(row, outcome) for row in outcome.rows)
    return Table("quality_under_budget", "quality under budget", caption, columns, rows, _early(outcome))


def _budget_row(row: Row, outcome: Outcome) -> tuple[Value, ...]:
    def counted(run: DoneRun) -> RoundCost | None:
        return within_budget(outcome.experiment.protocol.budgets, run.costs)

    def figure(run: DoneRun) -> float | None:
        return None if (cost := counted(run)) is None else cost.accuracy

    found = outcome.against_reference(row, figure, higher_is_better=True, resolution=row.resolution)
    ended = Counter(str(run.stopped["by"]) for run in row.runs.values() if run.stopped)
    return (
        row.name,
        row.done_text,
        row.over_seeds(figure, row.resolution),
        row.over_seeds(_rounds(counted)),
        *costs(row, counted),
        ", ".join(f"{name} ({count})" for name, count in ended.most_common()) or None,
        *compared(row, found, outcome),
    )


def _early(outcome: Outcome) -> tuple[str, ...]:
    """A run whose rounds were done before its budget was spent says less than it could."""
    names = [
        row.name for row in outcome.rows if any((run.stopped or {}).get("by") == ROUNDS for run in row.runs.values())
    ]
    return (
        (f"Rounds were done before the budget was spent: {', '.join(names)}.  Give them more rounds.",) if names else ()
    )


# ── cost to a target ────────────────────────────────────────────────────────────────────────────────────────────────
def cost_to_target(outcome: Outcome, target: float) -> Table:
    """What it took until the accuracy was reached for the first time, of the runs that reached it."""
    columns = (
        METHOD, SEEDS, name_column("reached", "Reached"), _ROUNDS, *COSTS,
        *comparison_columns(outcome, "Time", seconds_column),
    )  # fmt: skip
    caption = (
        f"Costs until an evaluation first gave an accuracy of {amount_text('accuracy', target)} (evaluation is none), "
        f"over the runs that reached it: where not all did, the mean says nothing of the others, and there is no "
        f"verdict.  {intervals_note(outcome)}"
    )
    rows = tuple(_target_row(row, outcome, target) for row in outcome.rows)
    return Table("cost_to_target", "cost to target", caption, columns, rows)


def _target_row(row: Row, outcome: Outcome, target: float) -> tuple[Value, ...]:
    def reached(run: DoneRun) -> RoundCost | None:
        cost = first_reaching(target, run.costs)
        return cost if cost is not None and within(outcome.experiment.protocol.budgets, cost) else None

    def seconds(run: DoneRun) -> float | None:
        return None if (cost := reached(run)) is None else cost.seconds

    those = _only(row, reached)
    difference, verdict = compared(row, outcome.against_reference(row, seconds, higher_is_better=False), outcome)
    reference = outcome.reference_of(row)
    if reference is not None and not (_all(row, reached) and _all(reference, reached)):
        difference, verdict = None, NOT_REACHED if row.runs and reference.runs else NOT_ENOUGH
    return (
        row.name,
        row.done_text,
        f"{len(those.runs)} of {len(row.runs)}" if row.runs else None,
        those.over_seeds(_rounds(reached)),
        *costs(those, reached),
        difference,
        verdict,
    )


def _only(row: Row, which: Callable[[DoneRun], RoundCost | None]) -> Row:
    kept = {seed: run for seed, run in row.runs.items() if which(run) is not None}
    return Row(row.name, row.label, row.circumstances, row.disturbance, row.seeds, kept)


def _all(row: Row, which: Callable[[DoneRun], RoundCost | None]) -> bool:
    return bool(row.runs) and all(which(run) is not None for run in row.runs.values())


def _rounds(which: Callable[[DoneRun], RoundCost | None]) -> Callable[[DoneRun], float | None]:
    return lambda run: None if (cost := which(run)) is None else cost.round + 1


# ── robustness ──────────────────────────────────────────────────────────────────────────────────────────────────────
def robustness(outcome: Outcome) -> Table:
    """Every method under each set of disturbances, less itself without any."""
    pairs = [(row, clean) for row in outcome.rows if (clean := _clean_of(row, outcome)) is not None]
    columns = (
        METHOD, SEEDS, figure_column("clean_accuracy", "Clean"), figure_column("accuracy", "Disturbed"),
        figure_column("difference", "Disturbed less clean"), name_column("verdict", "Verdict"),
        Column("jobs_share", "Jobs finished", lambda value: number_text(value, 2)),
        Column("time_ratio", "Time, × clean", lambda value: number_text(value, 2)),
    )  # fmt: skip
    caption = (
        "The accuracy of each method under disturbances less its own without, paired on the seed: both meet the same "
        f"data, draws and initial state.  {intervals_note(outcome)}"
    )
    rows = tuple(_robust_row(row, clean, outcome, len(pairs)) for row, clean in pairs)
    return Table("robustness", "robustness", caption, columns, rows)


def _clean_of(row: Row, outcome: Outcome) -> Row | None:
    if row.disturbance in {None, CLEAN}:
        return None
    wanted = (*row.circumstances[:-1], CLEAN)
    return next((each for each in outcome.rows if each.label == row.label and each.circumstances == wanted), None)


def _robust_row(row: Row, clean: Row, outcome: Outcome, comparisons: int) -> tuple[Value, ...]:
    def figure(run: DoneRun) -> float | None:
        budgets = outcome.experiment.protocol.budgets
        if not budgets:
            return accuracy(run)
        return None if (cost := within_budget(budgets, run.costs)) is None else cost.accuracy

    resolution = max(row.resolution, clean.resolution)
    found = paired(row.by_seed(figure), clean.by_seed(figure), comparisons=comparisons, resolution=resolution)
    ours, theirs = row.by_seed(_seconds), clean.by_seed(_seconds)
    ratios = [ours[seed] / theirs[seed] for seed in ours.keys() & theirs.keys() if theirs[seed]]
    return (
        row.name,
        row.done_text,
        clean.over_seeds(figure, resolution),
        row.over_seeds(figure, resolution),
        found.difference if found.difference.count else None,
        found.verdict,
        row.over_seeds(_jobs_share),
        estimate(ratios) if ratios else None,
    )


def _seconds(run: DoneRun) -> float | None:
    return run.last.seconds if run.last else None


def _jobs_share(run: DoneRun) -> float | None:
    """Of the jobs that were sent out, those that came to their end."""

    def over_devices(count: Callable[[DeviceSummary], int]) -> int:
        return sum(count(device) for device in run.summary.devices)

    jobs = over_devices(lambda device: device.jobs)
    return over_devices(lambda device: device.finished) / jobs if jobs else None
