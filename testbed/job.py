"""What goes to a node and what comes back: Job and Result.  Standard library only.

Tensors travel beside these as raw safetensors bytes; everything here is the JSON header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from testbed.measurement import Measurement
from testbed.method import Submodel, Workload

FINISHED = "finished"
OUT_OF_MEMORY = "out_of_memory"
OVER_BUDGET = "over_budget"
TIMED_OUT = "timed_out"
UNREACHABLE = "unreachable"
REFUSED = "refused"
FAILED = "failed"
#: The kind of a job without a trainer: its device cools down and rests, measured (`testbed.node.rest`).
REST = "rest"
OUTCOMES = (FINISHED, OUT_OF_MEMORY, OVER_BUDGET, TIMED_OUT, UNREACHABLE, REFUSED, FAILED)


@dataclass(frozen=True)
class Job:
    """One client's work in one round.  Every hash names content that deploy has put on the node."""

    id: str  # unique in the run: a job delivered twice runs once
    run: str
    round: int
    client: int
    kind: str
    method: str
    settings: Mapping[str, Any]
    config: str  # hash of the base model's configuration (JSON)
    outside: str  # hash of embeddings, final norm and head
    submodel: Submodel  # every block with its content hash
    shard: str
    work: Workload
    steps: int
    learning_rate: float
    seed: int
    scalars: Mapping[str, Any] = field(default_factory=dict)
    state: str | None = None  # hash of the client's kept state that this job starts from
    further: tuple[str, ...] = ()  # hashes of files that the method itself reads
    reads_base: bool = True  # else the job brings every weight itself
    disturbances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # what it undergoes (node.disturbed)

    @property
    def contents(self) -> tuple[str, ...]:
        """Every hash that must be present on the node, without repetition."""
        if self.kind == REST:
            return ()
        blocks = [block.content for block in self.submodel.blocks if block.content]
        base = [self.outside, *blocks] if self.reads_base else []
        return tuple(dict.fromkeys([self.config, *base, *self.further, self.shard]))

    def to_json(self) -> dict[str, Any]:
        """As `dataclasses.asdict`, without its deep copies: this is on the way of every job."""
        blocks = tuple(dict(vars(block)) for block in self.submodel.blocks)
        submodel = {**vars(self.submodel), "blocks": blocks}
        plain = {**vars(self), "submodel": submodel, "work": dict(vars(self.work))}
        if not self.disturbances:
            del plain["disturbances"]
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        known = {f.name for f in fields(cls)}
        plain = {key: value for key, value in data.items() if key in known}
        further = tuple(data.get("further", ()))
        return cls(
            **{
                **plain,
                "submodel": Submodel.from_json(data["submodel"]),
                "work": Workload(**data["work"]),
                "further": further,
            }
        )


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a payload: what must hold before it is used."""

    name: str
    dtype: str  # safetensors' word: "F32", "BF16", …
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Result:
    """How a job ended.  Failure is data: a result always comes back, with its outcome and its cause."""

    job: str
    client: int
    round: int
    outcome: str
    device: str = ""
    kind: str = "train"
    error: str | None = None
    phase: str | None = None  # where it ended, if not finished
    examples: int = 0
    tokens: int = 0
    scalars: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[TensorSpec, ...] = ()
    state: str | None = None
    measurement: Measurement = field(default_factory=Measurement)

    @property
    def finished(self) -> bool:
        return self.outcome == FINISHED

    @property
    def dropped_out(self) -> bool:
        """Whether its client dropped out because the run declares that some do."""
        return bool(self.measurement.disturbances.get("dropout", {}).get("dropped_out"))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        tensors = tuple(
            TensorSpec(
                spec["name"],
                spec["dtype"],
                tuple(spec["shape"]),
                None if spec["ranges"] is None else tuple((start, stop) for start, stop in spec["ranges"]),
            )
            for spec in data["tensors"]
        )
        return cls(**{**data, "tensors": tensors, "measurement": Measurement.from_json(data["measurement"])})
