"""FedKSeed: what travels, what a model is rebuilt as, what it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from methods.fedkseed import COEFFICIENTS, FedKSeed
from testbed.errors import UsageError, WireError
from testbed.evaluate import mounted
from testbed.method import CAUSAL_LM, MAPPED, SEQUENCE_CLASSIFICATION, Phase, Submodel
from testbed.model.footprint import Baseline, predict
from testbed.model.perturbation import signs
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, run_of
from tests.model import tiny
from tests.reference.driver import started

SHORT = {"clients": 2, "steps": 2, "evaluate_every": 100}


def watched(run, before):
    """The same run, `before` being called with every job, its payload and the runner's own way of doing it."""
    do = run.engine._do

    def watched_do(job, payload):
        before(job, payload, do)
        return do(job, payload)

    run.engine._do = watched_do
    return run


def test_a_job_is_less_than_18_kilobytes_down_and_up(tmp_path):
    down = []
    run = run_of(FedKSeed(), tmp_path, clients=1, steps=10, rounds=2)
    federate(watched(run, lambda job, payload, do: down.append(payload.stat().st_size)))
    results = run.folder.results()
    assert len(down) == len(results) == 2
    assert max(down) + max(len(json.dumps(result.scalars)) for result in results) < 18_000
    assert not any(result.tensors for result in results)


def test_the_seeds_are_fixed_and_a_client_draws_one_for_each_step(tmp_path):
    run = run_of(FedKSeed(seeds=8), tmp_path, clients=2, rounds=2, steps=5)
    federate(run)
    drawn = [result.scalars["seeds"] for result in run.folder.results()]
    assert all(len(seeds) == 5 and set(seeds) <= set(range(8)) for seeds in drawn)
    assert len({tuple(seeds) for seeds in drawn}) == 4


def test_the_pro_variant_draws_those_that_moved_the_model_most(tmp_path):
    job = SimpleNamespace(seed=0, round=0, client=0, steps=400)
    workplace = SimpleNamespace(job=job)
    drawn = FedKSeed(seeds=4, pro=True)._drawn(workplace, [0.0, -3.0, 0.0, 1.0])
    assert set(drawn) == {1, 3}
    assert 250 < drawn.count(1) < 350
    assert set(FedKSeed(seeds=4, pro=True)._drawn(workplace, [0.0] * 4)) == {0, 1, 2, 3}


@pytest.mark.parametrize(("architecture", "task"), [("qwen2", CAUSAL_LM), ("bert", SEQUENCE_CLASSIFICATION)])
def test_every_weight_is_moved_once_tied_ones_too_and_nothing_else(architecture, task, tmp_path):
    tiny.save(tiny.make(architecture, task), tmp_path / "model")
    base = tiny.open_base(tmp_path / "model", task)
    plain, moved = tiny.built_from(base), tiny.built_from(base)
    FedKSeed(seeds=3).mount(moved, {COEFFICIENTS: torch.tensor([0.0, 0.25, -0.5])})
    before = dict(plain.model.named_parameters())
    for name, parameter in moved.model.named_parameters():
        expected = -0.25 * signs(parameter.shape, 1, name) + 0.5 * signs(parameter.shape, 2, name)
        torch.testing.assert_close(parameter.data - before[name].data, expected)
    for one, other in zip(plain.model.buffers(), moved.model.buffers(), strict=True):
        assert torch.equal(one, other)


def test_weights_of_the_base_model_are_read_anew_for_every_job(tmp_path):
    first = []
    run = run_of(FedKSeed(seeds=8, rate_scale=0.1), tmp_path, rounds=2, clients=2, steps=2)
    federate(watched(run, lambda job, payload, do: first.append(do(job, payload)[0].scalars)))
    assert first == [result.scalars for result in run.folder.results()]
    assert not run.engine.weights._held


def test_the_export_is_the_model_that_was_evaluated(tmp_path):
    run = run_of(FedKSeed(seeds=16, rate_scale=0.1), tmp_path, rounds=2, **SHORT)
    state = federate(run)
    run.method.export(state, run.base, WORK, tmp_path / "export")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    evaluated = mounted(run.method, run.base, Submodel.first(len(run.base.shape)), state.tensors, run.work)
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, evaluated.model.eval()(ids).logits)


def test_it_takes_no_more_than_inference(tmp_path):
    shape, method = base_model(tmp_path).shape, FedKSeed()
    whole = Submodel.first(len(shape))
    forward = Phase("forward", whole.blocks, WORK.batch_size, WORK.length, backward=False, optimizer_slots=0)
    found = predict(method.phases(whole, shape, WORK), shape, WORK, Baseline(0)).bytes
    assert found == predict([forward], shape, WORK, Baseline(0)).bytes


@pytest.mark.parametrize(
    "scalars",
    [
        {},
        {"seeds": [0], "steps": []},
        {"seeds": [8], "steps": [0.1]},
        {"seeds": [True], "steps": [0.1]},
        {"seeds": [0], "steps": [float("nan")]},
        {"seeds": [0], "steps": ["0.1"]},
    ],
    ids=str,
)
def test_an_update_that_is_not_seeds_and_steps_is_refused(scalars, tmp_path):
    run = run_of(FedKSeed(seeds=8), tmp_path)
    update = SimpleNamespace(client=3, names=(), scalars=scalars, examples=1)
    with pytest.raises(WireError, match="client 3: expected no tensors, as many seeds as steps, seeds from 0 to 7"):
        run.method.verify(started(run), update)
    run.method.verify(started(run), SimpleNamespace(client=3, names=(), scalars={"seeds": [7], "steps": [0.5]}))


@pytest.mark.parametrize(
    ("settings", "work", "message"),
    [
        ({"seeds": 0}, {}, "setting seeds=0: expected at least 1"),
        ({"epsilon": 0.0}, {}, r"setting epsilon=0.0: expected more than 0"),
        ({"rate_scale": -1.0}, {}, r"setting rate_scale=-1.0: expected more than 0"),
        ({}, {"holding": MAPPED}, "holding 'mapped': this method changes base weights"),
        ({}, {"dtype": "bfloat16"}, "dtype 'bfloat16': .* use float32"),
    ],
)
def test_what_cannot_work_is_refused_in_the_plan(settings, work, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        FedKSeed(**settings).check(base_model(tmp_path).shape, replace(WORK, **work))
