"""What every method that averages can be told: the server's step, and clipping and noise on the updates."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from methods.chainfed import ChainFed
from methods.devft import DevFT
from methods.fedpruner import FedPruner
from methods.heterofl import HeteroFL
from methods.lora import Lora
from methods.smartfed import SmartFed
from testbed.errors import UsageError
from testbed.model.combine import state_hash
from testbed.model.privacy import change_norm, epsilon, private_mean
from testbed.rounds import federate
from tests.contract.harness import WORK, base_model, clients_of, run_of

#: One of each way of averaging: all blocks, some of them, stages, adapters, slices of every weight.
AVERAGING = (Lora, FedPruner, DevFT, ChainFed, HeteroFL)


def ended(method, folder, **config):
    usual = {"clients": 2, "rounds": 2, "steps": 2, "evaluate_every": 9, "held_out": 32}
    return federate(run_of(method, folder, **usual, **config))


@pytest.mark.parametrize("kind", AVERAGING, ids=lambda kind: kind.__name__)
def test_a_step_as_long_as_the_way_without_memory_is_the_average(kind, tmp_path):
    average = ended(kind(), tmp_path / "average")
    stepped = ended(kind(server="fedavgm", server_rate=1.0, server_momentum=0.0), tmp_path / "stepped")
    for name, tensor in average.tensors.items():
        torch.testing.assert_close(stepped.tensors[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "rule"), [(Lora, "fedavgm"), (FedPruner, "fedadam"), (HeteroFL, "fedyogi")])
def test_moments_stay_on_the_server_and_survive_a_resume(kind, rule, tmp_path):
    run = run_of(kind(server=rule), tmp_path, clients=2, rounds=2, steps=2, evaluate_every=9, held_out=32)
    state = federate(run)
    assert state.server
    assert not set(state.server) & set(state.tensors)
    saved, _, _ = run.folder.load_checkpoint()
    assert state_hash(saved.every_tensor, {}) == state_hash(state.every_tensor, {})
    whole = ended(kind(server=rule), tmp_path / "again")
    assert state_hash(whole.every_tensor, whole.scalars) == state_hash(state.every_tensor, state.scalars)
    assert all(bool(tensor.isfinite().all()) for tensor in state.tensors.values())


def test_statistics_of_batch_normalisation_take_the_mean(tmp_path):
    state = ended(HeteroFL(server="fedadam", server_rate=5.0), tmp_path)
    variances = {name: tensor for name, tensor in state.tensors.items() if name.endswith("running_var")}
    assert variances
    assert all(bool((tensor >= 0).all()) for tensor in variances.values())
    assert not any("running" in name for name in state.server)


class Sent:
    """An update in memory."""

    def __init__(self, client, tensors, examples=10):
        self.client, self.examples, self.scalars, self.names = client, examples, {}, tuple(tensors)
        self._tensors = tensors

    def read(self, name):
        from testbed.method import Part

        return Part(self._tensors[name])


def test_no_client_moves_the_mean_by_more_than_its_clip():
    current = {"a": torch.zeros(3), "b": torch.zeros(4)}
    wild = Sent(0, {"a": torch.full((3,), 1e6), "b": torch.full((4,), -1e6)})
    still = Sent(1, {"a": torch.zeros(3), "b": torch.zeros(4)})
    mean = private_mean(current, [wild, still], clip=0.5, noise=0.0)
    length = sum(float(tensor.square().sum()) for tensor in mean.values()) ** 0.5
    assert length == pytest.approx(0.5 / 2)
    assert change_norm(current, still) == 0.0


def test_the_noise_of_a_round_is_as_large_as_it_says_and_the_same_again():
    current = {"a": torch.zeros(200, 200)}
    still = [Sent(client, {"a": torch.zeros(200, 200)}) for client in range(4)]
    once, again = (private_mean(current, still, clip=2.0, noise=1.5)["a"] for _ in range(2))
    assert torch.equal(once, again)
    assert float(once.std()) == pytest.approx(1.5 * 2.0 / 4, rel=0.02)
    other = private_mean({"a": torch.ones(200, 200)}, [Sent(0, {"a": torch.ones(200, 200)})], clip=2.0, noise=1.5)
    assert not torch.equal(once, other["a"] - 1.0)


def test_epsilon_falls_with_noise_and_grows_with_rounds_and_the_share_of_clients():
    usual = epsilon(2.0, 100, 10, 50, 1e-5)
    assert epsilon(4.0, 100, 10, 50, 1e-5) < usual < epsilon(1.0, 100, 10, 50, 1e-5)
    assert epsilon(2.0, 100, 10, 25, 1e-5) < usual < epsilon(2.0, 100, 10, 100, 1e-5)
    assert epsilon(2.0, 1000, 10, 50, 1e-5) < usual < epsilon(2.0, 100, 100, 50, 1e-5)


def test_one_round_of_everybody_costs_what_the_gaussian_mechanism_does():
    # One release of sensitivity 1 with noise 4: ε is 1.0 at δ = 1e-5 exactly, and Rényi's bound somewhat more.
    assert 0.9 < epsilon(8.0, 4, 4, 1, 1e-5) < 1.25


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Lora(server_rate=0.0), "setting server_rate=0.0: expected more than 0"),
        (Lora(server_momentum=1.0), "setting server_momentum=1.0: expected at least 0, below 1"),
        (Lora(noise=1.0), "give clip too"),
        (Lora(clip=-1.0), "expected at least 0"),
        (Lora(clip=1.0, delta=0.0), "setting delta=0.0"),
        (FedPruner(clip=1.0, noise=1.0), "which blocks a client trains follows from its data"),
    ],
)
def test_settings_that_cannot_be_are_one_message(method, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        method.check(base_model(tmp_path).shape, WORK)


def test_a_plan_says_what_its_noise_promises(tmp_path):
    assert Lora().promises(8, 4, 10) == ()
    [promise] = Lora(clip=1.0, noise=2.0).promises(8, 4, 10)
    assert "epsilon" in promise
    assert "4 of 8 clients" in promise
    assert "protects nobody" in promise
    assert dataclasses.replace(FedPruner(selection="random"), clip=1.0, noise=1.0).leaks == ""
    assert SmartFed().leaks
    run = run_of(Lora(clip=0.5, noise=0.1, rank=2), tmp_path, clients=2, rounds=2, steps=2)
    start = run.method.start(run.base, run.work, clients_of(run), 0, 2)
    assert state_hash(federate(run).tensors, {}) != state_hash(start.tensors, {})
