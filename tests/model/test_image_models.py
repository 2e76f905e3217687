"""Image models: their blocks and buffers, initial weights, and the same answers as transformers' own models."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification

from testbed.errors import ModelError
from testbed.method import (
    ATTENTION,
    FEED_FORWARD,
    IMAGE_CLASSIFICATION,
    PARTS,
    SEQUENCE_CLASSIFICATION,
    Block,
    Phase,
    Submodel,
    Workload,
)
from testbed.model import blocks
from testbed.model.checkpoint import BaseModel, ContentStore, read_config
from testbed.model.footprint import Baseline, predict
from testbed.model.held import HeldWeights
from testbed.model.submodel import build
from testbed.prepare import RESNET, VIT, model_folder
from testbed.task import blank_batch, inputs, logits
from tests.model import tiny

LABELS = 3
WORK = Workload(IMAGE_CLASSIFICATION, LABELS, batch_size=4)
NAMES = (RESNET, VIT)
PREFIXES = {RESNET: "resnet.encoder.stages", VIT: "vit.layers"}


def config_of(name):
    return read_config(model_folder(name))


def original(name):
    """transformers' own model, with every weight and every statistic of its own."""
    torch.manual_seed(1)
    config = blocks.configuration(config_of(name), IMAGE_CLASSIFICATION, LABELS)
    model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(torch.rand_like(tensor) + 0.1 if tensor.is_floating_point() else torch.full_like(tensor, 7))
            if tensor.dim() > 1:
                tensor.sub_(0.6).mul_(0.1)
    return model.eval()


def output_layer(model):
    """The linear map that gives the logits."""
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]


def pixels(name):
    size = config_of(name)["image_size"]
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(2))


def batch_of(name):
    _, height, width = tuple(pixels(name).shape[1:])
    batch = blank_batch(IMAGE_CLASSIFICATION, 4, 1, (3, height, width))
    batch.pixel_values.copy_(pixels(name))
    return batch


def built_of(base, submodel=None, read=None, **work):
    kept = base.fill_in(submodel or Submodel.first(len(base.shape)))
    workload = Workload(IMAGE_CLASSIFICATION, base.labels, **work)
    how = {} if read is None else {"read": read}
    built = build(base.config, kept, base.store.path, base.outside, workload, seed=5, **how)
    built.model.eval()
    return built


def answers(built, name):
    with torch.no_grad():
        return logits(built.model, batch_of(name))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def store(tmp_path):
    return ContentStore(tmp_path / "store")


def saved(name, tmp_path, store):
    model = original(name)
    folder = tiny.save(model, tmp_path / "model")
    return model, BaseModel.open(folder, store, IMAGE_CLASSIFICATION, LABELS)


# ── structure ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_layers_and_stages_are_the_blocks(name):
    model, shape = original(name), blocks.describe(config_of(name), IMAGE_CLASSIFICATION, LABELS)
    assert (shape.architecture, shape.block_prefix, len(shape)) == (name, PREFIXES[name], 4)
    assert sum(shape.block_elements) + shape.outside_elements == sum(p.numel() for p in model.parameters())
    assert shape.head_elements == sum(p.numel() for p in model.classifier.parameters())
    assert shape.hidden == output_layer(model).in_features
    assert shape.vocabulary == 0
    assert blocks.image_shape(model.config) == tuple(pixels(name).shape[1:])


def test_a_stage_has_no_parts_and_a_layer_has_two():
    stages = blocks.describe(config_of(RESNET), IMAGE_CLASSIFICATION, LABELS)
    assert set(map(len, stages.part_elements)) == set(map(len, stages.blocks)) == {0}
    assert len(set(stages.block_elements)) == 4
    layers = blocks.describe(config_of(VIT), IMAGE_CLASSIFICATION, LABELS)
    assert [set(parts) for parts in layers.part_elements] == [set(PARTS)] * 4
    assert {linear.path.split(".")[0]: linear.part for linear in layers.blocks[0]} == {
        "attention": ATTENTION,
        "mlp": FEED_FORWARD,
    }


