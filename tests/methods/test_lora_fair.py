"""LoRA-FAIR: the corrected mean comes closer to the mean of products, the less it is held back."""

from __future__ import annotations

import pytest
import torch

from methods.lora import Lora
from methods.lora_fair import LoraFair
from testbed.errors import UsageError
from testbed.method import Part, State
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, run_of
from tests.reference.driver import largest_difference

SHORT = {"clients": 2, "steps": 2, "evaluate_every": 100}
A, B = "map.lora_A.weight", "map.lora_B.weight"


class Sent:
    """An update in memory: random factors of rank 3 and a head."""

    def __init__(self, client, examples):
        self.client, self.examples, self.scalars, self.names = client, examples, {}, (A, B, "head")
        draw = torch.Generator().manual_seed(client)
        sizes = {A: (3, 6), B: (5, 3), "head": (2, 5)}
        self.tensors = {name: torch.randn(size, generator=draw) for name, size in sizes.items()}

    def read(self, name):
        return Part(self.tensors[name])


RECEIVED = [Sent(0, 10), Sent(1, 30), Sent(2, 20)]
IDEAL = sum(sent.examples / 60 * sent.tensors[B] @ sent.tensors[A] for sent in RECEIVED)


def mean(method):
    return method.mean(State(RECEIVED[0].tensors), RECEIVED)


def distance(tensors):
    return float((tensors[B] @ tensors[A] - IDEAL).norm())


def test_the_less_the_correction_is_held_back_the_closer_it_comes():
    plain = mean(Lora())
    found = [mean(LoraFair(ridge=ridge)) for ridge in (100.0, 1.0, 0.01)]
    distances = [distance(plain), *map(distance, found)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.9 * distances[0]
    for one in found:
        assert torch.equal(one[A], plain[A])
        assert torch.equal(one["head"], plain["head"])


def test_with_next_to_no_ridge_no_other_b_comes_closer():
    tensors = mean(LoraFair(ridge=1e-9))
    best = torch.linalg.lstsq(tensors[A].T, IDEAL.T).solution.T
    torch.testing.assert_close(tensors[B], best, rtol=1e-3, atol=1e-4)


def test_with_a_ridge_beyond_all_bounds_it_is_vanilla_federated_lora(tmp_path):
    fair = federate(run_of(LoraFair(rank=4, ridge=1e12), tmp_path / "fair", **SHORT))
    plain = federate(run_of(Lora(rank=4), tmp_path / "plain", **SHORT))
    assert largest_difference(fair.tensors, plain.tensors) < 1e-6


def test_a_ridge_of_nothing_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"setting ridge=0.0: expected more than 0"):
        LoraFair(ridge=0.0).check(base_model(tmp_path).shape, WORK)
