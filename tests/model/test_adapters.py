"""LoRA computes, trains and is exported as PEFT does it."""

import pytest
import torch
from safetensors.torch import load_file

from testbed.errors import UsageError
from testbed.method import ATTENTION, CAUSAL_LM, SEQUENCE_CLASSIFICATION, Block, Submodel, Workload
from testbed.model.adapters import LoraShape, export_peft, lora_elements, lora_tensors, mount_lora
from tests.model import tiny

# PEFT still asks transformers for a property by its older name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "down_proj"),
    "gemma3_text": ("q_proj", "o_proj"),
    "phi": ("q_proj", "fc1"),
    "gpt2": ("c_attn", "c_proj"),
    "bert": ("query", "dense"),
    "roberta": ("query", "value"),
    "distilbert": ("q_lin", "lin1"),
}
ALPHA = 12.0
CASES = [(name, task) for name, task in tiny.CASES if name in TARGETS]


def trained_looking(tensors):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(value.shape, generator=generator) * 0.3 for name, value in tensors.items()}


@pytest.fixture
def bare(tmp_path):
    """A base model saved without any head of the task."""

    def open_one(architecture, task, **how):
        model = tiny.make(architecture, task)
        bare_model = model if task == CAUSAL_LM else model.base_model
        return tiny.open_base(tiny.save(bare_model, tmp_path / "model", **how), task)

    return open_one


def mounted(base, lora, tensors, **work):
    built = tiny.built_from(base, **work)
    mount_lora(built, lora, ALPHA, 0.0)
    built.fill(tensors)
    return built


