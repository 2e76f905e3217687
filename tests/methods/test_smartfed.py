"""SmartFed: rank-one experts are the pool's adapters, gates and quotas are the reference's, experts travel once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from methods.smartfed import SmartFed, share_out
from testbed.adapter_pool import CONFIG, find_pool
from testbed.errors import UsageError, WireError
from testbed.evaluate import evaluate, evaluate_snapshot
from testbed.method import SEQUENCE_CLASSIFICATION, Submodel
from testbed.model import experts, initial
from testbed.model.adapters import LoraShape, mount_lora
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.model.footprint import Baseline, predict
from testbed.model.submodel import build
from testbed.model.tensorfile import read_tensors
from testbed.package_data import PACKAGE
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, run_of
from tests.contract.settings import pool, write_adapter
from tests.reference import smartfed
from tests.reference.driver import (
    InFloat64,
    data_of,
    finished,
    float64_run,
    largest_difference,
    rates_of,
    started,
    weights_of,
)

SHORT = {"clients": 2, "steps": 1, "evaluate_every": 100}
WIDER = LoraShape(3, ("o_proj", "q_proj"))


class FromRandomRouters(InFloat64):
    """The method from routers that are not zero."""

    def start(self, *arguments):
        state = super().start(*arguments)
        drawn = {
            name: initial.uniform(tensor.shape, 0.5, 3, name).double()
            for name, tensor in state.tensors.items()
            if name.endswith(experts.ROUTER)
        }
        return replace(state, tensors={**state.tensors, **drawn})


def smartfed_with(**settings):
    return SmartFed(**{"pool": str(pool()), **settings})


def built_and_batch(base, kept=None):
    submodel = base.fill_in(kept or Submodel.first(len(base.shape)))
    built = build(base.config, submodel, base.store.path, base.outside, WORK, seed=0)
    return built, {"input_ids": torch.arange(8, 24).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}


def logits(built, batch):
    with torch.no_grad():
        return built.model.eval()(**batch).logits


# ── the reference ──────────────────────────────────────────────────────────────────────────────────────────────────
def compared(tmp_path, mutation=None, **settings):
    """How far two rounds are from the reference's, on two adapters that adapt unlike maps at unlike scales."""
    base = base_model(tmp_path)
    narrow = write_adapter(tmp_path / "pool" / "narrow", base, LoraShape(2, ("q_proj", "v_proj")), 1)
    wide = write_adapter(tmp_path / "pool" / "wide", base, WIDER, 2, alpha=5.0)
    method = SmartFed(pool=str(tmp_path / "pool"), experts=2, largest=3, **settings)
    run = float64_run(method, tmp_path, rounds=3)
    run.method = FromRandomRouters(method)
    expected = smartfed.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        pool=[({n: t.double() for n, t in lora.items()}, alpha) for lora, alpha in ((narrow, 8.0), (wide, 5.0))],
        total=2 * 12, smallest=1, largest=3, recompute_every=1, learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    state = finished(run)
    assert len(set(state.scalars["quotas"].values())) > 1, "the quotas would be as they were at the start"
    return largest_difference(state.tensors, expected)


def test_three_rounds_give_what_the_reference_gives(tmp_path):
    assert compared(tmp_path) < 1e-5


def test_a_reference_that_normalises_the_gates_is_told_apart(tmp_path):
    assert compared(tmp_path, mutation="renormalised") > 1e-3


def test_normalised_gates_are_those_of_such_a_reference(tmp_path):
    assert compared(tmp_path, mutation="renormalised", normalise="selected") < 1e-5


# ── identities ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_all_experts_with_gates_of_one_are_the_sum_of_the_adapters(tmp_path, monkeypatch):
    base = base_model(tmp_path)
    built, batch = built_and_batch(base)
    experts.mount_experts(built, find_pool(str(pool()), base.shape).experts(), selected=False)
    monkeypatch.setattr(
        experts, "active_gates", lambda linear, hidden, selected: hidden.new_ones(*hidden.shape[:-1], 8)
    )
    found = logits(built, batch)
    both, _ = built_and_batch(base)
    lora = LoraShape(8, ("q_proj", "v_proj"))
    mount_lora(both, lora, 8.0 * 2, 0.0)  # scale 2, as alpha 8 at rank 4
    both.fill(stacked(tmp_path, base))
    assert torch.allclose(found, logits(both, batch), atol=1e-5)
    assert not torch.allclose(found, logits(built_and_batch(base)[0], batch), atol=1e-2)


