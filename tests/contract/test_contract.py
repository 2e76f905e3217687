"""What every method must do, whatever it is: the methods found, and six probe methods that keep the seams honest."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from testbed.evaluate import evaluate
from testbed.model.combine import state_hash
from testbed.model.footprint import Baseline, predict
from testbed.plugins import all_methods
from testbed.rounds import federate
from tests.contract.harness import SerialRunner, base_model, clients_of, run_of
from tests.contract.probe_methods import PROBE_METHODS
from tests.contract.settings import in_contract

FOUND = [pytest.param(in_contract(name, kind), id=name) for name, kind in all_methods().items()]
PROBES = [pytest.param(kind, id=kind.__name__) for kind in PROBE_METHODS]
EVERY = [*FOUND, *PROBES]


def hash_of(state):
    return state_hash(state.every_tensor, {**state.scalars, "blocks": list(state.blocks)})


def started(run):
    return run.method.start(run.base, run.work, clients_of(run), run.config.seed, run.config.rounds)


def smaller(kind, folder):
    """Half of the blocks, for a method that has such a choice (else all)."""
    choices = list(kind().choices(base_model(folder, task=kind.default_task).shape))
    return 2 if any(len(choice.blocks) == 2 for choice in choices) else None


def short_run(kind, folder, *, rounds=3, keep=None, **config):
    """Two clients, with a held-out set that is enough to be looked at."""
    return run_of(kind(), folder, clients=2, rounds=rounds, keep=keep, held_out=32, **config)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A kind's run to its end, and the state there: once for all tests that look at it."""

    @cache
    def done(kind):
        folder = tmp_path_factory.mktemp("undisturbed")
        run = short_run(kind, folder, keep=smaller(kind, folder))
        return run, federate(run)

    return done


@pytest.mark.parametrize("kind", EVERY)
def test_another_seed_gives_another_state(kind, undisturbed, tmp_path):
    other = federate(short_run(kind, tmp_path, seed=1, keep=smaller(kind, tmp_path), evaluate_every=100))
    assert hash_of(other) != hash_of(undisturbed(kind)[1])


@pytest.mark.parametrize("kind", EVERY)
def test_the_same_seed_gives_the_same_state_bit_for_bit_also_to_a_run_that_stops_and_resumes(
    kind, undisturbed, tmp_path
):
    run = short_run(kind, tmp_path, keep=smaller(kind, tmp_path))
    calls = {"left": 2}

    def stop_after_two(index, quality):
        calls["left"] -= 1
        if not calls["left"]:
            raise KeyboardInterrupt

    run.watcher.evaluated = stop_after_two
    with pytest.raises(KeyboardInterrupt):
        federate(run)
    run.watcher.evaluated = lambda index, quality: None
    run.engine = SerialRunner(run.method, run.base, run.engine.folder)  # a new controller: nothing but the disk is left
    assert hash_of(federate(run)) == hash_of(undisturbed(kind)[1])


@pytest.mark.parametrize("kind", EVERY)
def test_a_client_that_never_answers_costs_its_own_update_only(kind, tmp_path):
    run = short_run(kind, tmp_path, rounds=2, keep=smaller(kind, tmp_path), evaluate_every=100)
    run.engine.absent = {1}
    start = hash_of(started(run))
    assert (hash_of(federate(run)) != start) is kind.learns
    outcomes = {result.client: result.outcome for result in run.folder.results()}
    assert outcomes[1] == "unreachable"
    assert {outcome for client, outcome in outcomes.items() if client != 1} == {"finished"}


@pytest.mark.parametrize("kind", EVERY)
def test_a_client_sends_tensors_of_the_state_only_and_says_how_large_they_are(kind, undisturbed):
    run, state = undisturbed(kind)
    results = run.folder.results()
    assert results
    for result in results:
        for spec in result.tensors:
            assert spec.name in state.tensors
            whole = tuple(state.tensors[spec.name].shape)
            ranges = spec.ranges or tuple((0, size) for size in whole)
            assert spec.shape == tuple(stop - start for start, stop in ranges)


@pytest.mark.parametrize("kind", EVERY)
def test_every_phase_that_a_job_announces_was_predicted(kind, undisturbed):
    run, _ = undisturbed(kind)
    submodel = run.plan.clients[0].submodel
    footprint = predict(
        run.method.phases(submodel, run.base.shape, run.work), run.base.shape, run.work, Baseline(100 << 20, 0)
    )
    predicted = {phase.name for phase in footprint.phases}
    assert set(run.engine.phases) - {"load", "send"} <= predicted
    assert footprint.bytes > 100 << 20


@pytest.mark.parametrize("kind", FOUND)
def test_learns_a_planted_task_at_least_15_points_above_chance_and_no_fine_tuning(kind, tmp_path):
    if not kind.learns:
        pytest.skip("this method trains nothing, by its own word")
    usual = {"rounds": 6, "steps": 8, "clients": 2 if kind.short_run else 4}
    run = run_of(kind(), tmp_path, evaluate_every=100, keep=smaller(kind, tmp_path), **{**usual, **kind.short_run})
    before = evaluate(run.method, run.base, started(run), run.work, run.held_out).accuracy
    federate(run)
    after = run.folder.rounds()[-1].quality["accuracy"]  # of the global model, or the mean of the clients' own
    assert after >= before + 0.15
    assert after >= 1 / 4 + 0.15


@pytest.mark.parametrize("kind", EVERY)
def test_with_all_blocks_and_one_block_alike_every_value_stays_finite(kind, tmp_path):
    state = federate(short_run(kind, tmp_path, rounds=1, evaluate_every=100))
    assert all(bool(tensor.isfinite().all()) for tensor in state.tensors.values() if tensor.is_floating_point())
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.tensors.values())
