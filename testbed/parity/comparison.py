"""Two runs of the same method and settings beside each other: what an emulation has in common with the board.

    parity = parity_of(first, second)           # folders of runs
    verdicts(parity)["peaks"]                   # "peaks agree within 1.2 %: …" (testbed.parity.verdicts)

Ratios are the second run's figure over the first one's.  `None` means not measured, or that it cannot be told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from testbed.parity.devices import DeviceParity, devices_of
from testbed.report import RunSummary, summarise
from testbed.run import RunConfig
from testbed.run_record import finite

if TYPE_CHECKING:
    from testbed.job import Result
    from testbed.run_record import RoundRecord
    from testbed.store import RunFolder

_Pair = tuple["RunFolder", "RunFolder"]


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in both runs; `decides`: results that differ for it say nothing of the devices."""

    name: str
    first: Any
    second: Any
    decides: bool = True


@dataclass(frozen=True)
class RoundParity:
    """The quality after one round (counted from 0) that both have evaluated; None: it was no finite number."""

    round: int
    first_accuracy: float | None
    second_accuracy: float | None
    first_loss: float | None
    second_loss: float | None

    @property
    def same(self) -> bool:
        """Equal to the last bit."""
        return (self.first_accuracy, self.first_loss) == (self.second_accuracy, self.second_loss)


@dataclass(frozen=True)
class JobParity:
    """A job of both runs, by round, client and kind, whose outcome or bytes are not the same."""

    round: int
    client: int
    kind: str
    outcomes: tuple[str, str]
    bytes_down: tuple[int, int]
    bytes_up: tuple[int, int]


@dataclass(frozen=True)
class Parity:
    """Everything that was compared.  `jobs` counts those that both runs have."""

    first: RunSummary
    second: RunSummary
    differences: tuple[Difference, ...]
    devices: tuple[DeviceParity, ...]
    unmatched: tuple[str, ...]  # devices without a counterpart, and why
    rounds: tuple[RoundParity, ...]
    jobs: int
    unlike_jobs: tuple[JobParity, ...]
    only_first: int = 0  # jobs that the other one lacks
    only_second: int = 0
    same_final_state: bool | None = None
    machines: tuple[str | None, str | None] = (None, None)
    notes: tuple[str, ...] = ()

    @property
    def like_for_like(self) -> bool:
        return not any(difference.decides for difference in self.differences)

    @property
    def unlike_outcomes(self) -> tuple[JobParity, ...]:
        return tuple(job for job in self.unlike_jobs if job.outcomes[0] != job.outcomes[1])

    @property
    def unlike_bytes(self) -> tuple[JobParity, ...]:
        """Of jobs that ended alike."""
        same = (job for job in self.unlike_jobs if job.outcomes[0] == job.outcomes[1])
        return tuple(
            job for job in same if (job.bytes_down[0], job.bytes_up[0]) != (job.bytes_down[1], job.bytes_up[1])
        )


def parity_of(first: RunFolder, second: RunFolder) -> Parity:
    """Compare two runs.  Raises StoreError for a folder that cannot be read."""
    summaries = summarise(first), summarise(second)
    results = first.results(), second.results()
    devices, unmatched = devices_of(summaries, results)
    ours, theirs = (_by_place(each) for each in results)
    both = [place for place in ours if place in theirs]
    unlike = [job for place in both if (job := _job(place, ours[place], theirs[place])) is not None]
    states = first.status.final_state, second.status.final_state
    return Parity(
        *summaries,
        differences=tuple(_differences((first, second))),
        devices=devices,
        unmatched=unmatched,
        rounds=tuple(_rounds(first.rounds(), second.rounds())),
        jobs=len(both),
        unlike_jobs=tuple(unlike),
        only_first=len(ours) - len(both),
        only_second=len(theirs) - len(both),
        same_final_state=None if None in states else states[0] == states[1],
        machines=(_machine(first), _machine(second)),
        notes=tuple(_notes(summaries)),
    )


# ── what is not the same ────────────────────────────────────────────────────────────────────────────────────────────
def _differences(folders: _Pair) -> list[Difference]:
    """First what decides a result, then what it was run on."""
    decisive, others = (tuple(map(read, folders)) for read in (_decisive, _circumstances))
    return [
        Difference(name, first.get(name), second.get(name), decides)
        for (first, second), decides in ((decisive, True), (others, False))
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name)
    ]


def _decisive(folder: RunFolder) -> dict[str, Any]:
    config, plan = folder.config, folder.plan
    own = {entry.name: config.get(entry.name) for entry in fields(RunConfig) if entry.name not in _APART}
    own = {name: None if value == {} else value for name, value in own.items()}  # an older run does not know it
    settings = {f"setting {name}": value for name, value in (config.get("settings") or {}).items()}
    clients = {client["index"]: client for client in plan.get("clients", ())}
    return {
        **own,
        **settings,
        "data's content": config.get("data_hash"),
        "shards": config.get("shards"),
        "base model's weights": [(plan.get("model") or {}).get(name) for name in ("outside", "blocks")],
        "initial state": folder.status.initial_state,
        "clients in the plan": {index: client["outcome"] for index, client in clients.items()},
        "submodels": {index: client.get("submodel") for index, client in clients.items()},
    }


#: Of a run's configuration: told setting by setting, told by its content (a file may lie elsewhere), or no part of the
#: result.
_APART = frozenset(
    {"settings", "model", "data", "idle_seconds", "cool_seconds", "start_below_celsius", "power_cycle", "warm_up"}
)


def _circumstances(folder: RunFolder) -> dict[str, Any]:
    versions = folder.record.versions
    return {
        **(versions.get("packages") or {}),
        "commit": versions.get("commit"),
        "controller": _machine(folder),
        "budgets": {client["index"]: client.get("budget_bytes") for client in folder.plan.get("clients", ())},
    }


def _machine(folder: RunFolder) -> str | None:
    cpu: str | None = (folder.record.versions.get("machine") or {}).get("cpu")
    return cpu


def _notes(summaries: Sequence[RunSummary]) -> list[str]:
    return [
        f"{run.run} is {run.state} after {run.rounds} of {run.rounds_planned} rounds: only what both have is compared"
        for run in summaries
        if run.state != "finished"
    ]


# ── jobs and rounds ─────────────────────────────────────────────────────────────────────────────────────────────────
_Place = tuple[int, int, str]


def _by_place(results: Sequence[Result]) -> dict[_Place, Result]:
    return {(result.round, result.client, result.kind): result for result in results}


def _job(place: _Place, first: Result, second: Result) -> JobParity | None:
    pairs = [
        (getattr(first.measurement, name), getattr(second.measurement, name)) for name in ("bytes_down", "bytes_up")
    ]
    outcomes = first.outcome, second.outcome
    if all(one == other for one, other in (*pairs, outcomes)):
        return None
    return JobParity(*place, outcomes, *pairs)


def _rounds(first: Sequence[RoundRecord], second: Sequence[RoundRecord]) -> list[RoundParity]:
    theirs = {record.round: record.quality for record in second if record.quality}
    return [
        RoundParity(
            record.round,
            *(
                finite(quality.get(name))
                for name in ("accuracy", "loss")
                for quality in (record.quality, theirs[record.round] or {})
            ),
        )
        for record in first
        if record.quality and record.round in theirs
    ]


def farthest(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """The largest absolute difference of two numbers; None where no pair has both."""
    known = [abs(a - b) for a, b in pairs if a is not None and b is not None and math.isfinite(a - b)]
    return max(known, default=None)
