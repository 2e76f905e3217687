"""Quality under a budget: what counts of a run is its last evaluated round within."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from testbed.reports.comparison import against, beside
from testbed.reports.exhibits import Column, Table, figure_column, name_column
from testbed.reports.material import over
from testbed.reports.words import (
    ALL_BYTES,
    METHOD,
    OVER_SEEDS,
    OVER_SEEDS_PAIRED,
    PROTOCOL_COSTS,
    RUNS,
    WORKING_SECONDS,
    joules_column,
)
from testbed.run import BUDGETS
from testbed.stopping import ROUNDS, amount_text, within_budget

if TYPE_CHECKING:
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Evidence, Group, Material
    from testbed.statistics import Paired

_SPENT = ("seconds", "joules", "bytes")


def budgets_of(group: Group) -> dict[str, Any]:
    """What its runs may spend, in base units; {} where nothing was said."""
    return {name: group.until[name] for name in BUDGETS if name in group.until}


def accuracy_within(budgets: Mapping[str, float]) -> Callable[[Evidence], float | None]:
    """The accuracy of a run that counts under these budgets; None where no evaluated round lies within."""

    def figure(run: Evidence) -> float | None:
        cost = within_budget(budgets, run.costs)
        return None if cost is None else cost.accuracy

    return figure


def budget_table(material: Material) -> Table:
    columns = (
        METHOD, name_column("budget", "Budget"), RUNS, figure_column("rounds", "Rounds within", 1),
        figure_column("accuracy", "Accuracy"), WORKING_SECONDS,
        joules_column("energy_joules", "Energy"), ALL_BYTES, name_column("ended_by", "Ended by"),
        Column("pairs", "Pairs"), figure_column("accuracy_difference", f"Less {material.reference}"),
        name_column("verdict", "Verdict"), figure_column("hidden_difference", "May be hidden, up to"),
    )  # fmt: skip
    caption = (
        "The last evaluated round within the budget, and what was spent by then; the round that exceeded it does not "
        f"count. {OVER_SEEDS} {OVER_SEEDS_PAIRED} {PROTOCOL_COSTS} A dash: a run had no evaluated round within its "
        "budget, or a device has no meter."
    )
    groups = [group for group in material.groups if budgets_of(group)]
    rows = tuple(_row(material, group) for group in groups)
    notes = (*material.lacking, *_early(groups)) if rows else ()
    return Table("under-budget", "Quality under budget", caption, columns, rows, notes)


def _row(material: Material, group: Group) -> tuple[Value, ...]:
    budgets = budgets_of(group)
    counted = [within_budget(budgets, run.costs) for run in group.runs]
    accuracy = accuracy_within(budgets)
    return (
        group.name, ", ".join(amount_text(name, amount) for name, amount in budgets.items()), len(group.runs),
        over([None if cost is None else cost.round + 1 for cost in counted]),
        over([accuracy(run) for run in group.runs], group.resolution),
        *(over([None if cost is None else getattr(cost, name) for cost in counted]) for name in _SPENT),
        _ended_by(group), *_compared(_against_reference(material, group)),
    )  # fmt: skip


def _against_reference(material: Material, group: Group) -> Paired | None:
    """None for the reference itself, and where it has no run under the same circumstances and budgets."""
    theirs = material.reference_of(group)
    if theirs is None or budgets_of(theirs) != budgets_of(group):
        return None
    return against(group, theirs, accuracy_within(budgets_of(group)), beside(material, group))


def _compared(found: Paired | None) -> tuple[Value, ...]:
    """Pairs, difference, verdict, and what may be hidden."""
    return (None,) * 4 if found is None else (found.difference.count, found.difference, found.verdict, found.hidden)


def _ended_by(group: Group) -> str | None:
    """Which ends were met, and in how many runs; None where the records do not say."""
    counts = Counter(str(run.stopped["by"]) for run in group.runs if run.stopped)
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common()) or None


def _early(groups: list[Group]) -> tuple[str, ...]:
    """A run whose rounds were done before its budget was spent says less than it could."""
    names = [group.name for group in groups if any((run.stopped or {}).get("by") == ROUNDS for run in group.runs)]
    if not names:
        return ()
    return (f"Rounds were done before the budget was spent: {'; '.join(names)}. Give them more rounds.",)
