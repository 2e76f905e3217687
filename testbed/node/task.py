"""A job as the agent keeps it: its phases so far, and the result that it becomes."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testbed.node.limits import Group

FINISHED = "finished"
FAILED = "failed"
OUT_OF_MEMORY = "out_of_memory"
OVER_BUDGET = "over_budget"
UNREACHABLE = "unreachable"
#: What `testbed.measurement.Conditions.throttled` says of a thermal limit that the run declares.
DECLARED_LIMIT = "declared: thermal_limit"
_NOTHING: dict[str, Any] = {
    "lower_bytes": None, "estimate_bytes": None, "upper_bytes": None,
    "sources": {}, "file_bytes": None, "accelerator_bytes": None, "refaults": None, "samples": 0,
}  # fmt: skip


class Task:
    """One job on this node.  `since`: when its first byte came, on the monotonic clock."""

    def __init__(self, header: dict[str, Any], since: float, received: float) -> None:
        job = self.job = header["job"]
        self.id: str = header["id"]
        self.hash = header.get("hash")
        self.since = since
        self.who = {
            "job": self.id,
            "client": job.get("client"),
            "round": job.get("round"),
            "kind": job.get("kind", "train"),
        }
        self.phases: list[dict[str, Any]] = [unmetered("receive", received - since, since)]
        self.phase: str | None = None
        self.cancelled: str | None = None
        self.exceeded: str | None = None  # how it went over a budget that the kernel cannot enforce
        self.dropped = False  # nobody asks for it any more
        self.dropped_out: str | None = None  # how its client did, as the run declares

    def result(
        self,
        where: dict[str, Any],
        outcome: str,
        error: str | None,
        produced: dict[str, Any],
        measured: dict[str, Any],
        undergone: dict[str, Any],
    ) -> dict[str, Any]:
        """`testbed.job.Result` as JSON, with the hash of the update beside it.

        `where`: device, limit_bytes and baseline_bytes of this node; `produced`: what the trainer wrote; `measured`:
        power and conditions of the job's window; `undergone`: what was done to it, as the run declares.
        """
        finished = outcome == FINISHED
        phase = self.phase or (self.phases[-1]["name"] if self.phases else None)
        return {
            **self.who,
            "device": where["device"],
            "outcome": outcome,
            "error": error,
            "phase": None if finished else phase,
            "examples": produced.get("examples", 0),
            "tokens": produced.get("tokens", 0),
            "scalars": produced.get("scalars", {}),
            "tensors": produced.get("tensors", []),
            "state": produced.get("state"),
            "hash": produced.get("hash"),
            "measurement": {
                "phases": [_from_beginning(phase, self.since) for phase in self.phases],
                "seconds": sum(phase["seconds"] for phase in self.phases if phase["name"] != "idle"),
                "limit_bytes": where["limit_bytes"],
                "baseline_bytes": where["baseline_bytes"],
                "accelerator_peak_bytes": produced.get("accelerator_peak_bytes"),
                "bytes_down": 0,  # whoever sees the whole frames counts them
                "bytes_up": 0,
                "begun_monotonic_seconds": self.since,
                "disturbances": undergone,
                **_marked(measured, undergone),
            },
        }

    @staticmethod
    def sent(result: dict[str, Any], begun: float, seconds: float, measured: dict[str, Any]) -> dict[str, Any]:
        """The same result with the time that its update took to send, and what was measured until then."""
        measurement = result["measurement"]
        send = _from_beginning(unmetered("send", seconds, begun), measurement["begun_monotonic_seconds"])
        longer = {
            **measurement,
            "phases": [*measurement["phases"], send],
            "seconds": measurement["seconds"] + seconds,
            **_marked(measured, measurement["disturbances"]),
        }
        return {**result, "measurement": longer}

    def stopped(self) -> tuple[str, str] | None:
        """Outcome and message where the agent itself has killed the trainer; None where it has not."""
        if self.dropped_out is not None:
            return UNREACHABLE, self.dropped_out
        if self.cancelled is not None:
            return self.cancelled, f"it was cancelled in phase {self.phases[-1]['name']}"
        return None if self.exceeded is None else (OVER_BUDGET, self.exceeded)

    def out_of_memory(self, group: Group | None) -> tuple[str, str]:
        """Outcome and message after the kernel has killed for memory."""
        last = self.phases[-1]
        peak = last["peak"]["upper_bytes"]
        limit = group.limit_bytes if group is not None else None
        return OUT_OF_MEMORY, (
            f"out of memory in phase {last['name']}: the kernel killed the trainer at a peak of {_mebibytes(peak)}, "
            f"its limit is {_mebibytes(limit)}"
        )

    def death(self, code: int, log_tail: str) -> str:
        """Message after the trainer has ended by itself, or by somebody's hand."""
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        end = f"; the end of its log: {log_tail}" if log_tail else ""
        return f"the trainer {how} in phase {self.phases[-1]['name']}{end}"


def unmetered(name: str, seconds: float, begun: float) -> dict[str, Any]:
    """A phase in which the trainer had no part: its time (`begun` on the monotonic clock), and no memory."""
    return {"name": name, "seconds": seconds, "peak": _NOTHING, "trace": [], "begun_seconds": begun}


def _marked(measured: dict[str, Any], undergone: dict[str, Any]) -> dict[str, Any]:
    """What was measured; a declared limit that held the trainer back stands among what the board was held back by."""
    conditions = measured.get("conditions")
    if conditions is None or not undergone.get("thermal_limit", {}).get("slowed_seconds"):
        return measured
    throttled = [*(conditions["throttled"] or ()), DECLARED_LIMIT]
    return {**measured, "conditions": {**conditions, "throttled": throttled}}


def _from_beginning(phase: dict[str, Any], since: float) -> dict[str, Any]:
    return {**phase, "begun_seconds": round(phase["begun_seconds"] - since, 6)}


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _mebibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / (1 << 20):.1f} MiB"
