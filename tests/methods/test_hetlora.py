"""HETLoRA: truncation, pruning, and means in which a missing rank is zero."""

from __future__ import annotations

import pytest
import torch

from methods._ranks import rank_in
from methods.hetlora import HetLora
from methods.lora import Lora
from testbed.errors import UsageError
from testbed.model.combine import state_hash
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, clients_of, run_of
from tests.reference.driver import started

SHORT = {"clients": 2, "steps": 1, "evaluate_every": 100}
PRUNES = {"ranks": (4, 2), "penalty": 1.0, "decay": 0.75}
A, B = (f"model.layers.0.self_attn.q_proj.lora_{factor}.weight" for factor in "AB")


def test_one_client_without_penalty_is_vanilla_federated_lora_bit_for_bit(tmp_path):
    own = {**SHORT, "clients": 1}
    plain = federate(run_of(Lora(rank=4), tmp_path / "plain", **own))
    ranked = federate(run_of(HetLora(ranks=(4,), penalty=0.0), tmp_path / "ranked", **own))
    assert state_hash(ranked.tensors, {}) == state_hash(plain.tensors, {})


def test_a_client_whose_last_ranks_shrink_has_fewer_from_then_on(tmp_path):
    run = run_of(HetLora(**PRUNES), tmp_path, rounds=3, **SHORT)
    state = federate(run)
    ranks = {(result.round, result.client): result.scalars["rank"] for result in run.folder.results()}
    assert [ranks[index, 0] for index in range(3)] == [4, 3, 2]  # in the first round B is zero: nothing can shrink
    assert state.scalars["ranks"] == {"0": 2, "1": 1}
    orders = run.method.order(state, run.base, clients_of(run), 3)
    assert [rank_in(order.tensors) for order in orders] == [2, 1]


def test_without_penalty_nobody_prunes(tmp_path):
    run = run_of(HetLora(**{**PRUNES, "penalty": 0.0}), tmp_path, rounds=3, **SHORT)
    assert federate(run).scalars["ranks"] == {"0": 4, "1": 2}


def test_a_rank_that_a_client_lacks_counts_as_zero_and_one_that_nobody_has_stays(tmp_path, monkeypatch):
    run = run_of(HetLora(ranks=(4, 2, 6), penalty=0.0), tmp_path, rounds=1, **SHORT)
    before, seen, mean = started(run), {}, HetLora.mean

    def noting(method, state, received):
        seen.update({update.client: (update.read(A).tensor, update.read(B).tensor) for update in received})
        return mean(method, state, received)

    monkeypatch.setattr(HetLora, "mean", noting)
    after = federate(run)
    assert torch.equal(after.tensors[A][4:], before.tensors[A][4:])
    only = after.tensors[B][:, 2:4] / seen[0][1][:, 2:4]
    share = float(only.mean())
    assert 0 < share < 1
    torch.testing.assert_close(only, torch.full_like(only, share), rtol=1e-3, atol=1e-4)
    both = share * seen[0][0][:2] + (1 - share) * seen[1][0]
    torch.testing.assert_close(after.tensors[A][:2], both, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"penalty": -1.0}, "penalty=-1.0: expected at least 0"), ({"decay": 0.0}, "decay=0.0"), ({"decay": 1.5}, "1.5")],
)
def test_settings_that_cannot_work_are_refused_in_the_plan(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        HetLora(**settings).check(base_model(tmp_path).shape, WORK)
