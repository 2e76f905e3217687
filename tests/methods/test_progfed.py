"""ProgFed: which blocks are there when, and what is trained."""

from __future__ import annotations

import pytest

from methods.lora import Lora
from methods.progfed import ProgFed
from testbed.errors import UsageError
from testbed.model.combine import state_hash
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import BLOCKS, WORK, base_model, run_of
from tests.reference import progfed
from tests.reference.driver import data_of, finished, float64_run, largest_difference, rates_of, started, weights_of

SHORT = {"clients": 2, "steps": 1, "evaluate_every": 100}


def compared(tmp_path, mutation=None):
    """How far two stages of the method are from the reference's."""
    run = float64_run(ProgFed(rank=2, stages=2), tmp_path)
    expected = progfed.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        stages=2, scale=16.0, learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    return largest_difference(finished(run).tensors, expected)


def test_two_stages_give_what_the_reference_gives(tmp_path):
    assert compared(tmp_path) < 1e-5


def test_a_reference_that_freezes_earlier_blocks_is_told_apart(tmp_path):
    assert compared(tmp_path, mutation="newest_only") > 1e-3


def test_one_stage_is_vanilla_federated_lora_bit_for_bit(tmp_path):
    grown = federate(run_of(ProgFed(rank=4, stages=1), tmp_path / "grown", **SHORT))
    plain = federate(run_of(Lora(rank=4), tmp_path / "plain", **SHORT))
    assert state_hash(grown.tensors, {}) == state_hash(plain.tensors, {})


@pytest.mark.parametrize(
    ("settings", "rounds", "depths"),
    [
        ({}, 8, [1, 1, 2, 2, 3, 3, 4, 4]),
        ({}, 6, [1, 2, 2, 3, 4, 4]),
        ({}, 2, [2, 4]),
        ({}, 1, [4]),
        ({"stages": 3}, 3, [2, 3, 4]),
        ({"stages": 9}, 4, [1, 2, 3, 4]),
        ({"stages": 2, "rounds_per_stage": (1, 3)}, 4, [2, 4, 4, 4]),
    ],
)
def test_the_model_has_the_first_blocks_and_ends_with_all(settings, rounds, depths, tmp_path):
    run = run_of(ProgFed(rank=2, **settings), tmp_path, rounds=rounds, clients=1)
    state, clients, ordered = started(run), [client.client() for client in run.plan.clients], []
    for index in range(rounds):
        state = run.method.begin(state, run.base, index)
        [order] = run.method.order(state, run.base, clients, index)
        ordered.append(order.submodel.positions)
    assert ordered == [tuple(range(depth)) for depth in depths]


def test_what_is_evaluated_is_the_model_grown_so_far_and_before_that_the_base_model(tmp_path):
    run = run_of(ProgFed(rank=2), tmp_path)
    state = started(run)
    [before] = run.method.snapshots(state, run.base)
    [grown] = run.method.snapshots(run.method.begin(state, run.base, 0), run.base)
    assert before.submodel.positions == tuple(range(BLOCKS))
    assert grown.submodel.positions == (0, 1)
    assert not [name for name in grown.tensors if name.startswith("model.layers.2.")]


def test_a_client_that_is_too_small_for_a_stage_is_left_out_of_it_and_the_model_stays(tmp_path):
    run = run_of(ProgFed(rank=2), tmp_path, rounds=4, keep=2, **SHORT)
    state = federate(run)
    assert [job.round for job in run.engine.jobs] == [0, 0, 1, 1]
    assert state.scalars["stage"] == 2
    assert set(run.engine.phases) == {"stage 1", "stage 2"}


def test_warm_up_rounds_of_a_stage_train_its_new_blocks_and_the_head_only(tmp_path):
    method = ProgFed(rank=2, stages=2, warmup_rounds=1)
    run = run_of(method, tmp_path, **{**SHORT, "rounds": 4, "clients": 1})
    federate(run)
    sent = [{spec.name for spec in result.tensors} for result in sorted(run.folder.results(), key=lambda r: r.round)]
    assert [job.kind for job in run.engine.jobs] == ["grow", "grow", "warm up", "grow"]
    positions = [{int(name.split(".")[2]) for name in names if name.startswith("model.layers.")} for names in sent]
    assert positions == [{0, 1}, {0, 1}, {2, 3}, {0, 1, 2, 3}]
    assert all("score.weight" in names for names in sent)


def test_phases_are_the_stages_that_a_submodel_is_large_enough_for(tmp_path):
    shape = base_model(tmp_path).shape
    method = ProgFed()
    sizes = {len(choice.blocks): method.phases(choice, shape, WORK) for choice in method.choices(shape)}
    assert list(sizes) == [4, 3, 2, 1]
    assert [phase.name for phase in sizes[3]] == ["stage 1", "stage 2", "stage 3"]
    assert [len(phase.blocks) for phase in sizes[3]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 0}, "stages=0"),
        ({"warmup_rounds": -1}, "warmup_rounds=-1"),
        ({"rounds_per_stage": (1, 2)}, "rounds_per_stage=1,2: expected 4 numbers"),
        ({"rounds_per_stage": (1, 2, 0, 1)}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_the_plan(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        ProgFed(**settings).check(base_model(tmp_path).shape, WORK)


def test_rounds_per_stage_that_are_not_the_runs_are_refused_at_the_start(tmp_path):
    run = run_of(ProgFed(stages=2, rounds_per_stage=(1, 2)), tmp_path, rounds=4)
    with pytest.raises(UsageError, match="that is 3 rounds, the run has 4"):
        federate(run)