def stacked(tmp_path, base):
    """The pool's adapters as one of their ranks together: B_1 A_1 + B_2 A_2."""
    two = [write_adapter(tmp_path / str(seed), base, LoraShape(4, ("q_proj", "v_proj")), seed) for seed in (1, 2)]
    return {name: torch.cat([t[name] for t in two], dim=0 if "lora_A" in name else 1) for name in two[0]}


def test_zero_routers_take_the_first_experts_at_one_over_all(tmp_path):
    base = base_model(tmp_path)
    linear = built_and_batch(base)[0].block_modules[0].self_attn.q_proj
    experts._mount(linear, torch.ones(5, 32), torch.ones(32, 5), selected=False)
    linear.router.quota.fill_(2)
    gates = experts.active_gates(linear, torch.randn(3, 32), selected=False)
    assert torch.equal(gates, torch.tensor([[0.2, 0.2, 0, 0, 0]]).expand(3, 5))
    assert torch.allclose(experts.active_gates(linear, torch.randn(1, 32), selected=True)[0, :2], torch.tensor(0.5))


def test_only_routers_and_head_are_trained_and_sent_and_the_experts_travel_as_content(tmp_path):
    run = run_of(smartfed_with(), tmp_path, **SHORT)
    start, end = started(run), federate(run)
    sent = {spec.name for result in run.folder.results() for spec in result.tensors}
    assert sent == set(end.tensors) == set(start.tensors)
    assert {name.split(".")[-2] for name in sent} == {"router", "score"}
    assert {job.further for job in run.engine.jobs} == {(start.scalars["pool"],)}
    assert run.base.tensors(start.scalars["pool"]).keys() == find_pool(str(pool()), run.base.shape).experts().keys()
    assert all(not torch.equal(start.tensors[name], end.tensors[name]) for name in sent)


def test_updates_are_as_large_as_those_of_lora_at_half_the_pools_rank_on_square_maps(tmp_path):
    state = started(run_of(smartfed_with(), tmp_path, **SHORT))
    square = sum(t.numel() for name, t in state.tensors.items() if name.endswith(f"q_proj.{experts.ROUTER}"))
    assert square == 4 * (8 // 2) * (32 + 32)


# ── quotas ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("importances", "expected"),
    [
        ({"a": 0.0, "b": 0.0, "c": 0.0}, {"a": 4, "b": 4, "c": 4}),
        ({"a": 6.0, "b": 3.0, "c": 3.0}, {"a": 6, "b": 3, "c": 3}),
        ({"a": 99.0, "b": 1.0, "c": 0.0}, {"a": 8, "b": 2, "c": 2}),
        ({"a": 5.0, "b": 5.0, "c": 5.0 / 3}, {"a": 5, "b": 5, "c": 2}),
    ],
)
def test_quotas_are_rounded_shares_within_bounds_that_add_up(importances, expected):
    bounds = dict.fromkeys(importances, 1), dict.fromkeys(importances, 8)
    assert share_out(12, importances, *bounds) == expected


def test_quotas_stay_where_they_are_until_they_are_due(tmp_path):
    late = federate(run_of(smartfed_with(recompute_every=3), tmp_path, **{**SHORT, "steps": 2}))
    assert set(late.scalars["quotas"].values()) == {4}
    assert sum(late.scalars["importances"].values()) > 0


def test_importances_that_are_missing_or_no_numbers_are_refused(tmp_path):
    run = run_of(smartfed_with(), tmp_path, **SHORT)
    state = started(run)
    names = state.scalars["sizes"]

    def update(importances):
        return type("Sent", (), {"client": 1, "names": (), "scalars": {"importances": importances}})()

    run.method.verify(state, update(dict.fromkeys(names, 0.5)))
    for wrong in (None, {}, dict.fromkeys(names, -1.0), dict.fromkeys(names, float("nan")), dict.fromkeys(names, "x")):
        with pytest.raises(WireError):
            run.method.verify(state, update(wrong))


