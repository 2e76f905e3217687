"""A submodel computes what the original does with the other blocks, or parts, taken out."""

import gc
import itertools
import weakref
from pathlib import Path

import pytest
import torch

from testbed.errors import ModelError, UsageError, WireError
from testbed.method import (
    ATTENTION,
    CAUSAL_LM,
    FEED_FORWARD,
    HOLDINGS,
    SEQUENCE_CLASSIFICATION,
    STREAMED,
    Block,
    Submodel,
    Workload,
)
from testbed.model import blocks
from testbed.model.held import HeldWeights
from testbed.model.submodel import build
from tests.model import tiny

EVERY_CASE = pytest.mark.parametrize(("architecture", "task"), tiny.CASES)


@pytest.fixture
def opened(tmp_path):
    """Save a random model and open it; gives the original and the base model."""

    def open_one(architecture, task, **changes):
        model = tiny.make(architecture, task, **changes)
        return model, tiny.open_base(tiny.save(model, tmp_path / "model"), task)

    return open_one


@EVERY_CASE
@pytest.mark.parametrize("holding", HOLDINGS)
def test_all_blocks_compute_what_the_original_does(opened, architecture, task, holding):
    model, base = opened(architecture, task)
    built = tiny.built_from(base, holding=holding)
    assert torch.equal(tiny.logits(built.model), tiny.logits(model))


@EVERY_CASE
def test_any_kept_subset_equals_the_original_with_identities(tmp_path, opened, architecture, task):
    model, base = opened(architecture, task)
    state = model.state_dict()
    for count in range(1, 4):
        for kept in itertools.combinations(range(4), count):
            original = tiny.make(architecture, task)
            original.load_state_dict(state)
            expected = tiny.logits(tiny.skip_blocks(original, kept))
            built = tiny.built_from(base, tiny.of(*kept), holding=HOLDINGS[count % 3])
            assert torch.equal(tiny.logits(built.model), expected), kept


@EVERY_CASE
@pytest.mark.parametrize("holding", HOLDINGS)
def test_bfloat16_equals_the_original_in_bfloat16(opened, architecture, task, holding):
    model, base = opened(architecture, task)
    built = tiny.built_from(base, dtype="bfloat16", holding=holding)
    loaded = type(model).from_pretrained(base.folder, dtype=torch.bfloat16)
    assert torch.equal(tiny.logits(built.model), tiny.logits(loaded))


def silence(block, part, architecture):
    """Make a part of an original block contribute nothing, by what the architecture itself computes."""
    names = blocks.part_names(block, post_norm=architecture in tiny.ENCODERS)[part]
    if architecture not in tiny.ENCODERS:
        hook = (lambda *a: (a[-1][0] * 0, None)) if part == ATTENTION else (lambda *a: a[-1] * 0)
        block.get_submodule(names[-1]).register_forward_hook(hook)
        return
    sums = {
        ("distilbert", ATTENTION): ("attention", "sa_layer_norm"),
        ("distilbert", FEED_FORWARD): ("ffn", "output_layer_norm"),
    }.get((architecture, part))
    if sums:
        zero = (lambda *a: (a[-1][0] * 0, None)) if part == ATTENTION else (lambda *a: a[-1] * 0)
        block.get_submodule(sums[0]).register_forward_hook(zero)
        block.get_submodule(sums[1]).register_forward_hook(lambda module, inputs, output: inputs[0])
    elif part == ATTENTION:
        block.attention.register_forward_hook(lambda module, inputs, output: (inputs[0], None))
    else:
        block.output.register_forward_hook(lambda module, inputs, output: inputs[1])


@EVERY_CASE
@pytest.mark.parametrize("part", [ATTENTION, FEED_FORWARD])
def test_a_dropped_part_contributes_nothing_and_has_no_weights(opened, architecture, task, part):
    model, base = opened(architecture, task)
    silence(blocks.find(model).blocks[1], part, architecture)
    other = FEED_FORWARD if part == ATTENTION else ATTENTION
    kept = Submodel((Block(0), Block(1, parts=(other,)), Block(2), Block(3)))
    built = tiny.built_from(base, kept)
    assert torch.equal(tiny.logits(built.model), tiny.logits(model))
    expected = base.shape.block_elements[1] - base.shape.part_elements[1][part]
    assert blocks.elements(built.block_modules[1]) == expected


@EVERY_CASE
def test_a_block_without_parts_is_the_identity(opened, architecture, task):
    _, base = opened(architecture, task)
    empty = Submodel((Block(0), Block(1, parts=()), Block(2)))
    with_empty = tiny.built_from(base, empty)
    assert torch.equal(tiny.logits(with_empty.model), tiny.logits(tiny.built_from(base, tiny.of(0, 2)).model))


