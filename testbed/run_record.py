"""What is written down about a run: its record, its rounds and its status.  Nouns; standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from testbed.process_identity import ProcessIdentity

RUNNING = "running"
FINISHED = "finished"
INTERRUPTED = "interrupted"
FAILED = "failed"
#: In the facts of a status: for how long controllers were at the run, in all.
RUNNING_SECONDS = "running_seconds"
STATES = (RUNNING, FINISHED, INTERRUPTED, FAILED)


@dataclass(frozen=True)
class RunRecord:
    """What is settled before a run starts, as JSON objects.

    plan       clients with submodel, prediction, budget and outcome; model; work
    config     method, settings, data, partition, seed, rounds, reference, uncapped, …
    inventory  {"source": file, "devices": [device as plain data]}
    versions   testbed.environment.describe_environment
    """

    plan: Mapping[str, Any]
    config: Mapping[str, Any]
    inventory: Mapping[str, Any]
    versions: Mapping[str, Any]


@dataclass(frozen=True)
class RoundRecord:
    """One round.  `quality` holds "loss", "accuracy" and "examples" of an evaluation, None where there was none."""

    round: int  # counted from 0
    seconds: float
    learning_rate: float
    participants: int = 0  # clients that were ordered something
    finished: int = 0  # … whose updates were combined
    deployed_bytes: int = 0
    train_loss: float | None = None
    quality: Mapping[str, float | None] | None = None
    evaluation_seconds: float | None = None  # of `seconds`; None in older records, which do not tell them apart


@dataclass(frozen=True)
class Status:
    """Where a run stands.  `process` is the controller that runs it, so that a dead one is noticed."""

    state: str = INTERRUPTED
    error: str | None = None
    started: str | None = None  # ISO 8601, UTC
    ended: str | None = None
    process: ProcessIdentity | None = None
    initial_state: str | None = None  # hash of the tensors before the first round
    final_state: str | None = None  # hash of the tensors and scalars after the last round
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Status:
        process = data.get("process")
        return cls(**{**data, "process": ProcessIdentity(**process) if process else None})

    @property
    def alive(self) -> bool:
        """Whether another process is still running this."""
        return self.state == RUNNING and self.process is not None and self.process.alive

    @property
    def pid(self) -> int | None:
        """The controller's process id while it runs."""
        return self.process.pid if self.process else None


def name_of(content: Any) -> str | None:
    """The name in a record that is either a name or an object with one."""
    name = content.get("name") if isinstance(content, Mapping) else content
    return None if name is None else str(name)


def finite(value: float | None) -> float | None:
    """The number, or None when it is none: a loss that ran away is no quality."""
    return value if value is not None and math.isfinite(value) else None
