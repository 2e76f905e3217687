"""What a run is: its settings, and its plan.  Nouns, standard library only; JSON in the run's folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from testbed.errors import UsageError
from testbed.method import RESIDENT, Client, Submodel
from testbed.spelling import did_you_mean

PLANNED = "planned"
#: MLPerf and others want a minute at rest on either side of what is measured.
IDLE_SECONDS = 60.0
#: By what a run may end before its last round (`testbed.stopping`): a target, or a budget that has run out.
ACCURACY, SECONDS, JOULES, BYTES = "accuracy", "seconds", "joules", "bytes"
BUDGETS = (SECONDS, JOULES, BYTES)
ENDS = (ACCURACY, *BUDGETS)


#: Of what decides a run: the least that it may be, in words too.
_LEAST: dict[str, tuple[float, str]] = {
    **dict.fromkeys(
        ("rounds", "steps", "batch_size", "length", "evaluate_every", "min_participants"), (1, "at least 1")
    ),
    **dict.fromkeys(
        (
            "learning_rate", "final_learning_rate", "job_timeout_seconds", "reconnect_seconds", "idle_seconds",
            "cool_seconds", "warm_up",
        ),
        (0, "0 or more"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result, beside the inventory.  Defaults are the quickstart's."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None  # one that comes along, or a Hugging Face folder; None: the task's own
    task: str | None = None  # None: the method's own
    data: Mapping[str, Any] = field(default_factory=dict)  # fields of data.DataSpec that differ from the defaults
    partition: Mapping[str, Any] = field(default_factory=dict)  # … of data.PartitionSpec
    rounds: int = 6
    participants: float = 1.0  # a fraction (≤ 1), or a count (> 1)
    min_participants: int = 1
    steps: int = 4
    batch_size: int = 16
    length: int = 64
    learning_rate: float = 2e-3
    final_learning_rate: float = 2e-4
    schedule: str = "cosine"  # over rounds; constant within a round
    seed: int = 0
    evaluate_every: int = 3
    job_timeout_seconds: float = 600.0
    reconnect_seconds: float | None = None  # for which a lost link is looked for again; None: the device's kind decides
    dtype: str = "float32"
    holding: str = RESIDENT
    checkpointing: bool = False
    capped: bool = True
    refit: bool = False
    idle_seconds: float | None = None  # at rest, before and after; None: IDLE_SECONDS where a device has a meter
    start_below_celsius: float | None = None  # no device begins hotter than this
    cool_seconds: float = 600.0  # for which that is waited at most
    warm_up: int = 0  # jobs of every device before the first round, which count for nothing
    power_cycle: bool = False  # a device that hangs is switched off and on, once a job
    disturbances: Mapping[str, Any] = field(default_factory=dict)  # what devices undergo (`testbed.disturbances`)
    until: Mapping[str, float] = field(default_factory=dict)  # of ENDS: what ends the run before its last round

    def __post_init__(self) -> None:
        for name, (least, words) in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # so that no number is refused too
                raise UsageError(f"{name.replace('_', '-')}={value}: expected {words}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{name.replace('_', '-')}={value}: expected a number")
        if self.participants <= 0:
            raise UsageError(f"participants={self.participants}: expected a fraction up to 1, or a count above 1")
        if self.schedule not in {"cosine", "constant"}:
            raise UsageError(f"schedule={self.schedule!r}: expected cosine or constant")
        _check_until(self.until)

    def participants_of(self, clients: int) -> int:
        """How many of so many clients are asked in a round, if as many can."""
        count = round(self.participants * clients) if self.participants <= 1 else int(self.participants)
        return max(count, self.min_participants)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunConfig:
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})


def _check_until(until: Mapping[str, float]) -> None:
    for name, limit in until.items():
        if name not in ENDS:
            raise UsageError(f"until {name}: {did_you_mean(name, ENDS)}")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit) or limit <= 0:
            raise UsageError(f"until {name}={limit}: expected a number above 0")
        if name == ACCURACY and limit > 1:
            raise UsageError(f"until {name}={limit}: expected a share above 0 and up to 1")


@dataclass(frozen=True)
class ClientPlan:
    """What the plan settled for one client: a submodel and its predicted peak, or why it takes no part."""

    index: int
    device: str
    examples: int
    budget_bytes: int
    outcome: str  # PLANNED or job.REFUSED
    submodel: Submodel | None = None
    predicted_bytes: int | None = None  # what the budget must hold: unreclaimable memory and the working set of files
    predicted_peak_bytes: int | None = None  # … of which unreclaimable: what the measured estimate is compared with
    predicted_phase: str | None = None
    parts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # phase → part → bytes
    needed_bytes: int | None = None  # of the smallest choice, where refused
    reason: str | None = None
    label_counts: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"client-{self.index}"

    @property
    def planned(self) -> bool:
        return self.outcome == PLANNED

    def client(self) -> Client:
        """The participant that methods see."""
        if self.submodel is None:
            raise UsageError(f"{self.name} was refused in the plan and cannot take part")
        return Client(self.index, self.device, self.examples, self.submodel, self.label_counts)

    def to_json(self) -> dict[str, Any]:
        blocks = self.submodel.positions if self.submodel else ()
        return {**asdict(self), "name": self.name, "blocks": list(blocks)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ClientPlan:
        known = {f.name for f in fields(cls)}
        plain = {key: value for key, value in data.items() if key in known}
        if plain["submodel"]:
            plain["submodel"] = Submodel.from_json(plain["submodel"])
        return cls(**{**plain, "label_counts": tuple(plain["label_counts"])})


@dataclass(frozen=True)
class Plan:
    """Who takes part and what each one trains, settled before anything runs."""

    clients: tuple[ClientPlan, ...]

    @property
    def taking_part(self) -> tuple[ClientPlan, ...]:
        return tuple(client for client in self.clients if client.planned)

    @property
    def refused(self) -> tuple[ClientPlan, ...]:
        return tuple(client for client in self.clients if not client.planned)

    @classmethod
    def from_json(cls, clients: Sequence[Mapping[str, Any]]) -> Plan:
        return cls(tuple(ClientPlan.from_json(client) for client in clients))