def gradients(built):
    """Gradients of writable blocks' weights and of the head, by canonical name."""
    output = built.model(**tiny.batch())
    output.logits.float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in built.trainable().items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "bert", "distilbert"])
def test_streaming_with_checkpointing_gives_the_same_gradients(opened, architecture):
    _, base = opened(architecture, SEQUENCE_CLASSIFICATION)
    found = []
    for holding, checkpointing in (("resident", False), ("resident", True), ("streamed", True)):
        built = tiny.built_from(base, holding=holding, checkpointing=checkpointing)
        built.make_writable(1)
        turn_off_dropout(built.model)
        found.append(gradients(built))
    assert found[0]
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)


def turn_off_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for module in model.modules():
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def test_streaming_holds_one_block_at_a_time(opened):
    _, base = opened("llama", CAUSAL_LM)
    built = tiny.built_from(base, holding=STREAMED, checkpointing=True)
    built.make_writable(0)
    weights = []  # of every filling, as long as anything refers to it
    alive = []

    def look(module, _):
        weights.append(weakref.ref(module.up_proj.weight))
        alive.append(sum(weight() is not None for weight in weights))

    for position in (1, 2, 3):
        built.block_modules[position].mlp.register_forward_pre_hook(look)
    built.model(**tiny.batch()).logits.sum().backward()
    assert len(alive) == 6  # forward and recomputation of three blocks
    assert max(alive) == 1
    gc.collect()
    assert all(weight() is None for weight in weights)


def test_a_block_that_its_method_streams_is_there_with_the_next_one_only(opened):
    _, base = opened("llama", CAUSAL_LM)
    whole = tiny.built_from(base)
    expected = whole.model(**tiny.batch()).logits
    built = tiny.built_from(base, Submodel(tuple(Block(p, streamed=p < 3) for p in range(4))))
    alive = {}

    def look(position):
        def hook(*_):
            waiting = [p for p in (0, 1, 2) if built.streamed[p]._reading is not None]
            there = [p for p in (0, 1, 2) if built.streamed[p]._depth]
            alive[position] = (there, waiting)

        return hook

    for position in range(4):
        built.block_modules[position].mlp.register_forward_pre_hook(look(position))
    for _ in range(2):  # what was read ahead in one pass is used up in it
        assert torch.equal(built.model(**tiny.batch()).logits, expected)
    assert alive == {0: ([0], [1]), 1: ([1], [2]), 2: ([2], []), 3: ([], [])}


def test_training_through_streamed_blocks_needs_checkpointing(opened):
    _, base = opened("llama", CAUSAL_LM)
    built = tiny.built_from(base, holding=STREAMED)
    built.make_writable(0)
    with pytest.raises(UsageError, match="gradient checkpointing"):
        built.model(**tiny.batch())


def test_names_are_those_of_the_original_model(opened):
    _, base = opened("llama", CAUSAL_LM)
    built = tiny.built_from(base, Submodel((Block(1), Block(3, parts=(ATTENTION,)))))
    name = "model.layers.3.self_attn.q_proj.weight"
    assert built.local(name) == "model.layers.1.self_attn.q_proj.weight"
    assert built.canonical("model.layers.1.self_attn.q_proj.weight") == name
    assert built.local("model.layers.2.self_attn.q_proj.weight") is None
    assert built.local("model.layers.3.mlp.up_proj.weight") is None
    assert built.local("lm_head.weight") == "lm_head.weight"
    assert tuple(built.block_modules) == (1, 3)


def test_fill_copies_values_and_refuses_what_does_not_fit(opened):
    _, base = opened("llama", CAUSAL_LM)
    built = tiny.built_from(base, tiny.of(1, 3))
    value = torch.full((16, 16), 0.5)
    built.fill({"model.layers.3.self_attn.q_proj.weight": value, "model.layers.0.self_attn.q_proj.weight": value})
    assert torch.equal(built.block_modules[3].self_attn.q_proj.weight, value)
    with pytest.raises(WireError, match="no place"):
        built.fill({"model.layers.3.self_attn.q_proj.lora_A.weight": value})
    with pytest.raises(WireError, match="shape"):
        built.fill({"model.norm.weight": value})


