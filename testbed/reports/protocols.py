"""The protocols: quality under a budget, cost to a target, and robustness against declared disturbances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from testbed.experiments.experiment import CLEAN
from testbed.reports.comparison import against
from testbed.reports.exhibits import (
    DOTS,
    Axis,
    Column,
    Figure,
    Point,
    Section,
    Series,
    Table,
    bytes_column,
    figure_column,
    name_column,
    seconds_column,
)
from testbed.reports.material import over
from testbed.reports.words import METHOD, OVER_SEEDS, RUN, RUNS, joules_column, measured
from testbed.run import ACCURACY, BUDGETS
from testbed.statistics import Paired, paired
from testbed.stopping import FACT, amount_text, first_reaching, stop_text, within_budget

if TYPE_CHECKING:
    from testbed.costs import RoundCost
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Evidence, Group, Material

_ALL_BYTES = bytes_column("all_bytes", "Bytes, deployed ones too")
_SPENT = ("seconds", "joules", "bytes")
_COSTS = "Costs are without evaluation, and count the bytes that were deployed."


def protocols(material: Material) -> Section | None:
    exhibits: list[Table | Figure] = [
        table
        for table in (
            budget_table(material),
            target_table(material),
            target_runs_table(material),
            robustness_table(material),
        )
        if table.rows
    ]
    if any(table.key == "robustness" for table in exhibits):
        exhibits.append(robustness_figure(material))
    return Section("protocols", "Protocols", (), tuple(exhibits)) if exhibits else None


def _until(group: Group) -> Mapping[str, Any]:
    return group.first.config.get("until") or {}


# ── quality under a budget ──────────────────────────────────────────────────────────────────────────────────────────
def budget_table(material: Material) -> Table:
    columns = (
        METHOD, name_column("budget", "Budget"), RUNS, figure_column("rounds", "Rounds within", 1),
        figure_column("accuracy", "Accuracy"), seconds_column("seconds", "Time"),
        joules_column("energy_joules", "Energy"), _ALL_BYTES, Column("pairs", "Pairs"),
        figure_column("accuracy_difference", f"Less {material.reference}"), name_column("verdict", "Verdict"),
    )  # fmt: skip
    caption = (
        "Quality under budget: the last evaluated round within, and what was spent by then. "
        f"{OVER_SEEDS} {_COSTS} A dash: a run had no evaluated round within its budget, or a device has no meter."
    )
    groups = [group for group in material.groups if set(_until(group)) & set(BUDGETS)]
    return Table(
        "under-budget", "Quality under budget", caption, columns, tuple(_budget_row(material, g) for g in groups)
    )


def _budget_row(material: Material, group: Group) -> tuple[Value, ...]:
    until = _until(group)
    budget = ", ".join(amount_text(name, until[name]) for name in BUDGETS if name in until)
    counted = [within_budget(until, run.costs) for run in group.runs]
    found = _budget_comparison(material, group)
    compared = (found.difference.count, found.difference, found.verdict) if found else (None, None, None)
    return (
        group.name, budget, len(group.runs), over([None if cost is None else cost.round + 1 for cost in counted]),
        over([None if cost is None else cost.accuracy for cost in counted], group.resolution),
        *(over([None if cost is None else getattr(cost, name) for cost in counted]) for name in _SPENT), *compared,
    )  # fmt: skip


def _budget_comparison(material: Material, group: Group) -> Paired | None:
    """Against the reference method under the same circumstances."""
    groups = material.under(group.circumstances)
    theirs = next((each for each in groups if each.label == material.reference), None)
    if theirs is None or theirs is group or _until(theirs) != _until(group):
        return None
    resolution = max(group.resolution, theirs.resolution)
    return paired(_under_budget(group), _under_budget(theirs), comparisons=len(groups) - 1, resolution=resolution)


def _under_budget(group: Group) -> dict[int, float]:
    counted = {run.seed: within_budget(_until(group), run.costs) for run in group.runs}
    return {seed: cost.accuracy for seed, cost in counted.items() if cost is not None and cost.accuracy is not None}


# ── cost to a target ────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class _Reached:
    """A run and its target; `cost`: of the first round that reached it, None: it did not."""

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


def _reached(material: Material) -> list[_Reached]:
    """Of every run that has a target: the report's, or its own."""
    found = []
    for group in material.groups:
        target = material.target if material.target is not None else _until(group).get(ACCURACY)
        if target is not None:
            found += [_Reached(group, run, target, first_reaching(target, run.costs)) for run in group.runs]
    return found


_COST_COLUMNS = (
    figure_column("rounds", "Rounds", 0), seconds_column("seconds", "Time"), joules_column("energy_joules", "Energy"),
    _ALL_BYTES, bytes_column("peak_bytes", "Worst peak"),
)  # fmt: skip


