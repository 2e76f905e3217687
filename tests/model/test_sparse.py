"""Sparse changes: they compute W x + D x, their gradients are right, and their places follow from the seed."""

import pytest
import torch

from testbed.errors import UsageError
from testbed.method import SEQUENCE_CLASSIFICATION
from testbed.model import blocks
from testbed.model.adapters import LoraShape
from testbed.model.sparse import SparseShape, _Product, matrices, mount_sparse, sparse_places, sparse_tensors
from tests.model import tiny

TARGETS = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_proj"), "bert": ("query", "dense")}


@pytest.fixture
def base_of(tmp_path):
    def saved(architecture):
        model = tiny.make(architecture, SEQUENCE_CLASSIFICATION)
        return tiny.open_base(tiny.save(model, tmp_path / architecture), SEQUENCE_CLASSIFICATION)

    return saved


def drawn(shape, sparse):
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randn(len(zero), generator=draw) * 0.3 for name, zero in sparse_tensors(shape, sparse).items()}


@pytest.mark.parametrize("architecture", TARGETS)
def test_it_computes_what_the_changed_weights_do(architecture, base_of):
    base = base_of(architecture)
    sparse = SparseShape(LoraShape(2, TARGETS[architecture]))
    values, places = drawn(base.shape, sparse), dict(sparse_places(base.shape, sparse, 7))
    mounted, changed = tiny.built_from(base), tiny.built_from(base)
    before = tiny.logits(mounted.model)
    mount_sparse(mounted, sparse)
    assert torch.equal(tiny.logits(mounted.model), before)
    mounted.fill({**values, **places})
    for name, change in matrices(values, base.shape, sparse, 7):
        linear = changed.model.get_submodule(name)
        linear.weight.data += change.T if blocks.transposed(linear) else change
    torch.testing.assert_close(tiny.logits(mounted.model), tiny.logits(changed.model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, tiny.logits(changed.model), atol=1e-3)


def test_its_gradients_are_those_of_the_product():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    values = torch.randn(6, generator=draw, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([0, 3, 7, 11, 12, 19])
    assert torch.autograd.gradcheck(lambda *of: _Product.apply(*of, places, 5), (x, values))


def test_a_half_precision_model_keeps_its_type(base_of):
    base = base_of("llama")
    sparse = SparseShape(LoraShape(2, TARGETS["llama"]))
    built = tiny.built_from(base, dtype="bfloat16")
    mount_sparse(built, sparse)
    built.fill({**drawn(base.shape, sparse), **dict(sparse_places(base.shape, sparse, 7))})
    logits = built.model(**tiny.batch()).logits
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    trained = {name: value for name, value in built.trainable().items() if name.endswith(".sparse")}
    assert trained.keys() == sparse_tensors(base.shape, sparse).keys()
    assert all(value.grad is not None and value.dtype == torch.float32 for value in trained.values())


def test_places_are_as_many_as_loras_parameters_or_all_each_once_and_follow_the_seed(base_of):
    shape = base_of("llama").shape
    few, all_of_them = (SparseShape(LoraShape(rank, ("q_proj",))) for rank in (2, 16))
    name = "model.layers.1.self_attn.q_proj.sparse_at"
    first, again, other = (dict(sparse_places(shape, few, seed))[name] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first) == 2 * (16 + 16)
    assert torch.equal(first, first.unique())
    assert not torch.equal(first, dict(sparse_places(shape, few, 1))["model.layers.2.self_attn.q_proj.sparse_at"])
    assert torch.equal(dict(sparse_places(shape, all_of_them, 1))[name], torch.arange(16 * 16))


def test_a_model_without_such_a_map_is_refused(base_of):
    with pytest.raises(UsageError, match="no linear map of the kept blocks is called nowhere"):
        mount_sparse(tiny.built_from(base_of("llama")), SparseShape(LoraShape(2, ("nowhere",))))
