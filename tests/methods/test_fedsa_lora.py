"""FedSA-LoRA: only A leaves a node, and what is evaluated is each client's own model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from methods.fedsa_lora import FedSALora
from methods.lora import Lora
from testbed.evaluate import evaluate, evaluate_snapshot
from testbed.method import EVALUATE, Submodel
from testbed.model.combine import state_hash
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import BLOCKS, WORK, run_of
from tests.reference.driver import started

SHORT = {"clients": 2, "steps": 2, "evaluate_every": 100}


def kept_by(run):
    """What each client has on its node after the last round."""
    last = {result.client: result.state for result in run.folder.results() if result.state}
    folder = run.engine.folder / "state"
    return {client: load_file(folder / str(client) / f"{kept}.safetensors") for client, kept in last.items()}


def test_with_one_client_it_is_vanilla_lora_of_which_a_part_stays_on_the_node_bit_for_bit(tmp_path):
    one = {**SHORT, "clients": 1}
    run = run_of(FedSALora(rank=4), tmp_path / "shared", **one)
    whole = {**federate(run).tensors, **kept_by(run)[0]}
    plain = federate(run_of(Lora(rank=4), tmp_path / "plain", **one))
    assert state_hash(whole, {}) == state_hash(plain.tensors, {})


def test_only_a_travels_and_b_and_the_head_stay_on_the_node(tmp_path):
    run = run_of(FedSALora(rank=4), tmp_path, **SHORT)
    state = federate(run)
    assert all(name.endswith("lora_A.weight") for name in state.tensors)
    trained = [result for result in run.folder.results() if result.kind != EVALUATE]
    assert all({spec.name for spec in result.tensors} == set(state.tensors) for result in trained)
    one, other = kept_by(run).values()
    expected = {name.replace("lora_A", "lora_B") for name in state.tensors} | {"score.weight"}
    assert set(one) == set(other) == expected
    assert not any(torch.equal(one[name], other[name]) for name in expected)


def test_a_rounds_quality_is_the_mean_over_the_clients_own_models(tmp_path):
    run = run_of(FedSALora(rank=4), tmp_path, **SHORT)
    state, whole = federate(run), Submodel.first(BLOCKS)
    own = [
        evaluate_snapshot(run.method, run.base, whole, {**state.tensors, **kept}, run.work, run.held_out)
        for kept in kept_by(run).values()
    ]
    told = run.folder.rounds()[-1].quality
    assert told["loss"] == pytest.approx(sum(quality.loss for quality in own) / 2, rel=1e-5)
    assert told["accuracy"] == pytest.approx(sum(quality.accuracy for quality in own) / 2)
    asked = [result for result in run.folder.results() if result.kind == EVALUATE]
    assert [result.client for result in asked] == [0, 1]
    assert all(result.state is None and not result.tensors for result in asked)


def test_before_anybody_has_trained_the_model_is_the_base_with_the_runs_head(tmp_path):
    runs = [run_of(kind(rank=4), tmp_path, seed=3, **SHORT) for kind in (FedSALora, Lora)]
    found, expected = (evaluate(run.method, run.base, started(run), run.work, run.held_out) for run in runs)
    assert found == expected


def test_the_export_is_the_shared_a_and_what_it_is(tmp_path):
    run = run_of(FedSALora(rank=4), tmp_path, rounds=1, clients=1)
    state = federate(run)
    run.method.export(state, run.base, WORK, tmp_path / "export")
    about = json.loads((tmp_path / "export" / "shared.json").read_text())
    assert (about["rank"], about["alpha"], about["labels"]) == (4, 32.0, WORK.labels)
    assert state_hash(load_file(tmp_path / "export" / "shared.safetensors"), {}) == state_hash(state.tensors, {})
