"""InclusiveFL: prefixes, and the momentum that the last block of a smaller model gets from the deeper ones."""

from __future__ import annotations

import pytest
import torch

from methods.inclusivefl import InclusiveFL
from methods.lora import Lora
from testbed.errors import UsageError
from testbed.method import Part
from testbed.model.combine import state_hash
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, clients_of, given, run_of
from tests.reference.driver import started

SHORT = {"clients": 2, "steps": 1, "evaluate_every": 100}


def of_capacities(folder, *counts, method=InclusiveFL(rank=2), **config):  # noqa: B008 -- frozen
    run = run_of(method, folder, **{**SHORT, "clients": len(counts), **config})
    choices = {len(choice.blocks): choice for choice in run.method.choices(run.base.shape)}
    return given(run, [choices[count] for count in counts])


class Sent:
    """An update in memory."""

    def __init__(self, client, tensors):
        self.client, self.examples, self.scalars, self.names = client, 1, {}, tuple(tensors)
        self._tensors = tensors

    def read(self, name):
        return Part(self._tensors[name])


@pytest.mark.parametrize("momentum", [0.0, 0.2])
def test_clients_of_one_capacity_are_vanilla_federated_lora_bit_for_bit(momentum, tmp_path):
    found = federate(run_of(InclusiveFL(rank=4, momentum=momentum), tmp_path / "inclusive", **SHORT))
    plain = federate(run_of(Lora(rank=4), tmp_path / "plain", **SHORT))
    assert state_hash(found.every_tensor, {}) == state_hash(plain.every_tensor, {})


def test_a_client_is_sent_and_sends_its_first_blocks_and_the_head(tmp_path):
    run = of_capacities(tmp_path, 1, 3, rounds=1)
    federate(run)
    orders = run.method.order(started(run), run.base, clients_of(run), 0)
    for order, result, count in zip(orders, sorted(run.folder.results(), key=lambda r: r.client), (1, 3), strict=True):
        names = {spec.name for spec in result.tensors}
        assert names == set(order.tensors)
        assert {name.split(".")[2] for name in names if "layers" in name} == set(map(str, range(count)))
        assert "score.weight" in names


def test_the_last_block_of_a_smaller_model_mixes_in_the_deeper_blocks_previous_changes(tmp_path):
    run = of_capacities(tmp_path, 1, 3, 4, method=InclusiveFL(rank=2, momentum=0.25))
    inside = "self_attn.q_proj.lora_A.weight"
    names = [f"model.layers.{position}.{inside}" for position in range(4)]
    first = started(run)
    state = run.method.combine(first, run.base, [Sent(2, {name: first.tensors[name] + 1 for name in names})])
    after = run.method.combine(state, run.base, [
        Sent(0, {names[0]: state.tensors[names[0]] + 8}),
        Sent(1, {name: state.tensors[name] + 4 for name in names[1:3]}),
    ])  # fmt: skip
    moved = [float((after.tensors[name] - state.tensors[name]).mean()) for name in names]
    assert moved == pytest.approx([0.75 * 8 + 0.25 * 1, 4, 0.75 * 4 + 0.25 * 1, 0], abs=1e-5)


def test_the_server_keeps_the_changes_of_blocks_that_not_everybody_holds_to_itself(tmp_path):
    run = of_capacities(tmp_path, 1, 3, rounds=1)
    state = federate(run)
    assert {name.split(".")[3] for name in state.server} == {"1", "2"}
    assert any(bool(tensor.any()) for tensor in state.server.values())
    assert not federate(of_capacities(tmp_path / "alike", 2, 2, rounds=1)).server


def test_a_block_that_nobody_holds_stays_as_it_is(tmp_path):
    run = of_capacities(tmp_path, 1, 2, rounds=1)
    before, after = started(run), federate(run)
    moved = {name for name in after.tensors if not torch.equal(after.tensors[name], before.tensors[name])}
    assert moved
    assert not any(name.startswith(("model.layers.2.", "model.layers.3.")) for name in moved)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_a_momentum_outside_its_range_is_refused_in_the_plan(momentum, tmp_path):
    with pytest.raises(UsageError, match=f"setting momentum={momentum}: expected at least 0, below 1"):
        InclusiveFL(momentum=momentum).check(base_model(tmp_path).shape, WORK)
