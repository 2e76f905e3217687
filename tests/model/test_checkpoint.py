"""A folder becomes blocks by content; what cannot be read is refused by name."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from testbed.errors import ModelError, WireError
from testbed.method import CAUSAL_LM, MAPPED, RESIDENT, SEQUENCE_CLASSIFICATION
from testbed.model import blocks
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.model.tensorfile import entries, put_tensors, read_tensors
from tests.model import tiny


@pytest.fixture
def folder(tmp_path):
    return tiny.save(tiny.make("llama", CAUSAL_LM), tmp_path / "model")


@pytest.fixture
def store(tmp_path):
    return ContentStore(tmp_path / "store")


def test_shards_give_the_same_contents_as_one_file(tmp_path, store):
    model = tiny.make("llama", CAUSAL_LM)
    single = tiny.save(model, tmp_path / "single")
    sharded = tiny.save(model, tmp_path / "sharded", max_shard_size="6KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    one, many = (BaseModel.open(path, store, CAUSAL_LM, 2) for path in (single, sharded))
    assert one.blocks == many.blocks
    assert one.outside == many.outside
    assert one.config_hash == many.config_hash


def test_equal_blocks_at_different_positions_are_one_content(tmp_path, store):
    model = tiny.make("llama", CAUSAL_LM)
    model.model.layers[2].load_state_dict(model.model.layers[0].state_dict())
    base = BaseModel.open(tiny.save(model, tmp_path / "model"), store, CAUSAL_LM, 2)
    assert base.blocks[0] == base.blocks[2]
    assert len(set(base.blocks)) == 3


def test_a_block_put_back_unchanged_is_the_same_content(folder, store):
    base = BaseModel.open(folder, store, CAUSAL_LM, 2)
    tensors = base.tensors(base.blocks[1])
    assert base.put(dict(reversed(tensors.items()))) == base.blocks[1]
    tensors["mlp.up_proj.weight"] = tensors["mlp.up_proj.weight"] + 1
    changed = base.put(tensors)
    assert changed != base.blocks[1]
    assert torch.equal(base.tensors(changed)["mlp.up_proj.weight"], tensors["mlp.up_proj.weight"])


def test_contents_are_what_safetensors_reads(folder, store):
    base = BaseModel.open(folder, store, CAUSAL_LM, 2)
    original = load_file(folder / "model.safetensors")
    found = load_file(store.path(base.blocks[3]))
    assert found
    for name, tensor in found.items():
        assert torch.equal(tensor, original[f"model.layers.3.{name}"])


def test_an_unchanged_folder_is_not_read_again(folder, store, monkeypatch):
    first = BaseModel.open(folder, store, CAUSAL_LM, 2)
    monkeypatch.setattr("testbed.model.tensorfile.put_entries", None)
    assert BaseModel.open(folder, store, CAUSAL_LM, 2) == first


def test_a_changed_folder_is_read_again(folder, store):
    first = BaseModel.open(folder, store, CAUSAL_LM, 2)
    model = tiny.make("llama", CAUSAL_LM)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1)
    tiny.save(model, folder)
    second = BaseModel.open(folder, store, CAUSAL_LM, 2)
    assert [a == b for a, b in zip(first.blocks, second.blocks, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
@pytest.mark.parametrize("stored_as", ["bare", "language model", "classifier"])
def test_any_checkpoint_opens_as_a_classifier(tmp_path, architecture, stored_as):
    from transformers import AutoModelForMaskedLM

    classifier = tiny.make(architecture, SEQUENCE_CLASSIFICATION)
    if stored_as == "bare":
        saved = classifier.base_model
    elif stored_as == "classifier":
        saved = classifier
    elif architecture in tiny.ENCODERS:
        saved = AutoModelForMaskedLM.from_config(classifier.config)
        saved.base_model.load_state_dict(classifier.base_model.state_dict(), strict=False)
    else:
        saved = tiny.make(architecture, CAUSAL_LM)
        saved.base_model.load_state_dict(classifier.base_model.state_dict())
    base = tiny.open_base(tiny.save(saved, tmp_path / "model"), SEQUENCE_CLASSIFICATION)
    state = classifier.state_dict()
    built = tiny.built_from(base)
    built.fill({name: state[name] for name in built.head_names})
    assert bool(built.head_names) == (stored_as != "classifier")
    assert base.shape.head_elements == sum(state[name].numel() for name in built.head_names)
    assert torch.equal(tiny.logits(built.model), tiny.logits(classifier))


def test_a_classifier_for_other_labels_gets_a_new_head(tmp_path, store):
    folder = tiny.save(tiny.make("llama", SEQUENCE_CLASSIFICATION), tmp_path / "model")
    base = BaseModel.open(folder, store, SEQUENCE_CLASSIFICATION, tiny.LABELS + 2)
    assert base.head == {"score.weight": (tiny.LABELS + 2, 16)}


def test_the_oldest_names_of_norms_are_understood(tmp_path, store):
    folder = tiny.save(tiny.make("bert", SEQUENCE_CLASSIFICATION), tmp_path / "model")
    path = folder / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(path).items()
    }
    expected = BaseModel.open(folder, store, SEQUENCE_CLASSIFICATION, tiny.LABELS).blocks
    save_file(old, path)
    assert BaseModel.open(folder, store, SEQUENCE_CLASSIFICATION, tiny.LABELS).blocks == expected


@pytest.mark.parametrize(("architecture", "task"), tiny.CASES)
def test_sizes_are_those_of_the_real_model(architecture, task):
    model = tiny.make(architecture, task)
    shape = blocks.describe(model.config, task, tiny.LABELS)
    assert len(shape) == 4
    assert sum(shape.block_elements) + shape.outside_elements == sum(p.numel() for p in model.parameters())
    assert (shape.hidden, shape.vocabulary) == (16, tiny.VOCABULARY)
    for position, maps in enumerate(shape.blocks):
        assert {linear.part for linear in maps} == set(shape.part_elements[position])
        for linear in maps:
            assert shape.part_elements[position][linear.part] >= linear.inputs * linear.outputs
            weight = model.get_submodule(shape.linear_name(position, linear)).weight
            assert sorted(weight.shape) == sorted((linear.inputs, linear.outputs))


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b"")


def not_safetensors(path):
    path.write_bytes(b"PK\x03\x04" + b"x" * 500)


def endless_header(path):
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def with_header(change):
    def rewrite(path):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header["model.norm.weight"])
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return rewrite


@pytest.mark.parametrize(
    "spoil",
    [
        cut,
        empty,
        not_safetensors,
        endless_header,
        with_header(lambda entry: entry.update(shape=[17])),
        with_header(lambda entry: entry.update(shape=[-1, -16])),
        with_header(lambda entry: entry.update(dtype="F7")),
        with_header(lambda entry: entry.update(data_offsets=[0, 64])),
        with_header(lambda entry: entry.pop("dtype")),
    ],
)
def test_a_file_that_is_not_what_it_says_is_named(folder, store, spoil):
    spoil(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable safetensors file"):
        BaseModel.open(folder, store, CAUSAL_LM, 2)


def refused(folder, store, words, task=CAUSAL_LM):
    with pytest.raises(ModelError, match=words):
        BaseModel.open(folder, store, task, 2)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_cannot_be_opened_is_refused_with_a_reason(folder, store):
    change_config(folder, quantization_config={"load_in_4bit": True})
    refused(folder, store, "quantised")
    change_config(folder, quantization_config=None, model_type="no_such_model")
    refused(folder, store, "no_such_model")
    change_config(folder, model_type="llama", intermediate_size=25)
    refused(folder, store, "do not belong together")
    (folder / "model.safetensors").unlink()
    refused(folder, store, r"no model\.safetensors")
    (folder / "config.json").write_text("{")
    refused(folder, store, r"config\.json cannot be read")


def test_int8_weights_are_refused(folder, store):
    path = folder / "model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)
    refused(folder, store, "quantised")


def test_a_missing_shard_is_named(tmp_path, store):
    folder = tiny.save(tiny.make("llama", CAUSAL_LM), tmp_path / "model", max_shard_size="6KB")
    next(folder.glob("model-00002*")).unlink()
    refused(folder, store, r"lacks model-00002")


def test_encoders_are_no_language_models(tmp_path, store):
    folder = tiny.save(tiny.make("bert", SEQUENCE_CLASSIFICATION), tmp_path / "model")
    refused(folder, store, "use it as a classifier")


@pytest.mark.parametrize("model_type", ["mamba", "t5", "resnet"])
def test_models_without_one_block_list_are_refused(model_type):
    with pytest.raises(ModelError):
        blocks.describe({"model_type": model_type}, CAUSAL_LM, 2)


def test_resident_weights_are_private_and_mapped_ones_are_views(store):
    content = put_tensors(store, {"weight": torch.randn(1 << 20)})
    path = store.path(content)
    mapped = read_tensors(path, MAPPED, torch.float32)
    assert str(path) in mappings()
    with torch.no_grad():
        mapped["weight"].zero_()  # copy on write: the file stays what it is
    del mapped
    resident = read_tensors(path, RESIDENT, torch.float32)
    assert str(path) not in mappings()
    assert resident["weight"].abs().sum() > 0


def mappings():
    return Path("/proc/self/maps").read_text(encoding="ascii")


def test_reading_converts_a_piece_at_a_time(store):
    weight = torch.randn(3, 1_500_000).to(torch.bfloat16)
    content = put_tensors(store, {"weight": weight, "ids": torch.arange(5), "scalar": torch.tensor(2.0)})
    read = read_tensors(store.path(content), RESIDENT, torch.float32)
    assert torch.equal(read["weight"], weight.float())
    assert torch.equal(read["ids"], torch.arange(5))
    assert read["scalar"] == 2
    assert list(entries(store.path(content))) == ["ids", "scalar", "weight"]


OPEN_AND_MEASURE = """
import resource, sys
from pathlib import Path
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.model import blocks
folder, store = Path(sys.argv[1]), ContentStore(Path(sys.argv[2]))
blocks.describe({"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}, "causal_lm", 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
BaseModel.open(folder, store, "causal_lm", 2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_opening_does_not_hold_the_model(tmp_path):
    model = tiny.make("llama", CAUSAL_LM, hidden_size=512, intermediate_size=4096)
    folder = tiny.save(model, tmp_path / "model")
    command = [sys.executable, "-c", OPEN_AND_MEASURE, folder, tmp_path / "store"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    assert (folder / "model.safetensors").stat().st_size > 100 << 20
    assert grown < 40 << 20


def test_content_that_is_not_what_its_name_says_is_refused(store):
    content = store.put_bytes(b"blocks")
    assert store.has(content)
    assert store.read(content) == b"blocks"
    fresh = ContentStore(store.folder)
    (store.folder / content).write_bytes(b"block!")
    with pytest.raises(WireError, match="not what its name says"):
        fresh.path(content)
    with pytest.raises(WireError, match="deploy it first"):
        store.path("0" * 64)


def test_a_failed_write_leaves_nothing_behind(store):
    with pytest.raises(TypeError), store.writing() as draft:
        draft.write(None)
    assert list(store.folder.iterdir()) == []


def test_a_file_is_stored_by_its_content(tmp_path, store):
    path = tmp_path / "shard"
    path.write_bytes(b"x" * 3_000_000)
    content = store.put_file(path)
    assert content == store.put_bytes(b"x" * 3_000_000)
    assert store.path(content).stat().st_size == 3_000_000
