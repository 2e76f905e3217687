"""The references' model and optimiser against the libraries': otherwise the references would prove nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from tests.reference.model import depth, hidden_states, logits
from tests.reference.steps import Update, combine, cross_entropy, local_steps

CLASSES = 4


class ExactRotary(LlamaRotaryEmbedding):
    """The library's rotary table in the model's own precision: the library computes it in float32 always."""

    def forward(self, x, position_ids):
        size = self.config.hidden_size // self.config.num_attention_heads
        base = self.config.rope_parameters["rope_theta"]
        angles = position_ids[..., None].to(x.dtype) / base ** (torch.arange(0, size, 2, dtype=x.dtype) / size)
        doubled = torch.cat([angles, angles], dim=-1)
        return doubled.cos(), doubled.sin()


def exact_norm(norm):
    """The same norm in the model's own precision: the library's goes through float32."""
    exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
    exact.weight = norm.weight
    return exact


def random_classifier():
    """A random 4-block classifier in float64, its norms' gains random too so that a forgotten gain shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=2, bos_token_id=None,
        initializer_range=0.1, num_labels=CLASSES,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def library_model():
    """The library's model, its two places of float32 replaced: as it comes it agrees with float64 to 1e-6 only."""
    model = random_classifier()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                setattr(module, name, exact_norm(child))
    model.model.rotary_emb = ExactRotary(model.config)
    return model


def batch(seed, size=6, length=12):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (size, length), generator=draw)
    return ids, torch.randint(0, CLASSES, (size,), generator=draw)


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_the_logits_are_those_of_the_library(library_model):
    ids, _ = batch(0)
    with torch.no_grad():
        expected = library_model(ids).logits
    weights = weights_of(library_model)
    assert depth(weights) == 4
    torch.testing.assert_close(logits(weights, ids, range(4)), expected, rtol=0, atol=1e-10)


def test_the_logits_are_those_of_the_library_as_it_comes_within_its_float32():
    model, (ids, _) = random_classifier(), batch(0)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(logits(weights_of(model), ids, range(4)), expected, rtol=1e-5, atol=1e-6)


def test_the_hidden_states_are_those_of_the_library(library_model):
    ids, _ = batch(1)
    with torch.no_grad():
        expected = library_model.model(ids, output_hidden_states=True).hidden_states
    found = hidden_states(weights_of(library_model), ids, range(4))
    for ours, theirs in zip(found[:4], expected[:4], strict=True):  # the library's last one is already normed
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_local_steps_are_those_of_the_librarys_optimiser_with_clipped_gradients(library_model):
    weights = weights_of(library_model)
    batches = [batch(seed) for seed in range(3)]
    trained = ("score.weight", "model.layers.3.mlp.down_proj.weight")
    parameters = [torch.nn.Parameter(weights[name].clone()) for name in trained]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    norms = []
    for ids, labels in batches:
        optimizer.zero_grad()
        logits_now = logits({**weights, **dict(zip(trained, parameters, strict=True))}, ids, range(4))
        (3.0 * torch.nn.functional.cross_entropy(logits_now, labels)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()

    def loss(tensors, ids, labels):
        return 3.0 * cross_entropy(logits({**weights, **tensors}, ids, range(4)), labels)

    found = local_steps({name: weights[name] for name in trained}, loss, batches, learning_rate=0.01)
    assert max(norms) > 1.0  # there was something to clip
    for name, parameter in zip(trained, parameters, strict=True):
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=1e-10)


def test_the_mean_counts_only_who_holds_an_element_and_leaves_the_rest_alone():
    state = {"a": torch.tensor([1.0, 1.0, 1.0]), "b": torch.tensor([7.0])}
    first = Update(1, {"a": torch.tensor([2.0, 2.0, 2.0])}, {"a": torch.tensor([True, True, False])})
    second = Update(3, {"a": torch.tensor([6.0, 6.0, 6.0])}, {"a": torch.tensor([False, True, False])})
    found = combine(state, [first, second])
    assert found["a"].tolist() == [2.0, 5.0, 1.0]
    assert found["b"].tolist() == [7.0]