# ── settings, pool and footprint ───────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("settings", [{"smallest": 0}, {"experts": 0}, {"largest": 3}, {"recompute_every": 0}])
def test_settings_that_cannot_be_met_are_refused(settings, tmp_path):
    with pytest.raises(UsageError, match=min(settings)):
        smartfed_with(**settings).check(base_model(tmp_path).shape, WORK)


def test_the_pool_that_comes_along_is_refused_for_another_model_with_the_way_out(tmp_path):
    with pytest.raises(UsageError, match="testbed make-adapters --model"):
        SmartFed().check(base_model(tmp_path).shape, WORK)


def test_the_pool_that_comes_along_is_small_and_of_the_quickstart_model(tmp_path):
    model = PACKAGE / "quickstart"
    base = BaseModel.open(model, ContentStore(tmp_path), SEQUENCE_CLASSIFICATION, 8)
    SmartFed().check(base.shape, WORK)
    sizes = find_pool("quickstart", base.shape).sizes()
    assert set(sizes.values()) == {16}
    assert len(sizes) == 2 * len(base.shape)
    assert sum(path.stat().st_size for path in (model / "adapters").rglob("*") if path.is_file()) < 1_000_000
    made = [json.loads(path.read_text()) for path in sorted((model / "adapters").glob("*/made.json"))]
    assert len({label for each in made for label in each["classes"]}) == 8


def test_a_pool_that_is_not_there_or_holds_nothing_is_refused(tmp_path):
    shape = base_model(tmp_path).shape
    with pytest.raises(UsageError, match="there is no folder"):
        find_pool(str(tmp_path / "nowhere"), shape)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no PEFT adapter"):
        find_pool(str(tmp_path / "empty"), shape)


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"alpha_pattern": {"q": 1}},
        {"peft_type": "IA3"},
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(change, tmp_path):
    base = base_model(tmp_path)
    write_adapter(tmp_path / "one", base, WIDER, 1)
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    (tmp_path / "one" / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(UsageError, match=min(change)):
        find_pool(str(tmp_path / "one"), base.shape)


def test_rank_stabilised_adapters_have_their_own_scale_and_a_list_keeps_its_order(tmp_path):
    base = base_model(tmp_path)
    for name in ("b", "a"):
        write_adapter(tmp_path / name, base, LoraShape(4, ("q_proj",)), 1)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, "use_rslora": True}))
    first, second = find_pool(f"{tmp_path / 'b'},{tmp_path / 'a'}", base.shape).adapters
    assert {*first.scales.values()} == {2.0}
    assert {*second.scales.values()} == {4.0}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
def test_our_reading_of_an_adapter_is_pefts(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = base_model(tmp_path)
    write_adapter(tmp_path / "one", base, WIDER, 1)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), tmp_path / "one")
    [adapter] = find_pool(str(tmp_path / "one"), base.shape).adapters
    for name, (down, up) in adapter.factors().items():
        layer = peft.get_submodule(f"base_model.model.{name}")
        assert torch.allclose(up @ down, layer.get_delta_weight("default"), atol=1e-6)


def test_the_footprint_counts_frozen_experts_and_trained_routers(tmp_path):
    shape = base_model(tmp_path).shape
    method = smartfed_with()
    phases = method.phases(Submodel.first(4), shape, WORK)
    [predicted] = predict(phases, shape, WORK, Baseline(0, 0)).phases
    per_block = {"router": 2 * 8 * 32, "experts": 8 * (32 + 32) + 8 * (32 + 16)}
    assert predicted.parts["adapters"] == 4 * 4 * sum(per_block.values())
    assert predicted.parts["optimizer"] == 2 * 4 * (4 * per_block["router"] + 4 * 32)


def test_the_exported_file_is_the_model_that_was_evaluated(tmp_path):
    run = run_of(smartfed_with(), tmp_path, **SHORT)
    state = federate(run)
    run.method.export(state, run.base, run.work, tmp_path / "export")
    tensors = read_tensors(tmp_path / "export" / "mixture.safetensors", "resident")
    again = evaluate_snapshot(run.method, run.base, Submodel.first(4), tensors, run.work, run.held_out)
    assert again == evaluate(run.method, run.base, state, run.work, run.held_out)
