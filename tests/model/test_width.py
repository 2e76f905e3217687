"""Narrower models: which there are, what they hold of the wide one, and that it computes what they compute."""

from __future__ import annotations

import pytest
import torch

from testbed.errors import UsageError
from testbed.method import IMAGE_CLASSIFICATION, SEQUENCE_CLASSIFICATION, Part, Submodel, Workload
from testbed.model import blocks
from testbed.model.combine import regions
from testbed.model.whole import whole
from testbed.model.width import admits, cut, narrow_config, windows
from tests.contract.harness import RESNET
from tests.model import tiny

LABELS = 3
BOTTLENECK = {**RESNET, "layer_type": "bottleneck", "hidden_sizes": [16, 32, 32, 64]}
VIT = {
    "model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
}  # fmt: skip
GROUPED = {
    **tiny.CONFIGS["llama"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2, "rms_norm_eps": 1e-12,
}  # fmt: skip
BERT = {**tiny.CONFIGS["bert"], "model_type": "bert"}
CONFIGS = {
    "resnet": (RESNET, IMAGE_CLASSIFICATION), "bottleneck": (BOTTLENECK, IMAGE_CLASSIFICATION),
    "vit": (VIT, IMAGE_CLASSIFICATION), "llama": (GROUPED, SEQUENCE_CLASSIFICATION),
    "bert": (BERT, SEQUENCE_CLASSIFICATION),
}  # fmt: skip
RATIOS = (1.0, 0.5, 0.25, 0.125, 0.0625)


def shape_of(config, task):
    return blocks.describe(config, task, LABELS)


def places(name, ratio, shift=0):
    config, task = CONFIGS[name]
    return windows(config, ratio, task, LABELS, shift)


def random_tensors(name):
    """A value for every tensor of the wide model."""
    generator = torch.Generator().manual_seed(3)
    whole_ranges = places(name, 1.0)
    shapes = {name: [stop for _, stop in ranges] for name, ranges in whole_ranges.items()}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: value.abs() + 0.5 if "running_var" in name else value for name, value in drawn.items()}


def model_of(config, task, tensors):
    work = Workload(task, LABELS, dtype="float64")
    depth = len(shape_of(config, task))
    built = whole(config, Submodel.first(depth), work, dict(tensors), lambda _: False)
    return built.model.eval()


def all_else_zero(tensors, held):
    """The wide model's tensors with only what the narrower one holds."""
    kept = {}
    for name, value in tensors.items():
        kept[name] = torch.zeros_like(value)
        for there, here in regions(Part(cut(value, held[name]), held[name]), value, name):
            kept[name][there] = cut(value, held[name])[here]
    return kept


# ── which ratios ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("resnet", (1.0, 0.5, 0.25, 0.125)),
        ("bottleneck", (1.0, 0.5, 0.25)),
        ("vit", (1.0, 0.5, 0.25)),
        ("llama", (1.0, 0.5, 0.25)),
        ("bert", (1.0, 0.5)),
    ],
)
def test_a_model_has_the_ratios_at_which_every_width_is_a_whole_number(name, ratios):
    shape = shape_of(*CONFIGS[name])
    assert tuple(ratio for ratio in RATIOS if admits(shape, ratio)) == ratios


def test_a_ratio_that_no_binary_fraction_is_counts_as_the_whole_number_it_means():
    config = {**RESNET, "embedding_size": 10, "hidden_sizes": [10, 10, 20, 30]}
    assert admits(shape_of(config, IMAGE_CLASSIFICATION), 0.3)
    assert narrow_config(config, 0.3)["hidden_sizes"] == [3, 3, 6, 9]


@pytest.mark.parametrize("architecture", ["gpt2", "distilbert"])
def test_an_architecture_that_cannot_be_cut_by_its_axes_is_refused(architecture):
    config = {**tiny.CONFIGS[architecture], "model_type": architecture}
    with pytest.raises(UsageError, match=f"a {architecture} model narrower: expected a ResNet, or a transformer"):
        admits(shape_of(config, SEQUENCE_CLASSIFICATION), 0.5)