@pytest.mark.parametrize(("architecture", "task"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_loads_with_peft_and_gives_the_same_logits(tmp_path, bare, architecture, task, dtype):
    base = bare(architecture, task)
    lora = LoraShape(4, TARGETS[architecture], positions=(0, 2, 3))
    tensors = trained_looking({**lora_tensors(base.shape, lora, 0), **base.new_head(0)})
    export_peft(tmp_path / "export", base, tensors, lora, ALPHA, 0.0, Workload(task=task))
    ours = tiny.logits(mounted(base, lora, tensors, dtype=dtype).model)
    theirs = tiny.logits(with_peft(base, tmp_path / "export", dtype))
    if dtype == "float32":
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_an_export_on_a_base_with_its_own_head_loads_with_peft(tmp_path, architecture):
    model = tiny.make(architecture, SEQUENCE_CLASSIFICATION)
    base = tiny.open_base(tiny.save(model, tmp_path / "model"), SEQUENCE_CLASSIFICATION)
    assert not base.new_head(0)
    lora = LoraShape(4, TARGETS[architecture])
    tensors = trained_looking(lora_tensors(base.shape, lora, 0))
    export_peft(tmp_path / "export", base, tensors, lora, ALPHA, 0.0, Workload(task=SEQUENCE_CLASSIFICATION))
    ours = tiny.logits(mounted(base, lora, tensors).model)
    torch.testing.assert_close(ours, tiny.logits(with_peft(base, tmp_path / "export")), rtol=1e-5, atol=1e-5)


def with_peft(base, folder, dtype="float32"):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    family = {CAUSAL_LM: AutoModelForCausalLM, SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification}[base.task]
    labels = {} if base.task == CAUSAL_LM else {"num_labels": base.labels}
    config = family.from_pretrained(base.folder, **labels).config
    config.pad_token_id = config.pad_token_id or 0
    model = family.from_pretrained(base.folder, config=config, dtype=getattr(torch, dtype))
    return PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize(("architecture", "task"), CASES)
def test_gradients_are_those_of_peft(tmp_path, bare, architecture, task):
    base = bare(architecture, task)
    lora = LoraShape(4, TARGETS[architecture])
    tensors = trained_looking({**lora_tensors(base.shape, lora, 0), **base.new_head(0)})
    export_peft(tmp_path / "export", base, tensors, lora, ALPHA, 0.0, Workload(task=task))
    built = mounted(base, lora, tensors)
    peft = with_peft(base, tmp_path / "export")
    peft.set_requires_grad("default")
    for model in (built.model, peft):
        model.eval()
        model(**tiny.batch()).logits.square().mean().backward()
    theirs = {name.replace(".default", ""): value.grad for name, value in peft.named_parameters() if "lora_" in name}
    ours = {f"base_model.model.{name}": value.grad for name, value in built.trainable().items() if "lora_" in name}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)


def test_initial_values_are_the_model_itself_and_do_not_depend_on_order(bare):
    base = bare("llama", CAUSAL_LM)
    lora = LoraShape(4, ("q_proj", "v_proj"))
    tensors = lora_tensors(base.shape, lora, 7)
    assert torch.equal(tiny.logits(mounted(base, lora, tensors).model), tiny.logits(tiny.built_from(base).model))
    alone = lora_tensors(base.shape, LoraShape(4, ("v_proj",), positions=(2,)), 7)
    assert all(torch.equal(value, tensors[name]) for name, value in alone.items())
    factor = tensors["model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert factor.shape == (4, 16)
    assert factor.abs().max() <= 1 / 16**0.5
    assert factor.std() > 0.1
    assert not torch.equal(factor, lora_tensors(base.shape, lora, 8)["model.layers.0.self_attn.q_proj.lora_A.weight"])


@pytest.mark.parametrize("architecture", TARGETS)
def test_elements_are_what_is_mounted(bare, architecture):
    base = bare(architecture, SEQUENCE_CLASSIFICATION)
    lora = LoraShape(4, TARGETS[architecture], positions=(1, 2))
    kept = Submodel((Block(0), Block(1, parts=(ATTENTION,)), Block(3)))
    built = tiny.built_from(base, kept)
    names = mount_lora(built, lora, ALPHA, 0.1)
    trained = {name: value for name, value in built.trainable().items() if name not in built.head_names}
    assert tuple(trained) == names
    assert sum(value.numel() for value in trained.values()) == lora_elements(base.shape, lora, kept.blocks)
    assert lora_elements(base.shape, lora) == 2 * lora_elements(base.shape, lora, [1])


def test_adapters_of_a_submodel_train_with_streamed_blocks(bare):
    base = bare("llama", SEQUENCE_CLASSIFICATION)
    lora = LoraShape(4, ("q_proj", "v_proj"))
    tensors = trained_looking({**lora_tensors(base.shape, lora, 0), **base.new_head(0)})
    found = []
    for work in ({}, {"holding": "streamed", "checkpointing": True}):
        built = mounted(base, lora, tensors, **work)
        built.model(**tiny.batch()).logits.square().mean().backward()
        found.append({name: value.grad for name, value in built.trainable().items()})
    assert found[0].keys() == found[1].keys() == tensors.keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_adapters_are_float32_over_bfloat16(bare):
    built = tiny.built_from(bare("llama", SEQUENCE_CLASSIFICATION), dtype="bfloat16")
    names = mount_lora(built, LoraShape(4, ("q_proj",)), ALPHA, 0.0)
    assert {built.trainable()[name].dtype for name in names} == {torch.float32}


def test_an_export_holds_factors_and_head_alone(tmp_path, bare):
    base = bare("bert", SEQUENCE_CLASSIFICATION)
    lora = LoraShape(2, ("query",), positions=(1,))
    tensors = {**lora_tensors(base.shape, lora, 0), **base.new_head(0)}
    export_peft(tmp_path / "export", base, tensors, lora, ALPHA, 0.0, Workload())
    stored = load_file(tmp_path / "export" / "adapter_model.safetensors")
    assert set(stored) == {f"base_model.model.{name}" for name in tensors}


def test_targets_that_do_not_exist_are_refused_with_those_that_do(bare):
    base = bare("llama", CAUSAL_LM)
    with pytest.raises(UsageError, match=r"query_key_value.*self_attn\.q_proj"):
        lora_tensors(base.shape, LoraShape(4, ("query_key_value",)), 0)
    with pytest.raises(UsageError, match="query_key_value"):
        mount_lora(tiny.built_from(base), LoraShape(4, ("query_key_value",)), ALPHA, 0.0)
