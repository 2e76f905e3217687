"""Runs of the project's own code in float64, and the same start, data and learning rates for a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from testbed.method import Method, State
from testbed.rounds import Run, federate, learning_rate
from testbed.task import Shard, batch_indices
from tests.contract.harness import clients_of, run_of
from tests.reference.steps import Client


class InFloat64:
    """A method whose state begins in float64; everything else is the method's own."""

    def __init__(self, method: Method) -> None:
        self._method = method

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def start(self, *arguments: Any) -> State:
        state = self._method.start(*arguments)
        return replace(state, tensors={name: tensor.double() for name, tensor in state.tensors.items()})


def float64_run(method: Method, folder: Path, **config: Any) -> Run:
    """`run_of` in float64: two clients, two rounds, two steps, all texts of 16 tokens, unless said otherwise."""
    run = run_of(method, folder, **{"clients": 2, "rounds": 2, "steps": 2, "evaluate_every": 100, **config})
    run.method = InFloat64(run.method)
    run.work = replace(run.work, dtype="float64")
    return run


def started(run: Run) -> State:
    """The run's state before its first round."""
    return run.method.start(run.base, run.work, clients_of(run), run.config.seed, run.config.rounds)


def finished(run: Run) -> State:
    """The state after all rounds.  AssertionError when a job of it did not finish."""
    state = federate(run)
    assert {result.outcome for result in run.folder.results()} == {"finished"}
    return state


def weights_of(run: Run) -> dict[str, Tensor]:
    """The base model's weights by canonical name, float64."""
    base, found = run.base, {}
    for position, content in enumerate(base.blocks):
        prefix = f"{base.shape.block_prefix}.{position}"
        found |= {f"{prefix}.{name}": tensor for name, tensor in base.tensors(content).items()}
    return {name: tensor.double() for name, tensor in {**found, **base.tensors(base.outside)}.items()}


def data_of(run: Run) -> list[Client]:
    """Every client's number of examples and its batches, by round and by local step.

    A batch is token ids, or pixels in float64, and labels.
    """
    return [_client(run, index, run.store.path(content)) for index, content in enumerate(run.shards)]


def _client(run: Run, client: int, path: Path) -> Client:
    shard, config = Shard.open(path), run.config

    def batch(round_index: int, step: int) -> tuple[Tensor, Tensor]:
        rows = batch_indices(len(shard), run.work.batch_size, config.seed, round_index, client, step)
        found = shard.batch(rows, run.work.length, 0)
        return (found.input_ids if found.pixel_values is None else found.pixel_values.double()), found.labels

    return len(shard), [[batch(r, step) for step in range(config.steps)] for r in range(config.rounds)]


def rates_of(run: Run) -> list[float]:
    """The learning rate of every round."""
    return [learning_rate(run.config, index) for index in range(run.config.rounds)]


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Over all elements of all tensors; both have the same names."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)
