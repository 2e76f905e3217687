"""FedRolex: the window rolls over the channels, around their end, and every element is trained in turn."""

from __future__ import annotations

import pytest
import torch

from methods.fedrolex import FedRolex
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import clients_of, run_of
from tests.methods.widths import difference, with_widths
from tests.reference import fedrolex
from tests.reference.driver import started

CONVOLUTION = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"  # 8 of 8 channels
LONG = {"rounds": 7, "steps": 1}


def compared(tmp_path, mutation=None):
    """How far seven rounds are from the reference's: the windows of 8 channels go around their end, too."""
    return difference(fedrolex, FedRolex(ratios=(0.75, 0.5)), tmp_path, (0.75, 0.5), mutation=mutation, **LONG)


def test_rolling_windows_give_what_the_reference_gives(tmp_path):
    assert compared(tmp_path) < 1e-5


def test_a_reference_whose_window_stands_still_is_told_apart(tmp_path):
    assert compared(tmp_path, mutation="still") > 1e-3


@pytest.mark.parametrize(("round_index", "held"), [(0, [0, 1, 2, 3]), (1, [1, 2, 3, 4]), (7, [7, 0, 1, 2])])
def test_a_client_holds_the_channels_from_the_rounds_own_on_around_the_end(round_index, held, tmp_path):
    run = with_widths(run_of(FedRolex(), tmp_path, clients=1), 0.5)
    state = started(run)
    [order] = run.method.order(state, run.base, clients_of(run), round_index)
    assert torch.equal(order.tensors[CONVOLUTION], state.tensors[CONVOLUTION][held][:, held])


def test_every_element_is_trained_in_turn(tmp_path):
    run = with_widths(run_of(FedRolex(), tmp_path, clients=1, rounds=16, steps=1, evaluate_every=100), 0.5)
    before, after = started(run).tensors, federate(run).tensors
    for name, tensor in before.items():
        moved = (after[name] != tensor).float()
        # Two channels that are half a turn apart are never held at once, so a weight between them never moves.
        assert float(moved.mean()) > 0.8, name
        if tensor.dim() == 1:
            assert bool(moved.all()), name


def test_what_nobody_held_in_a_round_keeps_its_value_bit_for_bit(tmp_path):
    run = with_widths(run_of(FedRolex(), tmp_path, clients=2, rounds=1, steps=1), 0.5, 0.25)
    before, after = started(run).tensors, federate(run).tensors
    assert torch.equal(after[CONVOLUTION][4:], before[CONVOLUTION][4:])
    assert not torch.equal(after[CONVOLUTION][:4, :4], before[CONVOLUTION][:4, :4])
