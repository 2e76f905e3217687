"""RoLoRA: whose turn it is."""

from __future__ import annotations

import torch

from methods.rolora import RoLora
from testbed.model.combine import state_hash
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import run_of
from tests.reference.driver import started

SHORT = {"clients": 2, "steps": 1, "evaluate_every": 1}


def factors_sent(run):
    """The factors among what was sent, by round."""
    sent = {}
    for result in run.folder.results():
        names = (spec.name for spec in result.tensors)
        sent.setdefault(result.round, set()).update(name.split("_")[-1][0] for name in names if "lora_" in name)
    return [sent[index] for index in sorted(sent)]


def test_a_round_trains_and_sends_one_factor_b_first(tmp_path):
    run = run_of(RoLora(rank=4), tmp_path, rounds=4, **SHORT)
    federate(run)
    assert factors_sent(run) == [{"B"}, {"A"}, {"B"}, {"A"}]
    assert all("score.weight" in {spec.name for spec in result.tensors} for result in run.folder.results())
    assert run.engine.phases[::2] == ["train B", "train A", "train B", "train A"]


def test_a_first_factor_of_a_leaves_it_as_it_is_because_b_is_zero(tmp_path):
    run = run_of(RoLora(rank=4, first="A"), tmp_path, rounds=1, **SHORT)
    before, after = started(run).tensors, federate(run).tensors
    assert factors_sent(run) == [{"A"}]
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["score.weight"]


def test_a_round_without_result_is_no_turn(tmp_path):
    run = run_of(RoLora(rank=4), tmp_path, rounds=3, **SHORT)
    absent = {0: {0, 1}, 1: set(), 2: set()}
    run.watcher.evaluated = lambda index, quality: setattr(run.engine, "absent", absent[index])
    state = federate(run)
    assert [job.scalars["factor"] for job in run.engine.jobs[::2]] == ["B", "A", "A"]
    assert state.scalars["factor"] == "B"


def test_both_factors_are_the_evaluated_models(tmp_path):
    run = run_of(RoLora(rank=4), tmp_path, **SHORT)
    state = federate(run)
    [snapshot] = run.method.snapshots(state, run.base)
    assert state_hash(snapshot.tensors, {}) == state_hash(state.tensors, {})
    assert all(bool(tensor.any()) for tensor in state.tensors.values())
