"""SLoRA: when its stages are, what each of them trains, and how the second one begins."""

from __future__ import annotations

import json

import pytest
import torch

from methods.lora import Lora
from methods.slora import SLora
from testbed.errors import UsageError
from testbed.evaluate import evaluate
from testbed.model.sparse import matrices
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, clients_of, run_of
from tests.reference.driver import started

SHORT = {"clients": 2, "steps": 2, "evaluate_every": 100}
MAP = "model.layers.0.self_attn.q_proj"
A, B = (f"{MAP}.lora_{factor}.weight" for factor in "AB")


@pytest.mark.parametrize(
    ("share", "rounds", "sparse"), [(0.3, 10, 3), (0.3, 2, 1), (0.01, 5, 1), (0.99, 5, 4), (0.3, 1, 1)]
)
def test_the_first_share_of_the_rounds_is_sparse(share, rounds, sparse, tmp_path):
    run = run_of(SLora(rank=2, sparse_share=share), tmp_path, clients=1, rounds=rounds)
    state, kinds = started(run), []
    for index in range(rounds):
        state = run.method.begin(state, run.base, index)
        [order] = run.method.order(state, run.base, clients_of(run), index)
        kinds.append(order.kind)
    assert kinds == ["sparse"] * sparse + ["train"] * (rounds - sparse)


def test_each_stage_sends_and_is_sent_its_own_tensors_and_both_as_many_bytes(tmp_path):
    run = run_of(SLora(rank=2, sparse_share=0.5), tmp_path, **SHORT)
    state = federate(run)
    sizes, names = {}, {}
    for result in run.folder.results():
        names[result.round] = {spec.name for spec in result.tensors}
        sizes[result.round] = sum(torch.Size(spec.shape).numel() for spec in result.tensors)
    assert {name.split(".")[-1] for name in names[0]} == {"sparse", "weight"}
    assert not [name for name in names[0] if "lora" in name]
    assert not [name for name in names[1] if "sparse" in name]
    assert sizes[0] == sizes[1]
    assert names[1] == set(run.method.order(state, run.base, clients_of(run), 2)[0].tensors)


def test_lora_begins_with_the_best_factors_of_the_sparse_change(tmp_path):
    run = run_of(SLora(rank=2, sparse_share=0.5), tmp_path, rounds=1, **SHORT)
    state = federate(run)
    begun = run.method.begin(state, run.base, 1)
    change = dict(matrices(state.tensors, run.base.shape, run.method.sparse(run.base.shape), run.config.seed))[MAP]
    assert 0 < int((change != 0).sum()) <= 2 * (32 + 32)
    u, s, v = torch.linalg.svd(change)
    found = begun.tensors[B] @ begun.tensors[A] * (32.0 / 2)
    torch.testing.assert_close(found, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-6)
    assert torch.equal(begun.tensors["score.weight"], state.tensors["score.weight"])


def test_with_every_element_and_every_rank_nothing_is_lost_between_the_stages(tmp_path):
    run = run_of(SLora(rank=64, sparse_share=0.5), tmp_path, rounds=1, **SHORT)
    state = federate(run)
    assert state.tensors[f"{MAP}.sparse"].shape == (32 * 32,)
    before, after = (
        evaluate(run.method, run.base, one, run.work, run.held_out)
        for one in (state, run.method.begin(state, run.base, 1))
    )
    assert after.loss == pytest.approx(before.loss, abs=1e-5)
    untouched = evaluate(run.method, run.base, started(run), run.work, run.held_out)
    assert abs(untouched.loss - before.loss) > 1e-2


def test_before_any_round_it_is_the_base_model(tmp_path):
    run = run_of(SLora(rank=2), tmp_path)
    plain = Lora(rank=2)
    state = plain.start(run.base, run.work, clients_of(run), run.config.seed, 1)
    expected = evaluate(plain, run.base, state, run.work, run.held_out)
    assert evaluate(run.method, run.base, started(run), run.work, run.held_out) == expected


def test_a_run_that_ends_in_the_first_stage_exports_what_the_second_would_begin_with(tmp_path):
    from safetensors.torch import load_file

    run = run_of(SLora(rank=2), tmp_path, rounds=1, **SHORT)
    state = federate(run)
    run.method.export(state, run.base, WORK, tmp_path / "export")
    stored = load_file(tmp_path / "export" / "adapter_model.safetensors")
    begun = run.method.begin(state, run.base, 1)
    assert torch.equal(stored[f"base_model.model.{A}"], begun.tensors[A])
    assert not [name for name in stored if "sparse" in name]
    assert json.loads((tmp_path / "export" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"sparse_share": 0.0}, "sparse_share=0.0: expected more than 0"), ({"sparse_share": 1.0}, "less than 1"),
     ({"alpha": 0.0}, "alpha=0")],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_in_the_plan(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        SLora(**settings).check(base_model(tmp_path).shape, WORK)
