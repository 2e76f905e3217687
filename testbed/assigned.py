"""A job on its way: what was sent, what has come, and what came back, checked before it is believed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from testbed.errors import StoreError, WireError
from testbed.job import FAILED, OUTCOMES, TIMED_OUT, Job, Result, TensorSpec
from testbed.node.pace import Pace
from testbed.node.spool import FileSink
from testbed.node.tensors import read_tensor_header
from testbed.quantities import seconds_text


class UpdateSink(FileSink):
    """Takes an update into its file, and counts and hashes it on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(self.partial)
        self.digest = hashlib.sha256()

    def write(self, data: memoryview) -> None:
        self.digest.update(data)
        super().write(data)

    def keep(self) -> None:
        """The update is what it should be."""
        self.partial.rename(self.path)

    def discard(self) -> None:
        """The update is of no use."""
        self.partial.unlink(missing_ok=True)


class Assigned:
    """A job with its payload and its limits; `content_path` says where on the controller a content lies."""

    def __init__(
        self,
        job: Job,
        payload: Path | None,
        update_path: Path,
        timeout_seconds: float | None,
        content_path: Callable[[str], Path] | None = None,
        payload_hash: str | None = None,
    ) -> None:
        self.job = job
        self.payload = payload
        self.update_path = update_path
        self.payload_hash = payload_hash
        self.contents = job.contents if content_path is not None else ()
        self.sent = False  # since contact was made
        self.delivered = False  # to an agent, which may know it still
        self.restarts = 0  # of the device, while it had the job
        self.power_cycled = False  # because it did not come back
        self.misread = False  # what came from the agent was no frame, once
        self.phase: str | None = None
        self.cancelled_at: float | None = None
        self.deadline: float | None = None
        self.bytes_down = 0
        self.bytes_up = 0
        self.sink: UpdateSink | None = None
        self.pace = Pace.of(job.disturbances)  # None: as fast as the link takes it
        self._timeout = timeout_seconds
        self._content_path = content_path

    def files(self) -> Mapping[str, Path]:
        """Content hash → file on the controller."""
        if self._content_path is None:
            return {}
        return {content: self._content_path(content) for content in self.contents}

    def start_clock(self) -> None:
        """From here on it counts how long it takes; also when it begins once more."""
        self.deadline = time.monotonic() + self._timeout if self._timeout is not None else None

    @property
    def limit_text(self) -> str:
        """What a job that took too long went over, by the name that it is set by."""
        return "" if self._timeout is None else f", over its job_timeout_seconds ({seconds_text(self._timeout)})"

    def ended(self, device: str, outcome: str, error: str) -> Result:
        """A result that the controller has to give, because the agent did not."""
        if self.job.disturbances:
            error += f" (while it underwent, as the run declares: {', '.join(self.job.disturbances)})"
        return Result(self.job.id, self.job.client, self.job.round, outcome, device, self.job.kind, error)


def accept(data: Any, assigned: Assigned, device: str) -> tuple[Result, Path | None]:
    """What an agent says about its job, believed only as far as it can be checked.

    Raises StoreError when the controller's own disk did not take the update.
    """
    sink = assigned.sink
    if sink is not None and sink.error is not None:
        raise StoreError(f"{sink.path}: {sink.error.strerror}; free some space, then continue with --resume")
    try:
        result = _result(data, assigned, device)
    except WireError as error:
        result = assigned.ended(device, FAILED, str(error))
    if result.outcome == TIMED_OUT:
        result = replace(result, error=f"{result.error or 'it took too long'}{assigned.limit_text}")
    try:
        if result.finished:
            _check_update(result, data.get("hash"), sink)
    except WireError as error:
        result = replace(result, outcome=FAILED, phase="send", error=str(error))
    if sink is not None and not result.finished:
        sink.discard()
    if sink is None or not result.finished:
        return result, None
    sink.keep()
    return result, sink.path


def _result(data: Any, assigned: Assigned, device: str) -> Result:
    job = assigned.job
    try:
        result = Result.from_json({key: value for key, value in data.items() if key != "hash"})
        numbers_fit = all(type(count) is int and count >= 0 for count in (result.examples, result.tokens))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WireError(f"the result of job {job.id} cannot be read: {type(error).__name__}: {error}") from None
    same = (result.job, result.client, result.round, result.kind) == (job.id, job.client, job.round, job.kind)
    plain = isinstance(result.scalars, dict) and isinstance(result.state, str | None)
    if not same or result.outcome not in OUTCOMES or not numbers_fit or not plain:
        raise WireError(f"the result of job {job.id} is not what was asked for: {str(data)[:500]}")
    measuring = len(json.dumps(data["measurement"], separators=(",", ":")))  # as in the frame that it came in
    counted = replace(
        result.measurement,
        bytes_down=assigned.bytes_down,
        bytes_up=max(0, assigned.bytes_up - measuring),
        measurement_bytes=measuring,
        disturbances=_with_link(result.measurement.disturbances, assigned.pace),
    )
    return replace(result, device=device, measurement=counted)


def _with_link(undergone: dict[str, dict[str, Any]], pace: Pace | None) -> dict[str, dict[str, Any]]:
    """With what the slow link has let pass on its way to the node: of that the node knows nothing."""
    if pace is None or "slow_link" not in undergone:
        return undergone
    return {**undergone, "slow_link": {**undergone["slow_link"], **pace.told("down")}}


def _check_update(result: Result, expected_hash: Any, sink: UpdateSink | None) -> None:
    """The tensors must be those that the result names, and arrive as they were written."""
    if sink is None:
        if result.tensors:
            raise WireError("the result names tensors, and none came")
        return
    if expected_hash is not None and expected_hash != sink.digest.hexdigest():
        raise WireError("the update is not what the trainer wrote: its hash differs")
    wrong = [spec.name for spec in result.tensors if not _ranges_fit(spec)]
    if wrong:
        raise WireError(f"the ranges of tensor {wrong[0]!r} do not have its shape")
    found = read_tensor_header(sink.partial, "the update")
    said = {spec.name: (spec.dtype, spec.shape) for spec in result.tensors}
    if found != said:
        odd = sorted(name for name in {*found, *said} if found.get(name) != said.get(name))
        described = ", ".join(f"{name}: said {said.get(name)}, found {found.get(name)}" for name in odd[:3])
        raise WireError(f"the update's tensors are not those that the result names ({len(odd)} differ: {described})")


def _ranges_fit(spec: TensorSpec) -> bool:
    """Whether the ranges cover exactly the tensor's shape."""
    if spec.ranges is None:
        return True
    edges = [edge for pair in spec.ranges for edge in pair]
    sizes = tuple(stop - start for start, stop in spec.ranges)
    return all(type(edge) is int and edge >= 0 for edge in edges) and sizes == spec.shape


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
