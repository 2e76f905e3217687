"""Full adapters: the reference, what is refused, what is exported."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from methods.full_adapters import FullAdapters
from testbed.errors import UsageError, WireError
from testbed.method import SEQUENCE_CLASSIFICATION, Part, Phase, Submodel
from testbed.model.bottleneck import adapter_tensors, fill_adapters, mount_adapters, mount_branch
from testbed.model.footprint import Baseline, predict
from testbed.plan import fit
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import CLASSES, WORK, base_model, run_of
from tests.model import tiny
from tests.reference import full_adapters
from tests.reference.driver import data_of, finished, float64_run, largest_difference, rates_of, started, weights_of


def compared(tmp_path, mutation=None):
    """How far two rounds of the method are from the reference's."""
    run = float64_run(FullAdapters(bottleneck=4), tmp_path)
    expected = full_adapters.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    return largest_difference(finished(run).tensors, expected)


def test_two_rounds_give_what_the_reference_gives(tmp_path):
    assert compared(tmp_path) < 1e-5


def test_a_reference_whose_adapters_subtract_is_told_apart(tmp_path):
    assert compared(tmp_path, mutation="sign") > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "bert", "distilbert", "gpt2"])
def test_new_adapters_leave_the_model_as_it_is(architecture, tmp_path):
    tiny.save(tiny.make(architecture, SEQUENCE_CLASSIFICATION), tmp_path / "model")
    base = tiny.open_base(tmp_path / "model", SEQUENCE_CLASSIFICATION)
    built = tiny.built_from(base)
    before = tiny.logits(built.model)
    tensors = adapter_tensors(base.shape, 3, seed=1)
    FullAdapters(bottleneck=3).mount(built, tensors)
    assert torch.equal(tiny.logits(built.model), before)
    assert {name for name in built.trainable() if ".adapter." in name} == set(tensors)
    FullAdapters(bottleneck=3).mount(built, {name: tensor + 0.3 for name, tensor in tensors.items()})
    assert not torch.allclose(tiny.logits(built.model), before)


def test_initial_adapters_are_the_same_for_the_same_seed_and_only_down_is_not_zero(tmp_path):
    shape = base_model(tmp_path).shape
    one, again, other = (adapter_tensors(shape, 3, seed) for seed in (1, 1, 2))
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name])
        assert bool(tensor.any()) is name.endswith("down.weight")
        assert torch.equal(tensor, other[name]) is not name.endswith("down.weight")


def test_an_adapter_of_another_shape_is_refused_wherever_it_is_mounted(tmp_path):
    tiny.save(tiny.make("llama", SEQUENCE_CLASSIFICATION), tmp_path / "model")
    base = tiny.open_base(tmp_path / "model", SEQUENCE_CLASSIFICATION)
    built = tiny.built_from(base, tiny.of(0, 1))
    mount_adapters(built, 3)
    mount_branch(built, 3, [2])
    for position in (1, 2):
        name = f"model.layers.{position}.adapter.up.bias"
        with pytest.raises(WireError, match=rf"{name} has the shape \(5,\), expected \(16,\)"):
            fill_adapters(built, {name: torch.zeros(5)})
    fill_adapters(built, {"model.layers.3.adapter.up.bias": torch.zeros(5)})  # mounted nowhere


def test_an_update_with_a_piece_that_does_not_fit_is_refused(tmp_path):
    run = run_of(FullAdapters(bottleneck=4), tmp_path)

    class Update:
        client, examples, scalars, names = 0, 1, {}, ("model.layers.0.adapter.up.bias",)

        def read(self, name):
            return Part(torch.zeros(33))

    with pytest.raises(WireError, match="expected a piece of"):
        run.method.verify(started(run), Update())


def test_a_device_that_cannot_hold_the_whole_model_is_refused(tmp_path):
    shape, method, baseline = base_model(tmp_path).shape, FullAdapters(), Baseline(100 << 20)
    [choice] = method.choices(shape)
    needed = predict(method.phases(choice, shape, WORK), shape, WORK, baseline).bytes
    assert fit(method, shape, WORK, needed, baseline).planned
    assert not fit(method, shape, WORK, needed - 1, baseline).planned


def test_the_footprint_counts_adapters_and_their_optimizer_slots(tmp_path):
    shape, method = base_model(tmp_path).shape, FullAdapters(bottleneck=8)
    [phase] = method.phases(Submodel.first(4), shape, WORK)
    parts = predict([phase], shape, WORK, Baseline(0)).phases[0].parts
    elements = 4 * (2 * 8 * shape.hidden + 8 + shape.hidden)
    assert isinstance(phase, Phase)
    assert parts["adapters"] == 4 * elements
    assert parts["optimizer"] == 8 * (elements + CLASSES * shape.hidden)


def test_the_export_says_all_that_is_needed_to_compute_the_same(tmp_path):
    run = run_of(FullAdapters(bottleneck=4), tmp_path, rounds=1, clients=1)
    state = federate(run)
    run.method.export(state, run.base, WORK, tmp_path / "export")
    about = json.loads((tmp_path / "export" / "adapters.json").read_text())
    stored = load_file(tmp_path / "export" / "adapters.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(
        about["base_model_name_or_path"], num_labels=about["labels"], ignore_mismatched_sizes=True
    ).eval()
    model.score.weight = torch.nn.Parameter(stored["score.weight"])
    for index, block in enumerate(model.get_submodule(about["blocks"])):
        block.register_forward_hook(adapter_of(stored, f"{about['blocks']}.{index}.adapter"))

    built = tiny_built(run)
    run.method.mount(built, state.tensors)
    built.model.eval()
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, built.model(ids).logits)


def adapter_of(stored, prefix):
    def add(_, __, hidden):
        down = torch.nn.functional.linear(hidden, stored[f"{prefix}.down.weight"], stored[f"{prefix}.down.bias"])
        up = torch.nn.functional.gelu(down) @ stored[f"{prefix}.up.weight"].T
        return hidden + up + stored[f"{prefix}.up.bias"]

    return add


def tiny_built(run):
    from testbed.model.submodel import build

    kept = run.base.fill_in(Submodel.first(len(run.base.shape)))
    return build(run.base.config, kept, run.base.store.path, run.base.outside, run.work, seed=0)


def test_a_bottleneck_of_nothing_is_refused_in_the_plan(tmp_path):
    with pytest.raises(UsageError, match="bottleneck=0"):
        FullAdapters(bottleneck=0).check(base_model(tmp_path).shape, WORK)