def test_base_weights_are_frozen_and_the_new_head_is_not(tmp_path):
    folder = tiny.save(tiny.make("llama", CAUSAL_LM), tmp_path / "model")
    base = tiny.open_base(folder, SEQUENCE_CLASSIFICATION)
    built = tiny.built_from(base)
    assert list(built.trainable()) == ["score.weight"] == list(built.head_names)
    assert built.model.training
    assert torch.equal(built.trainable()["score.weight"], base.new_head(5)["score.weight"])
    assert not torch.equal(base.new_head(5)["score.weight"], base.new_head(6)["score.weight"])


def test_a_head_can_stay_frozen(tmp_path):
    folder = tiny.save(tiny.make("bert", SEQUENCE_CLASSIFICATION).base_model, tmp_path / "model")
    base = tiny.open_base(folder, SEQUENCE_CLASSIFICATION)
    work = Workload(task=base.task, labels=base.labels)
    kept = base.fill_in(tiny.of(0))
    built = build(base.config, kept, base.store.path, base.outside, work, trainable_head=False, seed=0)
    assert built.head_names == ("classifier.weight", "classifier.bias")
    assert built.trainable() == {}


def test_close_lets_go_of_all_but_what_was_trained(opened):
    _, base = opened("llama", CAUSAL_LM)
    built = tiny.built_from(base)
    built.make_writable(2)
    built.close()
    trained = sum(parameter.nbytes for parameter in built.trainable().values())
    assert sum(parameter.nbytes for parameter in built.model.parameters()) == trained > 0


def test_weights_that_are_held_for_the_next_job_are_never_written_to(opened):
    _, base = opened("llama", CAUSAL_LM)
    held = HeldWeights()
    kept = base.fill_in(tiny.of(1))
    work = Workload(task=CAUSAL_LM)
    before = tiny.logits(build(base.config, kept, base.store.path, base.outside, work, seed=0, read=held.read).model)
    changed = build(base.config, kept, base.store.path, base.outside, work, seed=0, read=held.read)
    changed.fill({"model.layers.1.self_attn.q_proj.weight": torch.zeros(16, 16), "model.norm.weight": torch.zeros(16)})
    changed.make_writable(1)
    with torch.no_grad():
        changed.block_modules[1].mlp.up_proj.weight.zero_()
    changed.close()
    read = read_bytes()
    again = build(base.config, kept, base.store.path, base.outside, work, seed=0, read=held.read)
    assert read_bytes() - read < 16_000  # headers alone
    assert torch.equal(tiny.logits(again.model), before)


@pytest.mark.parametrize("positions", [(2, 1), (0, 0), (0, 4)])
def test_positions_that_are_not_a_subset_are_refused(opened, positions):
    _, base = opened("llama", CAUSAL_LM)
    with pytest.raises(ModelError, match="in their order"):
        build(base.config, tiny.of(*positions), base.store.path, base.outside, Workload(task=CAUSAL_LM), seed=0)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_other_types_are_refused(opened, dtype):
    _, base = opened("llama", CAUSAL_LM)
    with pytest.raises(ModelError, match="float32 or bfloat16"):
        tiny.built_from(base, dtype=dtype)


def read_bytes():
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_reading_some_blocks_costs_the_bytes_of_those_blocks(opened, kept):
    _, base = opened("llama", CAUSAL_LM, hidden_size=128, intermediate_size=512)
    paths = [base.store.path(content) for content in [base.outside, *base.blocks[:kept]]]
    expected = sum(path.stat().st_size for path in paths)
    tiny.built_from(base, tiny.of(0))  # imports are behind us
    before = read_bytes()
    tiny.built_from(base, tiny.of(*range(kept)))
    assert expected <= read_bytes() - before < expected * 1.05


def test_weights_of_dropped_parts_are_never_read(opened):
    _, base = opened("llama", CAUSAL_LM, hidden_size=128, intermediate_size=512)
    kept = Submodel((Block(0, parts=(ATTENTION,)),))
    tiny.built_from(base, kept)
    elements = base.shape.block_elements[0] - base.shape.part_elements[0][FEED_FORWARD] + base.shape.outside_elements
    before = read_bytes()
    tiny.built_from(base, kept)
    assert read_bytes() - before < elements * 4 * 1.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("holding", HOLDINGS)
def test_blocks_are_read_onto_the_gpu(opened, holding):
    model, base = opened("llama", CAUSAL_LM)
    built = tiny.built_from(base, holding=holding, accelerator="cuda")
    built.model.eval()
    with torch.no_grad():
        found = built.model(**{name: value.cuda() for name, value in tiny.batch().items()}).logits.cpu()
    torch.testing.assert_close(found, tiny.logits(model), rtol=1e-3, atol=1e-3)
