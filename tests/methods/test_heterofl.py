"""HeteroFL: what a client holds, how it is averaged, and what its clients' widths mean to plan and jobs."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageClassification

from methods.fedrolex import FedRolex
from methods.heterofl import HeteroFL
from testbed.errors import UsageError
from testbed.job import Job
from testbed.method import MAPPED, SEQUENCE_CLASSIFICATION
from testbed.model import blocks
from testbed.model.combine import state_hash
from testbed.model.footprint import Baseline, predict
from testbed.plan import fit, refit
from testbed.plan_table import plan_table
from testbed.rounds import federate
from testbed.run import ClientPlan
from testbed.task import Shard, batch_indices
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import CLASSES, IMAGES, base_model, clients_of, run_of
from tests.methods.widths import difference, with_widths
from tests.reference import heterofl
from tests.reference.driver import rates_of, started

BASELINE = Baseline(100 << 20)
CONVOLUTION = "resnet.encoder.stages.3.layers.0.layer.1.convolution.weight"  # 16 of 16 channels
RUNNING = "resnet.encoder.stages.3.layers.0.layer.1.normalization.running_var"
SHORT = {"clients": 2, "rounds": 1, "steps": 2}


def shape_of(folder):
    return base_model(folder, task=IMAGES.task).shape


# ── against the reference ──────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("widths", [(0.5, 0.25), (1.0, 0.125)])
def test_two_rounds_give_what_the_reference_gives(widths, tmp_path):
    assert difference(heterofl, HeteroFL(), tmp_path, widths) < 1e-5


def test_a_reference_in_which_everyone_counts_for_every_element_is_told_apart(tmp_path):
    assert difference(heterofl, HeteroFL(), tmp_path, (1.0, 0.125), mutation="everyone_counts") > 1e-3


# ── identities ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_at_the_whole_width_it_is_federated_averaging_of_the_original_model(tmp_path):
    run = run_of(HeteroFL(), tmp_path, **SHORT)
    state = started(run)
    locally = [trained_locally(run, state, client) for client in range(2)]
    for name, tensor in federate(run).tensors.items():
        assert torch.allclose(tensor, (locally[0][name] + locally[1][name]) / 2, atol=1e-5), name


def trained_locally(run, state, client):
    """One client's round on transformers' own model with torch's own optimizer."""
    config = blocks.configuration(run.base.config, IMAGES.task, CLASSES)
    model = AutoModelForImageClassification.from_config(config, dtype=torch.float32).train()
    model.load_state_dict(state.tensors, strict=False)
    descent = torch.optim.SGD(model.parameters(), 5 * rates_of(run)[0], momentum=0.9, weight_decay=5e-4)
    shard = Shard.open(run.store.path(run.shards[client]))
    for step in range(run.config.steps):
        rows = batch_indices(len(shard), run.work.batch_size, run.config.seed, 0, client, step)
        batch = shard.batch(rows, run.work.length, 0)
        descent.zero_grad()
        model(pixel_values=batch.pixel_values, labels=batch.labels).loss.backward()
        descent.step()
    return model.state_dict()


def test_at_the_whole_width_the_window_cannot_roll(tmp_path):
    both = [
        federate(run_of(kind(), tmp_path / kind.__name__, **{**SHORT, "rounds": 2})) for kind in (HeteroFL, FedRolex)
    ]
    first, second = (state_hash(state.tensors, {}) for state in both)
    assert first == second


def test_what_nobody_held_keeps_its_value_bit_for_bit(tmp_path):
    run = with_widths(run_of(HeteroFL(), tmp_path, **{**SHORT, "rounds": 2}), 0.5, 0.25)
    before, after = started(run).tensors, federate(run).tensors
    assert torch.equal(after[CONVOLUTION][8:], before[CONVOLUTION][8:])
    assert torch.equal(after[CONVOLUTION][:, 8:], before[CONVOLUTION][:, 8:])
    assert torch.equal(after[RUNNING][8:], before[RUNNING][8:])
    for name in (CONVOLUTION, RUNNING):
        held = after[name][:8, :8] if after[name].dim() > 1 else after[name][:8]
        assert bool((held != (before[name][:8, :8] if held.dim() > 1 else before[name][:8])).all())


def test_a_client_is_sent_the_leading_channels_and_sends_them_back(tmp_path):
    run = with_widths(run_of(HeteroFL(), tmp_path, **SHORT), 0.5, 0.5)
    state = started(run)
    first, second = run.method.order(state, run.base, clients_of(run), 7)
    assert torch.equal(first.tensors[CONVOLUTION], state.tensors[CONVOLUTION][:8, :8])
    assert first.tensors is second.tensors  # what clients are sent alike is written once
    federate(run)
    [spec] = [spec for spec in run.folder.results()[0].tensors if spec.name == CONVOLUTION]
    assert spec.shape == (8, 8, 3, 3)
    assert spec.ranges == ((0, 8), (0, 8), (0, 3), (0, 3))


