"""Fed-pilot: how far a client reaches, which layers it trains there, and what that saves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods.fed_pilot import FedPilot, chosen
from methods.lora import Lora
from testbed.errors import UsageError
from testbed.model.combine import state_hash
from testbed.model.footprint import Baseline, predict
from testbed.plan import fit
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import BLOCKS, WORK, base_model, given, run_of
from tests.reference.driver import started

SHORT = {"clients": 2, "steps": 1, "evaluate_every": 100}


def reaching(folder, *reaches, method=FedPilot(rank=2), **config):  # noqa: B008 -- frozen
    run = run_of(method, folder, **{**SHORT, "clients": len(reaches), **config})
    choices = {len(choice.trained): choice for choice in run.method.choices(run.base.shape)}
    return given(run, [choices[reach] for reach in reaches])


def positions(names):
    return {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}


def test_all_layers_in_reach_and_trained_is_vanilla_federated_lora_bit_for_bit(tmp_path):
    found = federate(run_of(FedPilot(rank=4, share=1.0, dropout=0.1), tmp_path / "pilot", **SHORT))
    plain = federate(run_of(Lora(rank=4, dropout=0.1), tmp_path / "plain", **SHORT))
    assert state_hash(found.every_tensor, {}) == state_hash(plain.every_tensor, {})


@pytest.mark.parametrize(
    ("importances", "reach", "expected"),
    [
        ({}, (0, 1, 2, 3), (2, 3)),  # nobody has trained any: the deeper first
        ({}, (3,), (3,)),
        ({"2": 9.0, "3": 9.0}, (0, 1, 2, 3), (0, 1)),  # those that nobody has trained
        ({"1": 1.0, "2": 2.0, "3": 0.5}, (1, 2, 3), (1, 2)),
        ({"0": 9.0, "1": 1.0, "2": 1.0, "3": 1.0}, (1, 2, 3), (2, 3)),  # equal ones, and one out of reach
    ],
)
def test_of_the_layers_in_reach_new_ones_and_then_the_most_important_are_chosen(importances, reach, expected):
    assert chosen(importances, reach, 2) == expected


def test_a_client_sends_what_it_trained_and_the_rest_stays_as_it_is(tmp_path):
    run = reaching(tmp_path, 1, 3, rounds=1, steps=2)  # A moves from the second step on
    before, after = started(run), federate(run)
    sent = {result.client: {spec.name for spec in result.tensors} for result in run.folder.results()}
    assert positions(sent[0]) == {3}
    assert positions(sent[1]) == {2, 3}
    assert all("score.weight" in names for names in sent.values())
    moved = {name for name in after.tensors if not torch.equal(after.tensors[name], before.tensors[name])}
    assert moved == sent[1]
    assert set(after.scalars["importances"]) == {"2", "3"}


class Elsewhere(FedPilot):
    """It begins with other adapters in the first block, which nobody reaches."""

    def start(self, *arguments):
        state = super().start(*arguments)
        tensors = {name: tensor + 0.1 * name.startswith("model.layers.0.") for name, tensor in state.tensors.items()}
        return replace(state, tensors=tensors)


def test_adapters_that_are_not_trained_take_part_in_the_forward_pass(tmp_path):
    found, other = (
        federate(reaching(tmp_path / kind.__name__, 1, 1, method=kind(rank=2), rounds=1)).tensors
        for kind in (FedPilot, Elsewhere)
    )
    last = "model.layers.3.self_attn.q_proj.lora_B.weight"
    assert not torch.equal(found[last], other[last])


def test_a_device_that_cannot_train_all_layers_reaches_as_far_as_it_can(tmp_path):
    shape, method, baseline = base_model(tmp_path).shape, FedPilot(), Baseline(0)
    sizes = [predict(method.phases(own, shape, WORK), shape, WORK, baseline).bytes for own in method.choices(shape)]
    assert sizes == sorted(set(sizes), reverse=True)
    for reach, size in zip(range(BLOCKS, 0, -1), sizes, strict=True):
        planned = fit(method, shape, WORK, size, baseline)
        assert planned.submodel.trained == tuple(range(BLOCKS - reach, BLOCKS))
        assert len(planned.submodel.blocks) == BLOCKS
    assert not fit(method, shape, WORK, sizes[-1] - 1, baseline).planned


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_outside_its_range_is_refused_in_the_plan(share, tmp_path):
    with pytest.raises(UsageError, match=f"setting share={share}: expected more than 0, at most 1"):
        FedPilot(share=share).check(base_model(tmp_path).shape, WORK)


def test_noise_that_would_promise_nothing_is_refused(tmp_path):
    shape = base_model(tmp_path).shape
    with pytest.raises(UsageError, match="which layers are trained follows from the updates"):
        FedPilot(clip=1.0, noise=1.0).check(shape, WORK)
    FedPilot(clip=1.0, noise=1.0, share=1.0).check(shape, WORK)
