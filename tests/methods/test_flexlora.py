"""FlexLoRA: the mean of products, and its best factors for every rank."""

from __future__ import annotations

import torch

from methods.flexlora import FlexLora
from methods.lora import Lora
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import clients_of, run_of
from tests.reference.driver import started

SHORT = {"clients": 2, "steps": 2, "evaluate_every": 100}
A, B = (f"model.layers.0.self_attn.q_proj.lora_{factor}.weight" for factor in "AB")


def test_one_client_of_one_rank_has_the_product_of_vanilla_federated_lora(tmp_path):
    own = {**SHORT, "clients": 1, "rounds": 1}
    plain = federate(run_of(Lora(rank=4), tmp_path / "plain", **own)).tensors
    divided = federate(run_of(FlexLora(ranks=(4,)), tmp_path / "divided", **own)).tensors
    torch.testing.assert_close(divided[B] @ divided[A], plain[B] @ plain[A], rtol=1e-4, atol=1e-6)
    assert torch.equal(divided["score.weight"], plain["score.weight"])
    torch.testing.assert_close(divided[B].square().sum(0), divided[A].square().sum(1), rtol=1e-4, atol=1e-8)


def test_a_client_of_a_lower_rank_is_sent_the_best_factors_of_that_rank(tmp_path):
    run = run_of(FlexLora(ranks=(4, 2)), tmp_path, rounds=1, **SHORT)
    state = federate(run)
    _, lower = run.method.order(state, run.base, clients_of(run), 1)
    u, s, v = torch.linalg.svd(state.tensors[B] @ state.tensors[A])
    best = (u[:, :2] * s[:2]) @ v[:2]
    torch.testing.assert_close(lower.tensors[B] @ lower.tensors[A], best, rtol=1e-3, atol=1e-5)


def test_ranks_that_no_product_has_can_still_be_trained(tmp_path):
    run = run_of(FlexLora(ranks=(6, 2)), tmp_path, rounds=1, **SHORT)
    run.engine.absent = {0}
    before, after = started(run).tensors, federate(run).tensors
    assert torch.equal(after[A][2:], before[A][2:])
    assert not after[B][:, 2:].any()
    assert after[B][:, :2].any()
