"""C2A: what the hypernetwork makes, whose labels it sees, what is sent, and what the plan counts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from methods.c2a import C2A
from testbed.errors import UsageError
from testbed.evaluate import mounted
from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION, Submodel, Workload
from testbed.model import blocks, tracing
from testbed.model.footprint import Baseline, Coefficients, predict
from testbed.model.hypernetwork import UP, hypernetwork_tensors, mount_hypernetwork
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import CLASSES, WORK, base_model, run_of
from tests.model import tiny

SMALL = C2A(bottleneck=3, condition=5)


def filled(shape, labels, seed=1):
    """A hypernetwork whose adapters change something."""
    tensors = hypernetwork_tensors(shape, labels, 3, 5, seed)
    return {**tensors, UP: 0.5 * torch.randn(tensors[UP].shape, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("architecture", ["llama", "bert", "distilbert", "gpt2"])
def test_a_new_hypernetwork_leaves_the_model_as_it_is_and_a_filled_one_does_not(architecture, tmp_path):
    tiny.save(tiny.make(architecture, SEQUENCE_CLASSIFICATION), tmp_path / "model")
    base = tiny.open_base(tmp_path / "model", SEQUENCE_CLASSIFICATION)
    built = tiny.built_from(base)
    before = tiny.logits(built.model)
    labels = built.work.labels
    SMALL.mount(built, hypernetwork_tensors(base.shape, labels, 3, 5, seed=1))
    assert torch.equal(tiny.logits(built.model), before)
    built.fill(filled(base.shape, labels))
    assert not torch.allclose(tiny.logits(built.model), before)


def test_adapters_follow_the_labels_of_the_client_and_are_those_of_all_classes_alike_in_evaluation(tmp_path):
    base = base_model(tmp_path)
    tensors = filled(base.shape, CLASSES)
    built = mounted(None, base, Submodel.first(4), {}, WORK)
    built.model.eval()
    hypernetwork = mount_hypernetwork(built, 3, 5)
    built.fill(tensors)
    evaluated = mounted(SMALL, base, Submodel.first(4), tensors, WORK)
    evaluated.model.eval()
    hypernetwork.see((9, 1, 0, 0))
    skewed = tiny.logits(built.model)
    hypernetwork.see((18, 2, 0, 0))
    assert torch.equal(tiny.logits(built.model), skewed)
    assert not torch.allclose(tiny.logits(evaluated.model), skewed)
    hypernetwork.see((7, 7, 7, 7))
    assert torch.equal(tiny.logits(built.model), tiny.logits(evaluated.model))


def test_a_client_sends_the_hypernetwork_and_the_head_whatever_the_models_depth(tmp_path):
    run = run_of(SMALL, tmp_path, clients=1, rounds=1, steps=1)
    state = federate(run)
    [result] = run.folder.results()
    assert {spec.name: spec.shape for spec in result.tensors} == {
        "hypernetwork.condition.weight": (5, CLASSES),
        "hypernetwork.blocks.weight": (4, 5),
        "hypernetwork.down.weight": (3 * 32, 5),
        "hypernetwork.up.weight": (32 * 3, 5),
        "score.weight": (CLASSES, 32),
    }
    assert set(state.tensors) == {spec.name for spec in result.tensors}
    assert set(result.scalars) == {"loss", "last_loss"}  # nothing of its labels


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 9])
def test_the_footprint_counts_the_hypernetwork_once_and_blocks_put_together_as_all_of_them(
    layers, checkpointing, monkeypatch
):
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 4, "num_hidden_layers": layers, "vocab_size": 256, "max_position_embeddings": 64,
    }  # fmt: skip
    shape = blocks.describe(config, SEQUENCE_CLASSIFICATION, CLASSES, "float32")
    work = Workload(SEQUENCE_CLASSIFICATION, CLASSES, batch_size=4, length=64, checkpointing=checkpointing)
    phases = C2A().phases(Submodel.first(layers), shape, work)
    found = predict(phases, shape, work, Baseline(0), Coefficients()).largest
    elements = 32 * CLASSES + layers * 32 + 2 * 16 * 64 * 32
    assert found.parts["adapters"] == 4 * elements
    assert found.parts["optimizer"] == 8 * (elements + CLASSES * 64)
    assert min(found.parts.values()) > 0
    monkeypatch.setattr(tracing, "kinds", lambda phase, *_: tuple(f"{block.position}" for block in phase.blocks))
    assert predict(phases, shape, work, Baseline(0), Coefficients()).bytes == found.bytes


def test_training_with_recomputed_blocks_gives_the_same(tmp_path):
    states = []
    for checkpointing in (False, True):
        run = run_of(SMALL, tmp_path / str(checkpointing), clients=1, rounds=2, steps=2)
        run.work = Workload(**{**vars(run.work), "checkpointing": checkpointing})
        states.append(federate(run).tensors)
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor)


def test_the_export_says_all_that_is_needed_to_compute_the_same(tmp_path):
    base = base_model(tmp_path)
    tensors = {**filled(base.shape, CLASSES), **base.new_head(0)}
    run = run_of(SMALL, tmp_path, clients=1)
    SMALL.export(type("State", (), {"tensors": tensors}), base, WORK, tmp_path / "export")
    about = json.loads((tmp_path / "export" / "adapters.json").read_text())
    stored = load_file(tmp_path / "export" / "adapters.safetensors")
    model = mounted(None, base, Submodel.first(4), {}, run.work).model.eval()
    model.score.weight = torch.nn.Parameter(stored["score.weight"])
    for index, block in enumerate(model.get_submodule(about["blocks"])):
        block.register_forward_hook(adapter_of(stored, index, about))
    whole = mounted(SMALL, base, Submodel.first(4), tensors, WORK).model.eval()
    torch.testing.assert_close(tiny.logits(model), tiny.logits(whole))


def adapter_of(stored, index, about):
    histogram = torch.full((about["labels"],), 1 / about["labels"])
    z = stored["hypernetwork.condition.weight"] @ histogram + stored["hypernetwork.blocks.weight"][index]
    down = (stored["hypernetwork.down.weight"] @ z.tanh()).reshape(about["bottleneck"], -1)
    up = (stored["hypernetwork.up.weight"] @ z.tanh()).reshape(-1, about["bottleneck"])
    return lambda _, __, x: x + torch.nn.functional.gelu(x @ down.T) @ up.T


def test_it_is_for_classes_and_refuses_settings_that_cannot_be(tmp_path):
    assert CAUSAL_LM not in C2A.tasks
    shape = base_model(tmp_path).shape
    with pytest.raises(UsageError, match="setting condition=0: expected at least 1"):
        C2A(condition=0).check(shape, WORK)
    with pytest.raises(UsageError, match="setting bottleneck=0: expected at least 1"):
        C2A(bottleneck=0).check(shape, WORK)
