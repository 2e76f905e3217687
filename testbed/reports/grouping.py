"""Which runs belong together: by the experiment that they are cells of, or by their own configurations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from testbed import disturbances
from testbed.errors import UsageError
from testbed.experiments.experiment import CLEAN
from testbed.reports.material import Evidence, Group, Material, counted
from testbed.run import RunConfig
from testbed.run_record import FINISHED
from testbed.spelling import did_you_mean

if TYPE_CHECKING:
    from testbed.experiments.cells import Standing
    from testbed.experiments.experiment import Experiment
    from testbed.store import RunFolder

#: Of a configuration: what names the circumstances, or tells seeds apart, and so makes no other group.
_NOT_OF_A_GROUP = frozenset({"method", "model", "data", "task", "seed", "disturbances"})
_SHORT = 24


class Place(NamedTuple):
    """What a group is called."""

    label: str
    circumstances: tuple[str, ...]
    disturbance: str | None = None

    @property
    def row(self) -> str:
        return ", ".join((self.label, *self.circumstances))


def material_of(
    folders: Sequence[RunFolder],
    *,
    target: float | None = None,
    experiment: Sequence[Standing] | None = None,
    reference: str | None = None,
    rows: Sequence[str] = (),
) -> Material:
    """Read the runs and put them together; `rows` are the experiment's, in the order of its file.

    Raises UsageError where there is no run, and where `reference` is no label of a run or a cell.
    """
    standings = tuple(experiment or ())
    known = {folder.run_id: folder for folder in folders or _runs_of(standings)}
    if not known:
        raise UsageError("there is no run to report of: name runs that `testbed runs` lists")
    runs = tuple(Evidence.of(folder, target) for folder in known.values())
    places = _places(runs, standings)
    members: dict[Place, list[Evidence]] = {}
    for run in runs:
        for place in places[run.run]:
            members.setdefault(place, []).append(run)
    ranks = {row: rank for rank, row in enumerate(rows)}
    order = sorted(members, key=lambda place: ranks.get(place.row, len(ranks)))
    groups = tuple(Group(each.label, each.circumstances, counted(members[each]), each.disturbance) for each in order)
    chosen = _reference(groups, standings, reference)
    notes = (*_notes(members, groups), *_without_reference(groups, chosen))
    return Material(runs, groups, chosen, target, standings, notes)


def material_of_experiment(
    experiment: Experiment, standings: Sequence[Standing], *, target: float | None = None, reference: str | None = None
) -> Material:
    """Its runs that are done, judged as its file says; `target` and `reference` go before what that says.

    Raises what `material_of` does.
    """
    return material_of(
        (),
        target=experiment.protocol.target if target is None else target,
        experiment=standings,
        reference=reference or experiment.reference,
        rows=tuple(dict.fromkeys(cell.row for cell in experiment.cells)),
    )


def _runs_of(standings: Iterable[Standing]) -> list[RunFolder]:
    """The runs of cells that are done."""
    from testbed.experiments.cells import DONE

    return [each.run for each in standings if each.run is not None and each.state == DONE]


def _reference(groups: Sequence[Group], standings: Sequence[Standing], asked: str | None) -> str:
    labels = dict.fromkeys([*(group.label for group in groups), *(each.cell.label for each in standings)])
    if asked is None:
        return next(iter(labels))
    if asked not in labels:
        raise UsageError(f'reference: no run has the label "{asked}"; {did_you_mean(asked, labels)}')
    return asked


def _without_reference(groups: Sequence[Group], reference: str) -> Iterable[str]:
    if all(group.label != reference for group in groups):
        yield f"The reference, {reference}, has no finished run: nothing is compared with it."


def _notes(members: Mapping[Place, Sequence[Evidence]], groups: Sequence[Group]) -> Iterable[str]:
    """What the means leave out, or count though it is not finished."""
    again = []
    for group in groups:
        for run in members[Place(group.label, group.circumstances, group.disturbance)]:
            kept = any(run is each for each in group.runs)
            if not kept and run.summary.state == FINISHED:
                again.append(run.run)
            elif not kept:
                yield f"{run.run} is {run.summary.state} and counts in no mean."
            elif run.summary.state != FINISHED:
                yield f"{group.name}: {run.run} is {run.summary.state}; its figures are those so far."
    if again:
        yield f"Of finished runs that differ in nothing the last counts in the means, and not {', '.join(again)}."


# ── runs of an experiment ───────────────────────────────────────────────────────────────────────────────────────────
def _place(standing: Standing) -> Place:
    return Place(standing.cell.label, standing.cell.circumstances, standing.cell.disturbance)


def _places(runs: Sequence[Evidence], standings: Sequence[Standing]) -> dict[str, list[Place]]:
    """By run: two labels may share one."""
    found: dict[str, list[Place]] = {}
    for standing in standings:
        if standing.run is not None:
            found.setdefault(standing.run.run_id, []).append(_place(standing))
    alone = [run for run in runs if run.run not in found]
    return {**found, **{run: [place] for run, place in _places_alone(alone).items()}}


# ── runs alone ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _places_alone(runs: Sequence[Evidence]) -> dict[str, Place]:
    """By their configurations: a label that means two things is told apart by what differs."""
    contents = {run.run: _content(run) for run in runs}
    circumstances = _circumstances(runs)
    labels, weathers = {run.run: _label(run) for run in runs}, _weathers(runs)
    names: dict[str, Place] = {}
    for run in runs:
        others = [contents[each.run] for each in runs if labels[each.run] == labels[run.run]]
        differing = _differing(contents[run.run], others)
        disturbed = weathers[run.run]
        under = (*circumstances[run.run], *(() if disturbed is None else (disturbed,)))
        names[run.run] = Place(", ".join((labels[run.run], *differing)), under, disturbed)
    return names


def _label(run: Evidence) -> str:
    mark = run.config.get("experiment")
    return str(mark["label"]) if isinstance(mark, Mapping) and mark.get("label") else run.summary.method


def _circumstances(runs: Sequence[Evidence]) -> dict[str, tuple[str, ...]]:
    """Inventory, model and data by their names, those of them in which the runs differ."""
    columns = [
        [PurePath(str(run.inventory.get("source") or "")).stem for run in runs],
        [run.summary.model or "" for run in runs],
        [run.summary.data or "" for run in runs],
    ]
    differing = [column for column in columns if len(set(column)) > 1]
    return {run.run: tuple(column[index] for column in differing) for index, run in enumerate(runs)}


def _weathers(runs: Sequence[Evidence]) -> dict[str, str | None]:
    """What disturbed each run, in words; None where nothing disturbed any."""
    found = {run.run: disturbances.parse(run.config.get("disturbances")).rules for run in runs}
    if not any(found.values()):
        return dict.fromkeys(found)
    return {run: "; ".join(rule.text for rule in rules) or CLEAN for run, rules in found.items()}


def _content(run: Evidence) -> dict[str, str]:
    """What decides a run beside its seed, each as text."""
    config = run.config
    plain = {name: value for name, value in options_of(run).items() if name not in _NOT_OF_A_GROUP}
    data = config.get("data") if isinstance(config.get("data"), Mapping) else {}
    options = {key: value for key, value in (data or {}).items() if key != "name"}
    content = {**plain, "data": options, "devices": run.inventory.get("devices"), **settings_of(run)}
    return {name: _text(value) for name, value in content.items()}


def _differing(own: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> list[str]:
    names = dict.fromkeys(name for content in others for name in content)
    told = []
    for name in names:
        values = list(dict.fromkeys(content.get(name, "") for content in others))
        if len(values) > 1:
            value = own.get(name, "")
            short = value if len(value) <= _SHORT else str(values.index(value) + 1)
            told.append(f"{name}={short}")
    return told


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def options_of(run: Evidence) -> dict[str, Any]:
    """What decided the run beside its method's settings; the defaults where an older record does not say."""
    stated = run.config
    told = {each.name: stated.get(each.name, _default(each)) for each in fields(RunConfig)}
    return {name: value for name, value in told.items() if name not in {"method", "settings"}}


def _default(option: Field[Any]) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return None if option.default is MISSING else option.default


def settings_of(run: Evidence) -> dict[str, Any]:
    """The settings of its method."""
    return dict(run.config.get("settings") or {})
