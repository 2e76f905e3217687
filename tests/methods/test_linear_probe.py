"""Linear probing: the reference, a head and nothing else, and what that takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from methods.linear_probe import LinearProbe
from testbed.errors import UsageError
from testbed.method import IMAGE_CLASSIFICATION, SEQUENCE_CLASSIFICATION, Submodel, Workload
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.model.combine import state_hash
from testbed.model.footprint import Baseline, Coefficients, predict
from testbed.model.submodel import build
from testbed.prepare import RESNET, VIT, model_folder
from testbed.rounds import federate
from testbed.task import Example, Shard
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, run_of
from tests.model import tiny
from tests.reference import linear_probe
from tests.reference.driver import data_of, finished, float64_run, largest_difference, rates_of, started, weights_of

SHORT = {"clients": 2, "steps": 1, "evaluate_every": 100}


def compared(tmp_path, mutation=None):
    """How far two rounds of the method are from the reference's."""
    run = float64_run(LinearProbe(), tmp_path)
    expected = linear_probe.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    return largest_difference(finished(run).tensors, expected)


def test_two_rounds_give_what_the_reference_gives(tmp_path):
    assert compared(tmp_path) < 1e-5


def test_a_reference_that_pools_the_first_token_is_told_apart(tmp_path):
    assert compared(tmp_path, mutation="axis") > 1e-3


def test_streamed_blocks_give_the_same_bit_for_bit(tmp_path):
    plain = run_of(LinearProbe(), tmp_path / "plain", **SHORT)
    streamed = run_of(LinearProbe(streamed=True), tmp_path / "streamed", **SHORT)
    assert state_hash(federate(streamed).tensors, {}) == state_hash(federate(plain).tensors, {})
    held = [{content for content, _ in run.engine.weights._held} & set(run.base.blocks) for run in (plain, streamed)]
    assert held == [set(plain.base.blocks), set()]


@pytest.mark.parametrize(("architecture", "dropout"), [("bert", "hidden_dropout_prob"), ("distilbert", "dropout")])
def test_all_that_the_checkpoint_lacks_is_the_head_and_it_is_trained_without_dropout(architecture, dropout, tmp_path):
    method, losses = LinearProbe(), []
    for rate in (0.0, 0.5):
        model = tiny.make(architecture, SEQUENCE_CLASSIFICATION, **{dropout: rate})
        tiny.save(model.base_model, tmp_path / str(rate))
        base = tiny.open_base(tmp_path / str(rate), SEQUENCE_CLASSIFICATION)
        run = run_of(method, tmp_path / "run", **SHORT)
        run = replace(run, base=base, store=base.store, shards=[put(base.store, texts())] * 2, held_out=texts())
        run.work = Workload(SEQUENCE_CLASSIFICATION, tiny.LABELS, batch_size=4, length=8)
        run.plan = replace(run.plan, clients=tuple(replace(c, submodel=Submodel.first(4)) for c in run.plan.clients))
        run.engine.base = base
        before, after = started(run), finished(run)
        assert set(after.tensors) == set(base.head)
        assert all(not torch.equal(after.tensors[name], before.tensors[name]) for name in after.tensors)
        losses.append([result.scalars["loss"] for result in run.folder.results()])
    assert losses[0] == losses[1]


def texts():
    draw = torch.Generator().manual_seed(3)
    examples = [
        Example(torch.randint(3, tiny.VOCABULARY, (8,), generator=draw).tolist(), label=index % tiny.LABELS)
        for index in range(8)
    ]
    return Shard.of(examples, SEQUENCE_CLASSIFICATION, tiny.LABELS)


def put(store, shard):
    path = store.folder / "shard.partial"
    shard.save(path)
    return store.put_file(path)


@pytest.mark.parametrize("name", [RESNET, VIT])
def test_the_head_of_an_image_model_is_trained_and_its_statistics_stay(name, tmp_path):
    labels = 3
    base = BaseModel.open(model_folder(name), ContentStore(tmp_path / "content"), IMAGE_CLASSIFICATION, labels)
    draw, size = torch.Generator().manual_seed(4), base.config["image_size"]
    pixels = [torch.randint(0, 255, (3, size, size), generator=draw).to(torch.uint8).numpy() for _ in range(6)]
    examples = [Example(label=index % labels, pixels=image) for index, image in enumerate(pixels)]
    shard = Shard.of(examples, IMAGE_CLASSIFICATION, labels)
    run = run_of(LinearProbe(), tmp_path / "run", **{**SHORT, "rounds": 1})
    run = replace(run, base=base, store=base.store, shards=[put(base.store, shard)] * 2, held_out=shard)
    run.work = Workload(IMAGE_CLASSIFICATION, labels, batch_size=3)
    whole = Submodel.first(len(base.shape))
    run.plan = replace(run.plan, clients=tuple(replace(client, submodel=whole) for client in run.plan.clients))
    run.engine.base = base
    before, after = started(run), finished(run)
    assert set(after.tensors) == set(base.head)
    assert state_hash(after.tensors, {}) != state_hash(before.tensors, {})


def test_a_step_keeps_nothing_of_the_blocks_for_its_backward_pass(tmp_path):
    shape, work = base_model(tmp_path).shape, replace(WORK, batch_size=64)
    peaks = {
        streamed: predict(
            LinearProbe(streamed=streamed).phases(Submodel.first(4), shape, work), shape, work, Baseline(0),
            Coefficients(),
        ).phases[0]
        for streamed in (False, True)
    }  # fmt: skip
    hidden = 64 * 16 * 32 * 4 + 4096
    assert peaks[False].parts.get("activations", 0) <= 2 * hidden
    assert peaks[False].parts["weights"] == 4 * sum(shape.block_elements)
    assert "weights" not in peaks[True].parts
    assert peaks[True].bytes < peaks[False].bytes
    assert peaks[True].parts["optimizer"] == 8 * shape.head_elements


def test_a_checkpoint_that_has_its_head_already_is_refused(tmp_path):
    shape = replace(base_model(tmp_path).shape, head_elements=0)
    with pytest.raises(UsageError, match="linear_probe trains a new head, and this llama checkpoint has its own"):
        LinearProbe().check(shape, WORK)


def test_the_export_is_the_head(tmp_path):
    run = run_of(LinearProbe(), tmp_path, rounds=1, clients=1)
    state = federate(run)
    run.method.export(state, run.base, WORK, tmp_path / "export")
    stored = load_file(tmp_path / "export" / "head.safetensors")
    assert state_hash(stored, {}) == state_hash(state.tensors, {})
    built = build(
        run.base.config, run.base.fill_in(Submodel.first(4)), run.base.store.path, run.base.outside, WORK, seed=9
    )
    built.fill(stored)
    assert torch.equal(built.model.score.weight, state.tensors["score.weight"])