@pytest.mark.parametrize(
    ("config", "task", "message"),
    [
        ({**tiny.CONFIGS["llama"], "model_type": "llama"}, IMAGE_CLASSIFICATION, "no image_classification model"),
        (config_of(RESNET), SEQUENCE_CLASSIFICATION, "no sequence_classification model for type 'resnet'"),
    ],
)
def test_a_model_that_is_not_for_the_task_is_refused_in_one_line(config, task, message):
    with pytest.raises(ModelError, match=message) as refused:
        blocks.skeleton(config, task, LABELS, "float32")
    assert "\n" not in str(refused.value)


def test_a_model_that_says_no_image_size_is_refused():
    config = {key: value for key, value in config_of(RESNET).items() if key != "image_size"}
    with pytest.raises(ModelError, match='"image_size": 32'):
        blocks.image_shape(blocks.configuration(config, IMAGE_CLASSIFICATION, LABELS))


# ── weights and statistics ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("holding", ["resident", "mapped", "streamed"])
def test_what_is_split_and_built_answers_as_the_original(name, holding, tmp_path, store):
    model, base = saved(name, tmp_path, store)
    built = built_of(base, holding=holding)
    with torch.no_grad():
        expected = model(pixel_values=pixels(name)).logits
    assert torch.equal(answers(built, name), expected)
    own, theirs = dict(built.model.named_buffers()), dict(model.named_buffers())
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)


def test_a_backbone_without_a_head_gets_a_new_one(name, tmp_path, store):
    model = original(name)
    folder = tiny.save(model.base_model, tmp_path / "model")
    base = BaseModel.open(folder, store, IMAGE_CLASSIFICATION, LABELS)
    built = built_of(base)
    assert set(built.head_names) == {f"classifier.{own}" for own, _ in model.classifier.named_parameters()}
    built.fill({name: value for name, value in model.state_dict().items() if name in built.head_names})
    with torch.no_grad():
        assert torch.equal(answers(built, name), model(pixel_values=pixels(name)).logits)


def test_training_does_not_write_to_statistics_that_are_held_for_the_next_job(tmp_path, store):
    _, base = saved(RESNET, tmp_path, store)
    held = HeldWeights()
    first = built_of(base, read=held.read)
    before = {name: buffer.clone() for name, buffer in first.model.named_buffers()}
    first.model.train()
    logits(first.model, batch_of(RESNET))
    assert not torch.equal(
        first.model.resnet.embedder.embedder.normalization.running_mean,
        before["resnet.embedder.embedder.normalization.running_mean"],
    )
    again = dict(built_of(base, read=held.read).model.named_buffers())
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_statistics_of_another_shape_are_refused(tmp_path, store):
    _, base = saved(RESNET, tmp_path, store)
    tensors = base.tensors(base.blocks[0])
    missing = base.put({name: value for name, value in tensors.items() if not name.endswith("running_var")})
    with pytest.raises(ModelError, match="running_var"):
        built_of(base, Submodel((Block(0, missing), Block(1), Block(2), Block(3))))


def test_the_first_stages_stand_alone(tmp_path, store):
    model, base = saved(RESNET, tmp_path, store)
    built = built_of(base, Submodel.first(2))
    with torch.no_grad():
        found = built.model.base_model(**inputs(built.model, batch_of(RESNET))).last_hidden_state
        below = model.resnet.embedder(pixels(RESNET))
        assert torch.equal(found, model.resnet.encoder.stages[1](model.resnet.encoder.stages[0](below)))


