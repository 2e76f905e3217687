"""FedRA: random subsets, and means over those who held a block."""

from __future__ import annotations

import torch

from methods.fedpruner import FedPruner
from methods.fedra import FedRA
from methods.lora import Lora
from testbed.model.combine import state_hash
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import BLOCKS, base_model, run_of
from tests.reference import fedra
from tests.reference.driver import data_of, finished, float64_run, largest_difference, rates_of, started, weights_of

SHORT = {"clients": 2, "steps": 1, "evaluate_every": 100}


def compared(tmp_path, mutation=None):
    """How far two rounds of the method are from the reference's, on the subsets that the method drew."""
    run = float64_run(FedRA(rank=2), tmp_path, keep=2)
    found = finished(run)
    drawn = [[job.submodel.positions for job in run.engine.jobs if job.round == index] for index in (0, 1)]
    expected = fedra.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        subsets=drawn, scale=16.0, learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    assert drawn[0][0] != drawn[0][1], "the means would be over the same clients everywhere"
    return largest_difference(found.tensors, expected)


def test_two_rounds_give_what_the_reference_gives(tmp_path):
    assert compared(tmp_path) < 1e-5


def test_a_reference_whose_means_run_over_everyone_is_told_apart(tmp_path):
    assert compared(tmp_path, mutation="everyone_counts") > 1e-3


def test_with_every_block_it_is_vanilla_federated_lora_bit_for_bit(tmp_path):
    drawn = federate(run_of(FedRA(rank=4), tmp_path / "drawn", **SHORT))
    plain = federate(run_of(Lora(rank=4), tmp_path / "plain", **SHORT))
    assert state_hash(drawn.tensors, {}) == state_hash(plain.tensors, {})


def test_it_is_fedpruner_that_selects_at_random_bit_for_bit(tmp_path):
    drawn = federate(run_of(FedRA(rank=4), tmp_path / "drawn", keep=2, **SHORT))
    pruned = federate(run_of(FedPruner(rank=4, selection="random"), tmp_path / "pruned", keep=2, **SHORT))
    assert state_hash(drawn.tensors, {}) == state_hash(pruned.tensors, {})


def test_subsets_have_the_clients_size_differ_between_clients_and_rounds_and_reach_every_block(tmp_path):
    base = base_model(tmp_path)
    run = run_of(FedRA(rank=2), tmp_path, clients=4, keep=3)
    clients = [client.client() for client in run.plan.clients]
    state = started(run)
    orders = [run.method.order(state, base, clients, index) for index in range(8)]
    drawn = [[order.submodel.positions for order in of_round] for of_round in orders]
    assert {len(positions) for of_round in drawn for positions in of_round} == {3}
    assert len({tuple(of_round) for of_round in drawn}) > 1
    assert any(len(set(of_round)) > 1 for of_round in drawn)
    assert {position for of_round in drawn for positions in of_round for position in positions} == set(range(BLOCKS))
    assert drawn[3] == [order.submodel.positions for order in run.method.order(state, base, clients, 3)]


def test_a_block_that_nobody_held_keeps_its_value(tmp_path):
    run = run_of(FedRA(rank=2), tmp_path, rounds=1, clients=1, keep=1)
    before, after = started(run), federate(run)
    [position] = run.engine.jobs[0].submodel.positions
    moved = {name for name in after.tensors if not torch.equal(after.tensors[name], before.tensors[name])}
    assert moved
    assert all(name.startswith((f"model.layers.{position}.", "score.")) for name in moved)