def test_the_narrowest_client_that_a_model_admits_trains(tmp_path):
    run = with_widths(run_of(HeteroFL(), tmp_path, **{**SHORT, "clients": 1}), 0.125)  # one channel in the stem
    federate(run)
    assert [result.outcome for result in run.folder.results()] == ["finished"]


def test_texts_are_learned_too(tmp_path):
    run = with_widths(text_run(tmp_path), 0.5, 0.5)
    before, after = started(run).tensors, federate(run).tensors
    assert [result.outcome for result in run.folder.results()] == ["finished"] * 2
    name = "model.layers.3.self_attn.q_proj.weight"
    assert not torch.equal(after[name][:16, :16], before[name][:16, :16])
    assert torch.equal(after[name][16:], before[name][16:])


def text_run(folder):
    @dataclasses.dataclass(frozen=True)
    class OfTexts(HeteroFL):
        default_task = SEQUENCE_CLASSIFICATION

    return run_of(OfTexts(), folder, **SHORT)


# ── plan and jobs ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_choices_are_the_ratios_that_the_model_admits_largest_first(tmp_path):
    shape = shape_of(tmp_path)
    assert [choice.width for choice in HeteroFL().choices(shape)] == [1.0, 0.5, 0.25, 0.125]
    assert [choice.width for choice in HeteroFL(ratios=(0.25, 0.75, 0.3)).choices(shape)] == [0.75, 0.25]


def test_a_narrower_client_needs_less_memory_and_one_that_ran_out_gets_a_narrower_model(tmp_path):
    shape, method = shape_of(tmp_path), HeteroFL()
    needed = [
        predict(method.phases(choice, shape, IMAGES), shape, IMAGES, BASELINE).bytes for choice in method.choices(shape)
    ]
    assert needed == sorted(needed, reverse=True)
    assert len(set(needed)) == 4
    planned = fit(method, shape, IMAGES, needed[1], BASELINE)
    assert planned.submodel.width == 0.5
    plan = ClientPlan.from_json(json.loads(json.dumps(planned.to_json())))
    roomy = dataclasses.replace(plan, budget_bytes=2 * plan.budget_bytes)
    assert refit(method, shape, IMAGES, roomy, BASELINE, plan.predicted_peak_bytes).submodel.width == 0.25


def test_the_width_travels_with_the_job(tmp_path):
    run = with_widths(run_of(HeteroFL(), tmp_path, **SHORT), 0.5, 0.25)
    federate(run)
    jobs = [Job.from_json(json.loads(json.dumps(job.to_json()))) for job in run.engine.jobs]
    assert [job.submodel for job in jobs] == [job.submodel for job in run.engine.jobs]
    assert [job.submodel.width for job in jobs] == [0.5, 0.25]


def test_the_plan_shows_every_width_below_the_whole(tmp_path):
    run = with_widths(run_of(HeteroFL(), tmp_path, clients=1), 0.125)
    run.promises, run.inventory = (), ()
    shown = Console(width=200, file=io.StringIO())
    shown.print(plan_table(run))
    assert "4 of 4, width 1/8" in shown.file.getvalue()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratios": ()}, "ratios=: expected numbers above 0"),
        ({"ratios": (0.5, 1.5)}, "ratios=0.5,1.5: expected numbers above 0, up to 1"),
        ({"ratios": (0.3,)}, "ratios=0.3: a resnet model of these widths has no narrower one"),
        ({"momentum": 1.0}, "momentum=1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_the_plan(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        HeteroFL(**settings).check(shape_of(tmp_path), IMAGES)


def test_weights_that_are_trained_cannot_stay_in_the_file(tmp_path):
    with pytest.raises(UsageError, match="mapped"):
        HeteroFL().check(shape_of(tmp_path), dataclasses.replace(IMAGES, holding=MAPPED))


# ── the result ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_exported_folder_computes_what_the_runs_model_does(tmp_path):
    run = run_of(HeteroFL(), tmp_path, **SHORT)
    state = federate(run)
    run.method.export(state, run.base, run.work, tmp_path / "export")
    exported = AutoModelForImageClassification.from_pretrained(tmp_path / "export").eval()
    config = blocks.configuration(run.base.config, IMAGES.task, CLASSES)
    model = AutoModelForImageClassification.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(state.tensors, strict=False)
    pixels = torch.randn(3, 3, 16, 16)
    assert torch.equal(exported(pixel_values=pixels).logits, model(pixel_values=pixels).logits)
