"""Cost to a target: what had been spent when an evaluation first gave this accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.reports.comparison import against, beside
from testbed.reports.exhibits import Column, Table, bytes_column, figure_column, name_column, seconds_column
from testbed.reports.material import over
from testbed.reports.under_budget import budgets_of
from testbed.reports.words import (
    ALL_BYTES,
    METHOD,
    OVER_SEEDS,
    OVER_SEEDS_PAIRED,
    PROTOCOL_COSTS,
    RUN,
    WORKING_SECONDS,
    joules_column,
    measured,
)
from testbed.run import ACCURACY
from testbed.stopping import first_reaching, stop_text

if TYPE_CHECKING:
    from testbed.costs import RoundCost
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Evidence, Group, Material

#: What stands in the place of a verdict where a run has not reached the target: its cost is more than any number.
NOT_REACHED = "not reached in every run"


@dataclass(frozen=True)
class _Reached:
    """A run and its target; `cost`: of the first round that reached it, None: none did within the run's budgets."""

    group: Group
    run: Evidence
    target: float
    cost: RoundCost | None

    @property
    def peak_bytes(self) -> int | None:
        """The worst estimate of any finished job up to that round."""
        if self.cost is None:
            return None
        jobs = [job for job in self.run.results if job.finished and job.round <= self.cost.round]
        peaks = [peak for job in jobs if (peak := job.measurement.peak.estimate_bytes) is not None]
        return max(peaks, default=None)

    @property
    def costs(self) -> tuple[float | None, ...]:
        """Rounds, seconds, joules, bytes and peak until then; all None where it was not reached."""
        cost = self.cost
        if cost is None:
            return (None,) * 5
        return cost.round + 1, cost.seconds, cost.joules, cost.bytes, self.peak_bytes


def _target_of(material: Material, group: Group) -> float | None:
    """The report's, or the runs' own; None: there is none."""
    own: float | None = group.until.get(ACCURACY)
    return own if material.target is None else material.target


def _reached(material: Material, group: Group) -> list[_Reached]:
    """Of every run; none where there is no target."""
    target = _target_of(material, group)
    if target is None:
        return []
    return [_Reached(group, run, target, first_reaching(target, run.costs, budgets_of(group))) for run in group.runs]


def _cost_columns(digits: int) -> tuple[Column, ...]:
    return (
        figure_column("rounds", "Rounds", digits), WORKING_SECONDS,
        joules_column("energy_joules", "Energy"), ALL_BYTES, bytes_column("peak_bytes", "Worst peak"),
    )  # fmt: skip


# ── over seeds ──────────────────────────────────────────────────────────────────────────────────────────────────────
def target_table(material: Material) -> Table:
    columns = (
        METHOD, figure_column("target", "Target"), Column("reached", "Reached in"), Column("runs", "of"),
        *_cost_columns(1), Column("pairs", "Pairs"),
        seconds_column("seconds_difference", f"Time less {material.reference}'s"), name_column("verdict", "Verdict"),
        seconds_column("hidden_seconds", "May be hidden, up to"),
    )  # fmt: skip
    caption = (
        "What had been spent after the first evaluated round with at least this accuracy, within the budget where "
        "there is one. A run that did not reach it would have cost more, nobody knows how much: then there is no "
        f"mean and no verdict. {OVER_SEEDS} {OVER_SEEDS_PAIRED} {PROTOCOL_COSTS} A dash: not reached in every run, or "
        "not measured."
    )
    rows = tuple(_row(material, group) for group in material.groups if _target_of(material, group) is not None)
    return Table("to-target", "Cost to target", caption, columns, rows, material.lacking if rows else ())


def _row(material: Material, group: Group) -> tuple[Value, ...]:
    runs = _reached(material, group)
    means = [over(list(values)) for values in zip(*(each.costs for each in runs), strict=True)]
    done = sum(each.cost is not None for each in runs)
    return (group.name, runs[0].target, done, len(runs), *means, *_compared(material, group))


def _compared(material: Material, group: Group) -> tuple[Value, ...]:
    """Pairs, difference in time, verdict, and what may be hidden; where all of both reached the same target."""
    theirs = material.reference_of(group)
    target = _target_of(material, group)
    if theirs is None or target is None or _target_of(material, theirs) != target:
        return (None,) * 4
    if budgets_of(theirs) != budgets_of(group):
        return (None,) * 4
    if any(each.cost is None for each in (*_reached(material, group), *_reached(material, theirs))):
        return (None, None, NOT_REACHED, None)
    seconds = _seconds_to(target)
    found = against(group, theirs, seconds, beside(material, group), accuracy=False)
    return found.difference.count, found.difference, found.verdict, found.hidden


def _seconds_to(target: float) -> Callable[[Evidence], float | None]:
    """Of a run that has reached it."""

    def figure(run: Evidence) -> float | None:
        cost = first_reaching(target, run.costs)
        return None if cost is None else cost.seconds

    return figure


# ── run by run ──────────────────────────────────────────────────────────────────────────────────────────────────────
def target_runs_table(material: Material) -> Table:
    columns = (
        METHOD, RUN, Column("seed", "Seed"), name_column("target_reached", "Target"), *_cost_columns(0),
        figure_column("accuracy_best", "Best accuracy"), name_column("ended", "Why it ended"),
    )  # fmt: skip
    caption = f"{PROTOCOL_COSTS} ± of an energy is its measurement's own. A dash: not reached, or not measured."
    rows = tuple(_run_row(each) for group in material.groups for each in _reached(material, group))
    return Table("to-target-runs", "Cost to target, run by run", caption, columns, rows)


def _run_row(each: _Reached) -> tuple[Value, ...]:
    rounds, seconds, _, *others = each.costs
    return (
        each.group.name, each.run.run, each.run.seed, "reached" if each.cost else "not reached", rounds, seconds,
        measured(each.cost.energy) if each.cost else None, *others, each.run.summary.accuracy_best,
        stop_text(each.run.stopped) if each.run.stopped else None,
    )  # fmt: skip
