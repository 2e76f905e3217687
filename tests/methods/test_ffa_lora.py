"""FFA-LoRA: A neither moves nor travels, and the mean of the products is the product of the means."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from methods.ffa_lora import FFALora
from methods.lora import Lora
from testbed.method import MAPPED, RESIDENT, STREAMED
from testbed.model.combine import state_hash
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import run_of
from tests.reference.driver import started

SHORT = {"clients": 2, "steps": 2, "evaluate_every": 100}


def sent_by(run):
    """Every client's tensors of the only round, in client order."""
    return [load_file(path) for path in sorted((run.engine.folder / "updates").iterdir())]


def test_the_mean_of_what_the_clients_adapters_add_is_what_the_averaged_adapter_adds(tmp_path):
    run = run_of(FFALora(rank=4), tmp_path, rounds=1, **SHORT)
    before, after = started(run).tensors, federate(run).tensors
    one, other = sent_by(run)
    for name in (name for name in after if name.endswith("lora_A.weight")):
        b = name.replace("lora_A", "lora_B")
        assert torch.equal(after[name], before[name])
        mean = (one[b] @ before[name] + other[b] @ before[name]) / 2  # clients of the same number of examples
        torch.testing.assert_close(after[b] @ after[name], mean)
        assert not torch.equal(one[b], other[b])


def test_only_b_and_the_head_travel_in_either_direction(tmp_path):
    run = run_of(FFALora(rank=4), tmp_path, rounds=1, **SHORT)
    state = started(run)
    federate(run)
    travels = {name for name in state.tensors if not name.endswith("lora_A.weight")}
    clients = [client.client() for client in run.plan.clients]
    assert all(set(order.tensors) == travels for order in run.method.order(state, run.base, clients, 0))
    assert all(set(sent) == travels for sent in sent_by(run))


def test_a_momentum_of_the_server_leaves_a_alone(tmp_path):
    run = run_of(FFALora(rank=4, server="fedadam"), tmp_path, **SHORT)
    before, after = started(run).tensors, federate(run).tensors
    assert {name for name in after if torch.equal(after[name], before[name])} == {
        name for name in after if name.endswith("lora_A.weight")
    }


def test_its_start_is_that_of_vanilla_federated_lora(tmp_path):
    starts = [started(run_of(kind(rank=4), tmp_path, **SHORT)) for kind in (FFALora, Lora)]
    assert state_hash(starts[0].tensors, {}) == state_hash(starts[1].tensors, {})


@pytest.mark.parametrize("holding", [MAPPED, STREAMED])
def test_frozen_factors_stay_where_they_are_however_the_base_is_held(holding, tmp_path):
    hashes = []
    for way in (RESIDENT, holding):
        run = run_of(FFALora(rank=4), tmp_path / way, **SHORT)
        run.work = replace(run.work, holding=way, checkpointing=True)
        hashes.append(state_hash(federate(run).tensors, {}))
        assert {result.outcome for result in run.folder.results()} == {"finished"}
    assert hashes[0] == hashes[1]