# ── where the tensors lie ──────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_are_exactly_the_tensors_of_the_narrower_model(name):
    config, task = CONFIGS[name]
    tensors, held = random_tensors(name), places(name, 0.5, shift=3)
    pieces = {name: cut(tensors[name], ranges) for name, ranges in held.items()}
    narrow = model_of(narrow_config(config, 0.5), task, pieces)  # raises for one that is missing or does not fit
    assert sum(value.numel() for value in narrow.parameters()) < sum(value.numel() for value in tensors.values()) / 1.8


def test_the_whole_width_is_every_tensor_as_it_is():
    tensors = random_tensors("resnet")
    assert all(cut(tensors[name], ranges) is tensors[name] for name, ranges in places("resnet", 1.0, shift=5).items())


def test_pictures_and_classes_are_never_cut():
    held = places("resnet", 0.25, shift=1)
    assert held["resnet.embedder.embedder.convolution.weight"] == ((1, 3), (0, 3), (0, 7), (0, 7))
    assert held["classifier.1.weight"] == ((0, LABELS), (1, 5))
    assert held["classifier.1.bias"] == ((0, LABELS),)


def test_the_window_moves_on_by_a_channel_or_a_head_and_goes_around():
    first, later = places("vit", 0.5, shift=1), places("vit", 0.5, shift=3)
    assert first["vit.layers.0.attention.q_proj.weight"] == ((4, 12), (1, 9))
    assert later["vit.layers.0.attention.q_proj.weight"] == ((12, 20), (3, 11))
    assert later["vit.layers.0.attention.o_proj.weight"] == ((3, 11), (12, 20))
    assert later["vit.layers.0.mlp.fc1.weight"] == ((3, 15), (3, 11))
    assert later["vit.embeddings.position_embeddings"] == ((0, 1), (0, 5), (3, 11))


def test_query_heads_move_on_with_the_key_and_value_head_that_they_read():
    held = places("llama", 0.5, shift=1)
    assert held["model.layers.0.self_attn.q_proj.weight"] == ((8, 24), (1, 17))
    assert held["model.layers.0.self_attn.k_proj.weight"] == ((4, 12), (1, 17))


def test_a_piece_that_goes_around_the_end_begins_again_at_the_front():
    value = torch.arange(24.0).view(4, 6)
    assert torch.equal(cut(value, ((3, 5), (4, 7))), value[[3, 0]][:, [4, 5, 0]])


# ── what it computes ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", ["resnet", "bottleneck"])
@pytest.mark.parametrize("shift", [0, 1, 13])
def test_a_resnet_of_which_the_rest_is_zero_computes_what_the_narrower_one_does(name, shift):
    config, task = CONFIGS[name]
    tensors, held = random_tensors(name), places(name, 0.5, shift)
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    narrow = model_of(narrow_config(config, 0.5), task, {n: cut(tensors[n], held[n]) for n in held})
    wide = model_of(config, task, all_else_zero(tensors, held))
    assert torch.allclose(narrow(pixel_values=pixels).logits, wide(pixel_values=pixels).logits, rtol=1e-9)


@pytest.mark.parametrize("shift", [0, 1, 3, 29])
def test_a_transformer_of_which_the_rest_is_zero_computes_what_the_narrower_one_does(shift):
    tensors, held = random_tensors("llama"), places("llama", 0.5, shift)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))
    narrow = model_of(narrow_config(GROUPED, 0.5), SEQUENCE_CLASSIFICATION, {n: cut(tensors[n], held[n]) for n in held})
    kept = all_else_zero(tensors, held)
    norms = {name: value * 0.5**0.5 for name, value in kept.items() if "norm" in name}  # a mean over half of zeros
    wide = model_of(GROUPED, SEQUENCE_CLASSIFICATION, {**kept, **norms})
    # its norms compute in float32
    assert torch.allclose(narrow(input_ids=ids).logits, wide(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
