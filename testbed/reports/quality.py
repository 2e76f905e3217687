"""Quality: at the end, against the reference method, and over rounds, seconds, joules and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from statistics import fmean
from typing import TYPE_CHECKING

from testbed.reports.comparison import comparison_table
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
from testbed.reports.figures import Abscissa, Ordinate, curves
from testbed.reports.material import over
from testbed.reports.words import (
    EMULATED_SECONDS,
    METHOD,
    OVER_SEEDS,
    REPLAYED,
    RUNS,
    WORKING_SECONDS,
    joules_column,
    key_of,
    named,
    seeds_text,
    under_columns,
    where,
)
from testbed.statistics import MIN_RUNS

if TYPE_CHECKING:
    from testbed.reports.exhibits import Value
    from testbed.reports.material import Evidence, Group, Material

#: Circumstances (inventory, model, data) that get curves of their own.
_DRAWN_CIRCUMSTANCES = 4
_MIB = 2**20
_MINUTE = 60
_LONG_SECONDS = 600  # from here on an axis counts minutes

ACCURACY = Ordinate(
    "accuracy",
    "Accuracy",
    Axis("Accuracy (ratio)"),
    figure_column("accuracy", "Accuracy"),
    attrgetter("accuracy"),
    steps=True,
)
LOSS = Ordinate("loss", "Loss", Axis("Loss (nats)"), figure_column("loss_nats", "Loss"), attrgetter("loss"))
ROUNDS = Abscissa(
    "rounds",
    "rounds",
    Axis("Rounds", start_at_zero=True),
    figure_column("rounds", "Rounds", 0),
    lambda cost: cost.round + 1,
)
JOULES = Abscissa(
    "joules", "energy", Axis("Energy of all devices (J)", start_at_zero=True), joules_column("energy_joules", "Energy"),
    attrgetter("joules"),
)  # fmt: skip
BYTES = Abscissa(
    "bytes", "bytes sent", Axis("Sent down and up (MiB)", _MIB, start_at_zero=True), bytes_column("sent_bytes", "Sent"),
    lambda cost: cost.bytes_down + cost.bytes_up,
)  # fmt: skip


def seconds_abscissa(material: Material) -> Abscissa:
    """In minutes where the longest run took more than ten."""
    longest = max((run.costs[-1].seconds for run in material.runs if run.costs), default=0.0)
    axis = Axis("Time (min)", _MINUTE) if longest > _LONG_SECONDS else Axis("Time (s)")
    axis = Axis(axis.heading, axis.scale, start_at_zero=True)
    return Abscissa("seconds", "time", axis, seconds_column("seconds", "Time"), attrgetter("seconds"))


def quality(material: Material) -> Section | None:
    """None where nothing was evaluated."""
    exhibits: list[Table | Figure] = [*quality_tables(material)]
    if not exhibits:
        return None
    for circumstances in material.circumstances[:_DRAWN_CIRCUMSTANCES]:
        exhibits += _figures(material, circumstances)
    return Section("quality", "Quality", tuple(_paragraphs(material)), tuple(exhibits))


def quality_tables(material: Material) -> list[Table]:
    """Where the methods stand after their last round; none where nothing was evaluated."""
    if not any(run.summary.accuracy is not None or run.summary.loss is not None for run in material.runs):
        return []
    found = (quality_table(material), comparison_table(material), cost_table(material))
    return [table for table in found if table.rows]


def _paragraphs(material: Material) -> Iterator[str]:
    yield (
        "Quality is that of the held-out examples, which no client trains on. Below the majority class a model has "
        "learned nothing; below the bag of words it was not worth a language model."
    )
    most = max(len(group.runs) for group in material.groups)
    if most < MIN_RUNS:
        yield f"With fewer than {MIN_RUNS} seeds there is no interval and no verdict: a difference may be the draw's."
    left = material.circumstances[_DRAWN_CIRCUMSTANCES:]
    if left:
        names = "; ".join(map(", ".join, left))
        yield f"No curves are drawn under {names}: the tables have their figures."


# ── at the end ──────────────────────────────────────────────────────────────────────────────────────────────────────
def quality_table(material: Material) -> Table:
    columns = (
        METHOD, *under_columns(material), RUNS, name_column("seeds", "Seeds"), figure_column("accuracy", "Accuracy"),
        figure_column("accuracy_best", "Best"), figure_column("loss_nats", "Loss"),
        figure_column("majority", "Majority class"), figure_column("bag_of_words", "Bag of words"),
        figure_column("no_fine_tuning", "No fine-tuning"), figure_column("resolution", "Resolution", 4),
    )  # fmt: skip
    rows = tuple(_quality_row(material, group) for group in material.groups)
    caption = (
        "Accuracy (ratio) and loss (nats) after the last evaluated round. "
        f"{OVER_SEEDS} Best is the best round's accuracy, chosen on the same held-out examples and so too good. "
        "Resolution is one held-out example. A dash: a run lacks the figure."
    )
    return Table("quality", "Quality at the end", caption, columns, rows, material.lacking)


def _quality_row(material: Material, group: Group) -> tuple[Value, ...]:
    return (
        *named(material, group),
        len(group.runs),
        seeds_text(group),
        group.over(attrgetter("accuracy"), group.resolution),
        group.over(attrgetter("accuracy_best"), group.resolution),
        group.over(attrgetter("loss")),
        group.middle(attrgetter("reference.majority")),
        group.middle(attrgetter("reference.bag_of_words")),
        group.middle(attrgetter("reference.no_fine_tuning")),
        group.resolution or None,
    )


# ── and what it cost ────────────────────────────────────────────────────────────────────────────────────────────────
def cost_table(material: Material) -> Table:
    columns = (
        METHOD, RUNS, figure_column("rounds", "Rounds", 0), WORKING_SECONDS,
        joules_column("energy_joules", "Energy"), bytes_column("sent_bytes", "Sent"),
        bytes_column("peak_worst_bytes", "Worst peak"), bytes_column("headroom_least_bytes", "Least headroom"),
        figure_column("tokens_per_second", "Tokens/s", 0), Column("refused", "Refused"), Column("clients", "Clients"),
    )  # fmt: skip
    caption = (
        "What a run cost without evaluation, where records tell that apart: time, gross energy of all devices, and "
        f"bytes down and up. {OVER_SEEDS} The worst peak and the least headroom are those of any run; refused are "
        "clients of one run. A dash: not measured."
    )
    replayed = (REPLAYED,) if material.replayed else ()
    notes = (*material.lacking, *replayed, *_notes_on_time(material))
    return Table("costs", "What it cost", caption, columns, tuple(map(_cost_row, material.groups)), notes)


def _cost_row(group: Group) -> tuple[Value, ...]:
    last = [run.costs[-1] if run.costs else None for run in group.runs]
    peaks = [run.summary.peak_worst_bytes for run in group.runs]
    headrooms = [run.summary.headroom_least_bytes for run in group.runs]
    return (
        group.name, len(group.runs), group.over(attrgetter("rounds")),
        over([None if cost is None else cost.seconds for cost in last]),
        over([None if cost is None else cost.joules for cost in last]),
        over([None if cost is None else cost.bytes_down + cost.bytes_up for cost in last]),
        max((peak for peak in peaks if peak is not None), default=None),
        min((room for room in headrooms if room is not None), default=None),
        group.over(attrgetter("tokens_per_second")), max(len(run.summary.refusals) for run in group.runs),
        group.first.summary.clients,
    )  # fmt: skip


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _figures(material: Material, circumstances: tuple[str, ...]) -> Iterator[Figure]:
    groups = material.under(circumstances)
    end = end_figure(material, circumstances)
    if end is not None:
        yield end
    lines = _lines(groups)
    shared = "One curve per method: the mean over its seeds, with the 95 % interval as a band from three seeds on."
    meant = f"{shared} Every point is a round that was evaluated; x is the mean over the seeds."
    replayed = [REPLAYED] if material.replayed else []
    drawn = [
        (ROUNDS, ACCURACY, shared, []),
        (seconds_abscissa(material), ACCURACY, meant, list(_notes_on_time(material))),
        (JOULES, ACCURACY, f"{meant} Gross energy of the jobs of all devices.", [*replayed, *_invalid(groups)]),
        (BYTES, ACCURACY, f"{meant} What jobs were sent and sent back, without the base model's deployment.", []),
        (ROUNDS, LOSS, shared, []),
    ]
    for abscissa, ordinate, caption, notes in drawn:
        own = lines if ordinate is ACCURACY else ()
        figure = curves(material, circumstances, abscissa, ordinate, caption=caption, lines=own, notes=notes)
        if figure is not None:
            yield figure


def end_figure(material: Material, circumstances: tuple[str, ...]) -> Figure | None:
    """Every method's accuracy at the end beside the others'."""
    groups = material.under(circumstances)
    found = [(group, group.over(attrgetter("accuracy"), group.resolution)) for group in groups]
    known = [(group, value) for group, value in found if value is not None]
    if len(known) < 2:
        return None
    key = key_of("accuracy-end", *circumstances)
    title = f"Accuracy at the end{where(circumstances)}"
    caption = "Mean over the seeds, with the 95 % interval from three seeds on; all methods."
    columns = (METHOD, ACCURACY.column, RUNS)
    rows = tuple((group.label, value, value.count) for group, value in known)
    points = tuple(Point(group.label, value.mean, value.low, value.high) for group, value in known)
    return Figure(
        key, title, caption, DOTS, Axis(""), ACCURACY.axis, Table(f"{key}-data", title, caption, columns, rows),
        series=(Series("accuracy", points),), lines=_lines(groups),
    )  # fmt: skip


def _lines(groups: Sequence[Group]) -> tuple[tuple[str, float], ...]:
    """What every method's quality stands beside: the mean over all runs, which share data and model."""
    runs = [run for group in groups for run in group.runs]
    found = {
        "majority class": _mean(runs, "majority"),
        "bag of words": _mean(runs, "bag_of_words"),
        "no fine-tuning": _mean(runs, "no_fine_tuning"),
    }
    return tuple((name, value) for name, value in found.items() if value is not None)


def _mean(runs: Sequence[Evidence], name: str) -> float | None:
    values = [getattr(run.summary.reference, name) for run in runs]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _notes_on_time(material: Material) -> Iterator[str]:
    if material.emulated:
        yield EMULATED_SECONDS
    if any(record.evaluation_seconds is None for run in material.runs for record in run.rounds):
        yield "Records that do not tell the controller's evaluation apart count it in."


def _invalid(groups: Sequence[Group]) -> Iterator[str]:
    last = [run.costs[-1].energy for group in groups for run in group.runs if run.costs]
    problems = [energy.problems[0] for energy in last if energy is not None and energy.problems]
    if problems:
        yield f"The energy of {len(problems)} of {len(last)} runs is not valid, the first because {problems[0]}."
