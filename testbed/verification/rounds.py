"""Rounds held against the results that they were made of, and results against the plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from testbed.durable import read_json
from testbed.errors import StoreError
from testbed.job import OUTCOMES, REST, Result
from testbed.method import EVALUATE
from testbed.node.tensors import DTYPE_BITS
from testbed.run_record import FINISHED
from testbed.verification.checks import Check, counted, judged

if TYPE_CHECKING:
    from testbed.run_record import RoundRecord
    from testbed.store import RunFolder

_TOLERANCE = 1e-9


def check_rounds(folder: RunFolder) -> Check:
    """Participants, finished jobs, training loss and quality of every round; none is missing."""
    rounds, results = folder.rounds(), _of_rounds(folder.results())
    failures = [*_series(folder, rounds), *_without_a_round(folder, rounds, results)]
    for record in rounds:
        own = [result for result in results if result.round == record.round]
        failures += [f"round {record.round}: {failure}" for failure in _round(record, own)]
    return judged("rounds", f"{counted(len(rounds), 'round')} of {counted(len(results), 'result')}", failures)


def check_results(folder: RunFolder) -> Check:
    """Every file of a result can be read, is there once, and belongs to a client of the plan."""
    failures, seen = [], Counter[str]()
    paths = sorted((folder.path / "results").glob("[!.]*.json"))
    known = {client["index"]: client for client in folder.plan.get("clients", ())}
    for path in paths:
        try:
            result = Result.from_json(read_json(path))
        except (StoreError, KeyError, TypeError) as error:
            failures.append(f"results/{path.name} is not a readable result ({error})")
            continue
        seen[result.job] += 1
        failures += [f"{result.job}: {failure}" for failure in _result(result, known)]
    failures += [f"{job}: there are {count} results of it" for job, count in seen.items() if count > 1]
    return judged("results", f"{counted(len(paths), 'result')} of clients of the plan", failures)


def _of_rounds(results: Sequence[Result]) -> list[Result]:
    """Those that a round counts: an evaluation on the devices comes after it."""
    return [result for result in results if result.kind != EVALUATE]


def _series(folder: RunFolder, rounds: Sequence[RoundRecord]) -> Iterator[str]:
    numbers = [record.round for record in rounds]
    missing = sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers))
    if missing:
        yield f"there is no record of round {', '.join(map(str, missing))}"
    status, planned = folder.status, folder.config.get("rounds")
    if status.state == FINISHED and not status.facts.get("stopped") and len(rounds) != planned:
        yield f"the run is finished after {counted(len(rounds), 'round')}, {planned} were asked for"


def _without_a_round(folder: RunFolder, rounds: Sequence[RoundRecord], results: Sequence[Result]) -> Iterator[str]:
    """Of a run that has not ended well, the round under way has results and no record yet."""
    if folder.status.state != FINISHED:
        return
    known = {record.round for record in rounds}
    for result in results:
        if result.round not in known:
            yield f"{result.job} is of round {result.round}, of which there is no record"


def _round(record: RoundRecord, results: Sequence[Result]) -> Iterator[str]:
    if record.participants != len(results):
        yield f"{record.participants} participants, and {counted(len(results), 'result')}"
    finished = [result for result in results if result.finished]
    if record.finished != len(finished):
        yield f"{record.finished} updates combined, and {counted(len(finished), 'finished result')}"
    loss = _mean_loss(finished)
    if not _same(record.train_loss, loss):
        yield f"the results give {_loss_text(loss)}, its record has {_loss_text(record.train_loss)}"
    if not math.isfinite(record.seconds) or record.seconds < 0:
        yield f"it took {record.seconds} s"
    for name, value in (record.quality or {}).items():
        if value is not None and not math.isfinite(value):
            yield f"its {name} is {value}, which is no number"
    accuracy = (record.quality or {}).get("accuracy")
    if accuracy is not None and math.isfinite(accuracy) and not 0 <= accuracy <= 1:
        yield f"its accuracy is {accuracy}, which is no share"


def _mean_loss(finished: Sequence[Result]) -> float | None:
    """Weighted by examples, of those that tell a loss; as `testbed.rounds` has it."""
    told = [(result.scalars["loss"], result.examples) for result in finished if "loss" in result.scalars]
    examples = sum(weight for _, weight in told)
    return sum(loss * weight for loss, weight in told) / examples if examples else None


def _loss_text(loss: float | None) -> str:
    return "no training loss" if loss is None else f"a training loss of {loss}"


def _same(recorded: float | None, derived: float | None) -> bool:
    if recorded is None or derived is None:
        return recorded is derived
    if not math.isfinite(recorded) or not math.isfinite(derived):
        return repr(recorded) == repr(derived)
    return math.isclose(recorded, derived, rel_tol=_TOLERANCE)


def _result(result: Result, clients: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    if result.outcome not in OUTCOMES:
        yield f'its outcome "{result.outcome}" is none'
    if result.kind == REST:
        return
    client = clients.get(result.client)
    if client is None:
        yield f"the plan has no client {result.client}"
    elif client["outcome"] != "planned":
        yield f"client {result.client} was {client['outcome']} in the plan"
    elif client["device"] != result.device:
        yield f"it ran on {result.device}, the plan has client {result.client} on {client['device']}"
    sent = _tensor_bytes(result)
    if result.finished and result.measurement.bytes_up < sent:
        yield f"its tensors are {sent} B, and {result.measurement.bytes_up} B came up"


def _tensor_bytes(result: Result) -> int:
    return sum(math.prod(spec.shape) * DTYPE_BITS.get(spec.dtype, 0) // 8 for spec in result.tensors)
