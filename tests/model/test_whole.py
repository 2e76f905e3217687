"""Models whose every tensor comes with the job: filled, trained where asked, and written out again."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from testbed.errors import ModelError
from testbed.method import IMAGE_CLASSIFICATION, SEQUENCE_CLASSIFICATION, Submodel, Workload
from testbed.model.whole import export_whole, running_statistics, whole, whole_tensors
from tests.contract.harness import base_model
from tests.model import tiny

COUNTER = "resnet.embedder.embedder.normalization.num_batches_tracked"
MEAN = "resnet.embedder.embedder.normalization.running_mean"


def everything(name):
    return True


def built_from(base, tensors, submodel=None, trained=everything, **work):
    kept = submodel or Submodel.first(len(base.shape))
    return whole(base.config, kept, Workload(base.task, base.labels, **work), tensors, trained)


@pytest.fixture
def images(tmp_path):
    return base_model(tmp_path, task=IMAGE_CLASSIFICATION)


def text(folder, architecture="llama", **changes):
    model = tiny.make(architecture, SEQUENCE_CLASSIFICATION, **changes)
    return tiny.open_base(tiny.save(model, folder / "model"), SEQUENCE_CLASSIFICATION), model


def test_all_tensors_of_a_base_model_make_the_original_again(tmp_path):
    base, original = text(tmp_path)
    tensors = whole_tensors(base, seed=0)
    assert tensors.keys() == original.state_dict().keys()
    built = built_from(base, tensors)
    assert torch.equal(tiny.logits(built.model), tiny.logits(original))


def test_a_new_head_comes_from_the_seed(images):
    first, again, other = (whole_tensors(images, seed)["classifier.1.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_running_statistics_are_filled_and_counters_begin_at_zero(images):
    tensors = {**whole_tensors(images, 0), MEAN: torch.arange(8.0)}
    assert COUNTER not in tensors
    built = built_from(images, tensors)
    assert running_statistics(built)[MEAN].tolist() == list(range(8))
    assert int(built.model.get_buffer(COUNTER)) == 0
    assert all(name.endswith(("running_mean", "running_var")) for name in running_statistics(built))
    built.model(pixel_values=torch.randn(4, 3, 16, 16))
    assert running_statistics(built)[MEAN].tolist() != list(range(8))


def test_only_what_is_named_has_a_gradient_and_all_is_in_train_mode(images):
    built = built_from(images, whole_tensors(images, 0), trained=lambda name: name.startswith("classifier"))
    assert list(built.trainable()) == ["classifier.1.weight", "classifier.1.bias"] == list(built.head_names)
    assert built.model.training


def test_tied_weights_stay_one(tmp_path):
    base, _ = text(tmp_path, "qwen2", tie_word_embeddings=True)
    built = built_from(base, whole_tensors(base, 0))
    assert built.model.model.embed_tokens.weight.requires_grad
    assert "model.embed_tokens.weight" in built.trainable()


def test_a_submodel_takes_the_tensors_of_its_own_blocks(tmp_path):
    base, original = text(tmp_path)
    built = built_from(base, whole_tensors(base, 0), tiny.of(0, 2))
    assert torch.equal(tiny.logits(built.model), tiny.logits(tiny.skip_blocks(original, (0, 2))))
    assert "model.layers.2.mlp.up_proj.weight" in built.trainable()


def test_the_computing_type_is_the_workloads(images):
    built = built_from(images, whole_tensors(images, 0), dtype="float64")
    assert {tensor.dtype for tensor in [*built.trainable().values(), *running_statistics(built).values()]} == {
        torch.float64
    }


def test_a_tensor_that_is_missing_or_has_another_shape_is_refused_by_name(images):
    tensors = whole_tensors(images, 0)
    with pytest.raises(ModelError, match="running_mean did not come with the job"):
        built_from(images, {name: tensor for name, tensor in tensors.items() if name != MEAN})
    with pytest.raises(ModelError, match=r"running_mean has the shape \(3,\), expected \(8,\)"):
        built_from(images, {**tensors, MEAN: torch.zeros(3)})


def test_an_exported_folder_gives_the_same_answers(images, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(value.shape, generator=generator) for name, value in whole_tensors(images, 0).items()}
    export_whole(tmp_path / "export", images, tensors)
    exported = AutoModelForImageClassification.from_pretrained(tmp_path / "export").eval()
    built = built_from(images, {name: tensor.clone() for name, tensor in tensors.items()})
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(exported(pixel_values=pixels).logits, built.model.eval()(pixel_values=pixels).logits)


def test_the_tokenizer_goes_with_an_exported_text_model(tmp_path):
    base, original = text(tmp_path)
    (base.folder / "tokenizer.json").write_text("{}")
    export_whole(tmp_path / "export", base, whole_tensors(base, 0))
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    assert torch.equal(tiny.logits(exported), tiny.logits(original))
    assert (tmp_path / "export" / "tokenizer.json").is_file()
