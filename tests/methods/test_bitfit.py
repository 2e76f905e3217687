"""BitFit: it trains what a model's own biases are, and new ones where there are none."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from methods.bitfit import BitFit
from testbed.errors import UsageError
from testbed.method import SEQUENCE_CLASSIFICATION
from testbed.model import blocks
from testbed.node.training import local_steps
from testbed.rounds import federate
from testbed.task import Batch
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import BLOCKS, CLASSES, WORK, base_model, run_of
from tests.model import tiny
from tests.reference.driver import started


def desk():
    """A workplace of three local steps."""
    batches = [tiny.batch(length) for length in (7, 9, 11)]
    labels = torch.tensor([0, 1, 2])
    return SimpleNamespace(
        job=SimpleNamespace(steps=3, learning_rate=1e-2, seed=0, round=0, client=0),
        batch=lambda step: Batch(batches[step]["input_ids"], batches[step]["attention_mask"], labels),
        progress=lambda **_: None,
    )


def has_bias(module):
    return (blocks.is_linear(module) or blocks.is_norm(module)) and module.bias is not None


def test_offsets_are_the_change_of_the_biases_of_a_model_that_has_them(tmp_path):
    tiny.save(tiny.make("bert", SEQUENCE_CLASSIFICATION), tmp_path / "model")
    base = tiny.open_base(tmp_path / "model", SEQUENCE_CLASSIFICATION)
    own, shifted = (tiny.built_from(base, dtype="float64") for _ in range(2))
    before = {}
    for position, block in own.block_modules.items():
        for path, module in block.named_modules():
            if has_bias(module):
                module.bias = torch.nn.Parameter(module.bias.detach().clone())
                before[f"{own.prefix}.{position}.{path}"] = module.bias.detach().clone()
    BitFit().mount(shifted, {})
    local_steps(desk(), own)
    local_steps(desk(), shifted)
    found, expected = shifted.trainable(), own.trainable()
    assert {name.removesuffix(".offset") for name in found if name.endswith(".offset")} == set(before)
    for name, bias in before.items():
        moved = expected[f"{name}.bias"].detach() - bias
        torch.testing.assert_close(found[f"{name}.offset"].detach(), moved, rtol=0, atol=1e-7)
    assert any(bool(found[f"{name}.offset"].abs().max() > 1e-3) for name in before if "norm" in name.lower())


@pytest.mark.parametrize("architecture", ["llama", "bert", "distilbert", "gpt2"])
def test_new_offsets_leave_the_model_as_it_is_and_named_ones_alone_are_mounted(architecture, tmp_path):
    tiny.save(tiny.make(architecture, SEQUENCE_CLASSIFICATION), tmp_path / "model")
    base = tiny.open_base(tmp_path / "model", SEQUENCE_CLASSIFICATION)
    method = BitFit(targets=(base.shape.blocks[0][0].path.split(".")[-1],), norms=False)
    built = tiny.built_from(base)
    before = tiny.logits(built.model)
    tensors = method.start(base, WORK, [], 0, 1).tensors
    method.mount(built, tensors)
    assert torch.equal(tiny.logits(built.model), before)
    assert set(built.trainable()) == set(tensors)
    assert sum(name.endswith(".offset") for name in tensors) == BLOCKS


def test_the_state_is_the_outputs_of_the_linear_maps_and_the_head(tmp_path):
    run = run_of(BitFit(), tmp_path)
    shape, tensors = run.base.shape, started(run).tensors
    outputs = sum(linear.outputs for block in shape.blocks for linear in block)
    assert sum(tensor.numel() for tensor in tensors.values()) == outputs + CLASSES * shape.hidden


def test_the_export_says_all_that_is_needed_to_compute_the_same(tmp_path):
    run = run_of(BitFit(), tmp_path, rounds=1, clients=1)
    state = federate(run)
    run.method.export(state, run.base, WORK, tmp_path / "export")
    about = json.loads((tmp_path / "export" / "offsets.json").read_text())
    stored = load_file(tmp_path / "export" / "offsets.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(
        about["base_model_name_or_path"], num_labels=about["labels"], ignore_mismatched_sizes=True
    ).eval()
    for name, tensor in stored.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".offset"):
            module.bias = torch.nn.Parameter(tensor)  # this model has none of its own
        else:
            module.weight = torch.nn.Parameter(tensor)
    built = tiny.built_from(run.base)
    run.method.mount(built, state.tensors)
    built.model.eval()
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, built.model(ids).logits)


def test_a_target_that_is_no_linear_map_is_refused_in_the_plan(tmp_path):
    with pytest.raises(UsageError, match="setting targets=lm_head: 'lm_head' is no linear map of a llama block"):
        BitFit(targets=("lm_head",)).check(base_model(tmp_path).shape, WORK)