def target_table(material: Material) -> Table:
    by_group: dict[str, list[_Reached]] = {}
    for each in _reached(material):
        by_group.setdefault(each.group.name, []).append(each)
    rows = []
    for name, runs in by_group.items():
        means = [over(list(values)) for values in zip(*(each.costs for each in runs), strict=True)]
        done = sum(each.cost is not None for each in runs)
        rows.append((name, runs[0].target, len(runs), done, *means))
    columns = (METHOD, figure_column("target", "Target"), RUNS, Column("reached", "Reached in"), *_COST_COLUMNS)
    caption = (
        "Cost to target: what had been spent after the first evaluated round with at least this accuracy. A run "
        "that did not reach it would have cost more, nobody knows how much: then there is no mean, and a dash. "
        f"{OVER_SEEDS} {_COSTS}"
    )
    return Table("to-target", "Cost to target", caption, columns, tuple(rows))


def target_runs_table(material: Material) -> Table:
    columns = (
        METHOD, RUN, Column("seed", "Seed"), name_column("target_reached", "Target"), *_COST_COLUMNS,
        figure_column("accuracy_best", "Best accuracy"), name_column("ended", "Why it ended"),
    )  # fmt: skip
    caption = f"Run by run. {_COSTS} ± of an energy is its measurement's own. A dash: not reached, or not measured."
    rows = tuple(map(_target_row, _reached(material)))
    return Table("to-target-runs", "Cost to target, run by run", caption, columns, rows)


def _target_row(each: _Reached) -> tuple[Value, ...]:
    rounds, seconds, _, *others = each.costs
    return (
        each.group.name, each.run.run, each.run.seed, "reached" if each.cost else "not reached", rounds, seconds,
        measured(each.cost.energy) if each.cost else None, *others, each.run.summary.accuracy_best, _ended(each.run),
    )  # fmt: skip


def _ended(run: Evidence) -> str | None:
    """None where its rounds alone decided."""
    stop = run.folder.status.facts.get(FACT)
    return stop_text(stop) if isinstance(stop, Mapping) else None


# ── robustness ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _robustness(material: Material) -> list[tuple[Group, Group, Paired]]:
    """Every disturbed group with its clean one, and the difference."""
    clean = {(g.label, g.circumstances[:-1]): g for g in material.groups if g.disturbance == CLEAN}
    pairs = [
        (group, clean[key])
        for group in material.groups
        if group.disturbance not in {None, CLEAN} and (key := (group.label, group.circumstances[:-1])) in clean
    ]
    return [(group, base, against(group, base, "accuracy", len(pairs))) for group, base in pairs]


def robustness_table(material: Material) -> Table:
    found = _robustness(material)
    rows = []
    for group, base, difference in found:
        accuracies = [each.over(attrgetter("accuracy"), each.resolution) for each in (base, group)]
        jobs = [job for run in group.runs for job in run.results]
        done = sum(job.finished for job in jobs)
        rows.append((
            ", ".join((group.label, *group.circumstances[:-1])), group.disturbance, *accuracies,
            difference.difference.count, difference.difference, difference.verdict, difference.hidden, done,
            len(jobs),
        ))  # fmt: skip
    columns = (
        METHOD, name_column("disturbance", "Disturbance"), figure_column("clean_accuracy", "Clean"),
        figure_column("accuracy", "Disturbed"), Column("pairs", "Pairs"),
        figure_column("accuracy_difference", "Difference"), name_column("verdict", "Verdict"),
        figure_column("hidden_difference", "May be hidden, up to"), Column("jobs_finished", "Jobs finished"),
        Column("jobs", "of"),
    )  # fmt: skip
    caption = (
        "Accuracy at the end with the disturbance less that without it, paired on the seed; the intervals share "
        f"their error of 5 % among {len(found)} comparisons (Bonferroni). Better and worse are said of the disturbed "
        "runs."
    )
    return Table("robustness", "Robustness", caption, columns, tuple(rows))


def robustness_figure(material: Material) -> Figure:
    found = _robustness(material)
    names = dict.fromkeys(group.disturbance or "" for group, _, _ in found)
    series = tuple(Series(name, tuple(_points(name, found))) for name in names)
    table = robustness_table(material)
    data = Table("robustness-data", table.title, table.caption, table.columns, table.rows)
    axis = Axis("Accuracy, disturbed less clean")
    return Figure(
        "robustness-difference", "What disturbances cost", table.caption, DOTS, Axis(""), axis, data, series=series,
        lines=(("no difference", 0.0),),
    )  # fmt: skip


def _points(name: str, found: Sequence[tuple[Group, Group, Paired]]) -> list[Point]:
    return [
        Point(
            ", ".join((group.label, *group.circumstances[:-1])),
            told.difference.mean,
            told.difference.low,
            told.difference.high,
        )
        for group, _, told in found
        if group.disturbance == name
    ]
