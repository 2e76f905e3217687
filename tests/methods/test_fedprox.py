"""FedProx: what it is without its term, and what the term is of."""

from __future__ import annotations

import pytest

from methods.fedprox import FedProx
from methods.lora import Lora
from testbed.errors import UsageError
from testbed.model.combine import state_hash
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, run_of

SHORT = {"clients": 2, "steps": 2, "evaluate_every": 100}


def test_without_its_term_it_is_vanilla_federated_lora_bit_for_bit(tmp_path):
    prox = federate(run_of(FedProx(rank=4, mu=0.0), tmp_path / "prox", **SHORT))
    plain = federate(run_of(Lora(rank=4), tmp_path / "plain", **SHORT))
    assert state_hash(prox.tensors, {}) == state_hash(plain.tensors, {})


def test_the_losses_that_it_reports_are_the_tasks(tmp_path):
    """The first step starts where the term and its gradient are zero, so the second one's loss is that of `lora`."""
    losses = []
    for method in (FedProx(rank=4, mu=100.0), Lora(rank=4)):
        run = run_of(method, tmp_path / type(method).__name__, rounds=1, **SHORT)
        federate(run)
        losses.append([result.scalars["last_loss"] for result in run.folder.results()])
    assert losses[0] == losses[1]


def test_a_larger_mu_holds_clients_nearer_to_what_they_were_sent(tmp_path):
    moved = []
    for mu in (0.0, 1.0, 10.0):
        run = run_of(FedProx(rank=4, mu=mu), tmp_path / str(mu), rounds=1, clients=1, steps=8, learning_rate=2e-3)
        before = run.method.start(run.base, run.work, [], run.config.seed, 1).tensors
        after = federate(run).tensors
        moved.append(sum(float((after[name] - before[name]).square().sum()) for name in after))
    assert moved[0] > moved[1] > moved[2]


def test_what_the_plan_counts_for_the_copy_is_what_the_client_trains(tmp_path):
    run = run_of(FedProx(rank=4), tmp_path, rounds=1, clients=1, steps=1)
    [phase] = run.method.phases(run.plan.clients[0].submodel, run.base.shape, run.work)
    assert phase.kept_bytes == sum(tensor.nbytes for tensor in federate(run).tensors.values())


def test_a_term_that_pushes_away_is_refused_in_the_plan(tmp_path):
    with pytest.raises(UsageError, match=r"setting mu=-0\.1: expected at least 0"):
        FedProx(mu=-0.1).check(base_model(tmp_path).shape, WORK)