def test_a_part_of_a_layer_can_be_dropped_and_none_of_a_stage(tmp_path, store):
    base = BaseModel.open(model_folder(VIT), store, IMAGE_CLASSIFICATION, LABELS)
    whole = built_of(base)
    with torch.no_grad():
        whole.model.vit.layers[1].mlp.fc2.weight.zero_()
        whole.model.vit.layers[1].mlp.fc2.bias.zero_()
    dropped = Submodel((Block(0), Block(1, parts=(ATTENTION,)), Block(2), Block(3)))
    assert torch.equal(answers(built_of(base, dropped), VIT), answers(whole, VIT))
    stages = BaseModel.open(model_folder(RESNET), store, IMAGE_CLASSIFICATION, LABELS)
    with pytest.raises(ModelError, match="keep it whole"):
        built_of(stages, dropped)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_pixels_are_fed_in_the_type_that_the_model_computes_in(name, dtype, tmp_path, store):
    model, base = saved(name, tmp_path, store)
    found = answers(built_of(base, dtype=dtype), name)
    with torch.no_grad():
        expected = model.double()(pixel_values=pixels(name).double()).logits
    assert found.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-9 if dtype == "float64" else 0.1, atol=1e-9 if dtype == "float64" else 0.3
    )


# ── from scratch ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_model_without_weights_gets_the_same_initial_ones_everywhere(name, tmp_path, store):
    bases = [
        BaseModel.open(model_folder(name), ContentStore(tmp_path / place), IMAGE_CLASSIFICATION, labels)
        for place, labels in (("here", LABELS), ("there", LABELS + 4))
    ]
    assert bases[0].blocks == bases[1].blocks
    assert bases[0].outside == bases[1].outside
    assert len(set(bases[0].blocks)) == 4
    assert all(key.startswith("classifier.") for key in bases[0].head)
    assert bases[0].shape.stored_dtype == "float32"


def test_initial_weights_spread_as_those_of_transformers(name, store):
    built = built_of(BaseModel.open(model_folder(name), store, IMAGE_CLASSIFICATION, LABELS))
    torch.manual_seed(0)
    theirs = AutoModelForImageClassification.from_config(built.model.config, dtype=torch.float32).state_dict()
    compared = 0
    for key, value in built.model.state_dict().items():
        if value.dim() > 1 and key not in built.head_names and value.numel() > 256:
            assert value.std().item() == pytest.approx(theirs[key].std().item(), rel=0.15)
            assert abs(value.mean().item()) < 0.2 * value.std().item()
            compared += 1
        elif key not in built.head_names and value.dim() < 2:
            assert torch.equal(value, theirs[key])
    assert compared > 10


def test_weights_of_another_format_are_no_reason_to_draw_some(tmp_path, store):
    (tmp_path / "config.json").write_text(json.dumps(config_of(RESNET)))
    assert BaseModel.open(tmp_path, store, IMAGE_CLASSIFICATION, LABELS).blocks
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(ModelError, match="save the model with save_pretrained"):
        BaseModel.open(tmp_path, store, IMAGE_CLASSIFICATION, LABELS)


def test_a_text_model_without_weights_is_refused(tmp_path, store):
    config = {**tiny.CONFIGS["llama"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        BaseModel.open(tmp_path, store, SEQUENCE_CLASSIFICATION, LABELS)


def test_a_tensor_without_a_known_initial_value_is_named(tmp_path, store):
    config = {"model_type": "convnext", "image_size": 32, "hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="layer_scale_parameter"):
        BaseModel.open(tmp_path, store, IMAGE_CLASSIFICATION, LABELS)


# ── footprint ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_job_on_images_is_predicted(name):
    shape = blocks.describe(config_of(name), IMAGE_CLASSIFICATION, LABELS)
    whole = tuple(Block(position) for position in range(4))
    phases = [
        Phase(
            "train",
            whole,
            size,
            1,
            backward=True,
            writable=tuple(range(4)),
            outside_writable=True,
        )
        for size in (4, 256)
    ]
    small, large = (predict([phase], shape, WORK, Baseline(0)).largest.parts for phase in phases)
    assert small["weights"] + small["outside"] == 4 * (sum(shape.block_elements) + shape.outside_elements)
    assert small["optimizer"] == 2 * (small["weights"] + small["outside"])
    assert sum(large.values()) > sum(small.values())
