"""FLoRA: everybody trains on the same merged weights, also whoever was away, and the result is a plain model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from methods._ranks import is_factor
from methods.flora import Flora
from testbed.errors import StoreError, UsageError
from testbed.method import MAPPED
from testbed.model.combine import state_hash
from testbed.model.submodel import build
from testbed.node import training
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import VOCABULARY, WORK, base_model, clients_of, run_of
from tests.reference.driver import started

SHORT = {"clients": 3, "steps": 1, "evaluate_every": 100}


@pytest.fixture
def trained_on(monkeypatch):
    """(round, client) → what its base weights were when it trained."""
    found = {}
    steps = training.local_steps

    def noting(workplace, built, **how):
        weights = {
            built.canonical(name): parameter.detach().clone()
            for name, parameter in built.model.named_parameters()
            if not parameter.requires_grad
        }
        found[workplace.job.round, workplace.job.client] = weights
        return steps(workplace, built, **how)

    monkeypatch.setattr(training, "local_steps", noting)
    return found


def evaluated(run, state):
    """The model that a run evaluates."""
    [snapshot] = run.method.snapshots(state, run.base)
    built = build(run.base.config, run.base.fill_in(snapshot.submodel), run.store.path, run.base.outside, WORK, seed=0)
    run.method.mount(built, snapshot.tensors)
    return built.model.eval()


def test_a_client_that_was_away_trains_on_the_same_weights_bit_for_bit(tmp_path, trained_on):
    run = run_of(Flora(ranks=(4, 2)), tmp_path, rounds=3, **SHORT)
    run.watcher.round_started = lambda index, *_: setattr(run.engine, "absent", {2} if index == 1 else set())
    state = federate(run)
    assert (1, 2) not in trained_on
    hashes = {key: state_hash(weights, {}) for key, weights in trained_on.items()}
    for index in range(3):
        assert len({hashes[key] for key in hashes if key[0] == index}) == 1
    assert len(set(hashes.values())) == 3
    assert len(state.scalars["stacks"]) == 3


def test_what_is_evaluated_is_what_the_next_round_trains_on(tmp_path, trained_on, monkeypatch):
    run = run_of(Flora(ranks=(4, 2)), tmp_path, rounds=2, **SHORT)
    states, combine = [], Flora.combine

    def noting(*of):
        states.append(combine(*of))
        return states[-1]

    monkeypatch.setattr(Flora, "combine", noting)
    federate(run)
    weights = dict(evaluated(run, states[0]).named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained_on[1, 0].items())


def test_a_job_brings_the_head_alone_and_names_every_stack(tmp_path):
    run = run_of(Flora(ranks=(4, 2)), tmp_path, rounds=3, **SHORT)
    state = federate(run)
    assert [job.further for job in run.engine.jobs] == [
        tuple(state.scalars["stacks"][:index]) for index in (0, 0, 0, 1, 1, 1, 2, 2, 2)
    ]
    [order, *_] = run.method.order(state, run.base, clients_of(run), 3)
    assert set(order.tensors) == {"score.weight"}


def test_a_stack_is_the_weighted_sum_of_the_clients_products(tmp_path):
    run = run_of(Flora(ranks=(4, 2), alpha=8.0), tmp_path, rounds=1, **SHORT)
    stack = run.base.tensors(federate(run).scalars["stacks"][0])
    name = "model.layers.1.mlp.up_proj"
    assert stack[f"{name}.lora_A.weight"].shape == (4 + 2 + 4, 32)
    assert stack[f"{name}.lora_B.weight"].shape == (64, 4 + 2 + 4)
    fresh = started(run).tensors[f"{name}.lora_A.weight"]
    moved = (stack[f"{name}.lora_A.weight"][4:6] * 3 / (8 / 2) - fresh[:2]).abs().max()
    assert 0 < moved < 0.05  # client 1's A, divided by its share and its scale, is one step away from its beginning


def test_the_exported_folder_computes_what_the_runs_model_does(tmp_path):
    run = run_of(Flora(ranks=(4, 2)), tmp_path, rounds=2, **SHORT)
    state = federate(run)
    run.method.export(state, run.base, WORK, tmp_path / "export")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    assert not [name for name in exported.state_dict() if is_factor(name)]
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    found, base = exported(input_ids=ids).logits, evaluated(run, started(run))(input_ids=ids).logits
    assert torch.equal(found, evaluated(run, state)(input_ids=ids).logits)
    assert not torch.allclose(found, base, atol=1e-2)


def test_each_round_begins_with_factors_of_its_own(tmp_path):
    run = run_of(Flora(ranks=(4, 2)), tmp_path)
    state = started(run)
    first, second = (run.method.begin(state, run.base, index).tensors for index in (0, 1))
    a = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(first[a], state.tensors[a])
    assert not torch.equal(first[a], second[a])
    assert not second[a.replace("lora_A", "lora_B")].any()


def test_weights_that_are_not_the_jobs_own_are_not_merged_into(tmp_path):
    with pytest.raises(UsageError, match="holding 'mapped': this method merges into base weights"):
        Flora().check(base_model(tmp_path).shape, replace(WORK, holding=MAPPED))


def test_a_run_whose_stacks_are_gone_says_so(tmp_path):
    run = run_of(Flora(ranks=(4, 2)), tmp_path, rounds=1, **SHORT)
    state = federate(run)
    run.store.path(state.scalars["stacks"][0]).unlink()
    with pytest.raises(StoreError, match="stack 0 of this run is no longer in"):
        run.method.begin(state, run.base, 1)
