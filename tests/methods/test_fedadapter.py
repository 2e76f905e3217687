"""FedAdapter: what a trial tries, what goes on, and that the model is always that of the present configuration."""

from __future__ import annotations

import pytest
import torch

from methods.fedadapter import FedAdapter, cut
from methods.full_adapters import FullAdapters
from testbed.errors import UsageError, WireError
from testbed.evaluate import mounted
from testbed.model.combine import state_hash
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import BLOCKS, WORK, base_model, clients_of, run_of
from tests.model import tiny
from tests.reference.driver import started

SHORT = {"clients": 2, "steps": 2, "evaluate_every": 100}


class Sent:
    """What a client says of its training."""

    names, examples = (), 1

    def __init__(self, depth, width, gain, client=0):
        self.client, self.scalars = client, {"depth": depth, "width": width, "gain": gain}


def test_all_blocks_at_full_width_are_full_adapters_bit_for_bit(tmp_path):
    raised = federate(run_of(FedAdapter(bottleneck=4, width=4, depth=BLOCKS), tmp_path / "raised", **SHORT))
    full = federate(run_of(FullAdapters(bottleneck=4), tmp_path / "full", **SHORT))
    assert state_hash(raised.every_tensor, {}) == state_hash(full.every_tensor, {})


def asked(run, index, participants):
    """Depth and width of every order of a round."""
    orders = run.method.order(started(run), run.base, clients_of(run)[:participants], index)
    return [(order.scalars["depth"], order.scalars["width"]) for order in orders]


def test_every_second_round_is_a_trial_in_which_clients_take_turns(tmp_path):
    run = run_of(FedAdapter(bottleneck=8, depth=2, width=3), tmp_path, clients=4)
    assert asked(run, 0, 4) == asked(run, 2, 4) == [(2, 3)] * 4
    assert asked(run, 1, 4) == asked(run, 3, 4) == [(2, 3), (3, 3), (2, 6), (2, 3)]
    assert asked(run, 1, 2) == [(2, 3), (3, 3)]
    assert asked(run, 1, 1) == [(2, 3)]


def test_a_trial_goes_no_deeper_than_the_model_and_no_wider_than_the_bottleneck(tmp_path):
    run = run_of(FedAdapter(bottleneck=5, depth=3, width=3, depth_step=4, trial_every=1), tmp_path, clients=3)
    assert asked(run, 0, 3) == [(3, 3), (4, 3), (3, 5)]


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([(1, 2, 0.1), (2, 2, 0.3), (1, 4, 0.2)], (2, 2)),
        ([(1, 2, 0.1), (2, 2, 0.1), (1, 4, 0.2)], (1, 4)),
        ([(1, 2, 0.1), (2, 2, 0.1), (1, 4, 0.1)], (1, 2)),  # equal: the present one
        ([(2, 2, -0.2), (1, 4, -0.2)], (2, 2)),  # the client with the present one never answered
        ([(1, 2, 0.4), (2, 2, 0.5), (1, 4, 0.2), (1, 2, 0.8)], (1, 2)),  # means, not sums or single ones
    ],
)
def test_the_highest_mean_gain_goes_on(gains, expected, tmp_path):
    run = run_of(FedAdapter(bottleneck=8, depth=1, width=2), tmp_path)
    state = run.method.combine(started(run), run.base, [Sent(*gain) for gain in gains])
    assert (state.scalars["depth"], state.scalars["width"]) == expected


def test_a_client_is_sent_and_sends_the_adapters_of_its_configuration_only(tmp_path):
    run = run_of(FedAdapter(bottleneck=8, width=2, trial_every=1), tmp_path, rounds=1, **{**SHORT, "clients": 3})
    orders = run.method.order(started(run), run.base, clients_of(run), 0)
    federate(run)
    for order, result in zip(orders, sorted(run.folder.results(), key=lambda one: one.client), strict=True):
        assert {spec.name: spec.shape for spec in result.tensors} == {
            name: tuple(tensor.shape) for name, tensor in order.tensors.items()
        }
    assert [len(order.tensors) for order in orders] == [5, 9, 5]
    assert tuple(orders[2].tensors["model.layers.3.adapter.up.weight"].shape) == (32, 4)


def test_outside_the_present_configuration_nothing_changes_and_nothing_is_computed(tmp_path):
    run = run_of(FedAdapter(bottleneck=8, width=2, trial_every=1), tmp_path, rounds=3, **{**SHORT, "clients": 3})
    before, state = started(run), federate(run)
    own = state.scalars["depth"], state.scalars["width"]
    assert own != (BLOCKS, 8)
    trimmed = {name: tensor.clone() for name, tensor in state.tensors.items()}
    for name, tensor in trimmed.items():
        inside, first = cut(name, tensor, own, BLOCKS), before.tensors[name].clone()
        if inside is not None:
            cut(name, first, own, BLOCKS).copy_(inside)
        assert torch.equal(first, tensor), name
    [snapshot] = run.method.snapshots(state, run.base)
    logits = tiny.logits(mounted(run.method, run.base, snapshot.submodel, snapshot.tensors, run.work).model)
    narrow = FedAdapter(bottleneck=own[1])
    cuts = {name: cut(name, tensor, (BLOCKS, own[1]), BLOCKS) for name, tensor in state.tensors.items()}
    torch.testing.assert_close(tiny.logits(mounted(narrow, run.base, snapshot.submodel, cuts, run.work).model), logits)


@pytest.mark.parametrize("sent", [Sent(3, 2, 0.1), Sent(1, 2, float("nan")), Sent(1, 2, None), Sent([1], 2, 0.1)])
def test_a_gain_that_is_none_or_of_what_was_not_asked_for_is_refused(sent, tmp_path):
    run = run_of(FedAdapter(bottleneck=8, width=2), tmp_path)
    with pytest.raises(WireError, match="client 0: its gain"):
        run.method.verify(started(run), sent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "setting depth=0: expected 1 to 4, the model's blocks"),
        ({"depth": 5}, "setting depth=5: expected 1 to 4, the model's blocks"),
        ({"width": 64}, "setting width=64: expected 1 to 32, the setting bottleneck"),
        ({"depth_step": 0}, "setting depth_step=0: expected at least 1"),
        ({"trial_every": 0}, "setting trial_every=0: expected at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_the_plan(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        FedAdapter(**settings).check(base_model(tmp_path).shape, WORK)
