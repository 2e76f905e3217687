"""Examples, shards, batches, loss and quality."""

import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from testbed.errors import DataError, WireError
from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION
from testbed.task import (
    NOT_COUNTED,
    Example,
    Quality,
    Shard,
    batch_indices,
    evaluate_batches,
    logits,
    loss,
    shuffled,
    write_shard,
)

CLASSES = [Example([5, 6, 7, 2], 0), Example([8, 2], 2), Example([9, 10, 11, 12, 13, 2], 2)]
TEXTS = [Example([5, 6, 7, 2]), Example([8, 9, 10, 2], loss_from=2), Example([3, 2])]
LLAMA = LlamaConfig(
    vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
    num_labels=3, max_position_embeddings=32,
)  # fmt: skip


def model_of(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


# ── shards ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("examples", "task", "labels", "counts"),
    [(CLASSES, SEQUENCE_CLASSIFICATION, 3, (1, 0, 2)), (TEXTS, CAUSAL_LM, 0, ())],
)
def test_a_shard_comes_back_as_it_was_written(tmp_path, examples, task, labels, counts):
    path = tmp_path / "shard.safetensors"
    digest = write_shard(path, examples, task, labels)
    shard = Shard.open(path)
    assert (len(shard), shard.task, shard.labels, shard.label_counts) == (3, task, labels, counts)
    assert shard.lengths == [len(example.ids) for example in examples]
    assert shard.tokens == sum(shard.lengths)
    assert write_shard(tmp_path / "again.safetensors", examples, task, labels) == digest
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.safetensors", "shard.safetensors"]


def test_a_shard_is_held_in_private_memory(tmp_path):
    path = tmp_path / "shard.safetensors"
    write_shard(path, TEXTS, CAUSAL_LM)
    shard = Shard.open(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert shard.batch([0], 8, 0).input_ids.tolist() == [[5, 6, 7, 2]]


@pytest.mark.parametrize(
    ("examples", "task", "labels", "message"),
    [
        ([], CAUSAL_LM, 0, "at least one example"),
        ([Example([])], CAUSAL_LM, 0, "example 0 has no token"),
        ([Example([1], 3)], SEQUENCE_CLASSIFICATION, 3, "label 3 is not one of the 3 classes"),
        ([Example([1])], SEQUENCE_CLASSIFICATION, 3, "label None"),
        ([Example([1], 0)], "translation", 3, "'translation' is not known"),
    ],
)
def test_what_is_no_shard_is_not_written(tmp_path, examples, task, labels, message):
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "shard", examples, task, labels)
    assert list(tmp_path.iterdir()) == []


def arrays(**changes):
    whole = {
        "input_ids": np.array([5, 6, 2, 7, 2], np.int32),
        "offsets": np.array([0, 3, 5], np.int64),
        "labels": np.array([0, 1], np.int64),
    }
    return {name: array for name, array in {**whole, **changes}.items() if array is not None}


ABOUT = {"shard": json.dumps({"format": 1, "task": SEQUENCE_CLASSIFICATION, "labels": 2})}


@pytest.mark.parametrize(
    ("changes", "about", "message"),
    [
        ({}, {}, "not a shard"),
        ({}, None, "not a shard"),
        ({}, {"shard": "{"}, "not a shard"),
        ({}, {"shard": "[]"}, "missing or wrong"),
        ({}, {"shard": '{"task": "images", "labels": 2}'}, "missing or wrong"),
        ({"labels": None}, ABOUT, "missing or wrong"),
        ({"input_ids": np.array([5, 6, 2, 7, 2], np.int64)}, ABOUT, "int32 tokens"),
        ({"input_ids": np.array([[5, 6, 2, 7, 2]], np.int32)}, ABOUT, "flat"),
        ({"offsets": np.array([0, 3, 6], np.int64)}, ABOUT, "offsets"),
        ({"offsets": np.array([1, 3, 5], np.int64)}, ABOUT, "offsets"),
        ({"offsets": np.array([0, 5, 5], np.int64)}, ABOUT, "offsets"),
        ({"offsets": np.array([0], np.int64), "input_ids": np.array([], np.int32)}, ABOUT, "offsets"),
        ({"labels": np.array([0], np.int64)}, ABOUT, "2 examples, but 1 labels"),
        ({"labels": np.array([0, 2], np.int64)}, ABOUT, "out of range"),
        ({"labels": np.array([0, -1], np.int64)}, ABOUT, "out of range"),
        ({"input_ids": np.array([5, -6, 2, 7, 2], np.int32)}, ABOUT, "out of range"),
    ],
)
def test_a_file_whose_arrays_do_not_belong_together_is_refused(tmp_path, changes, about, message):
    path = tmp_path / "shard"
    save_file(arrays(**changes), path, metadata=about)
    with pytest.raises(WireError, match=message):
        Shard.open(path)


def test_every_truncation_and_a_missing_file_are_refused(tmp_path):
    path = tmp_path / "shard"
    with pytest.raises(WireError, match="no such file"):
        Shard.open(path)
    write_shard(path, CLASSES, SEQUENCE_CLASSIFICATION, 3)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(WireError, match="damaged"):
            Shard.open(path)


# ── batches ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_batches_are_right_padded_to_the_longest_or_exactly():
    shard = Shard.of(CLASSES, SEQUENCE_CLASSIFICATION, 3)
    batch = shard.batch([0, 1], 8, 19)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [8, 2, 19, 19]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [0, 2]
    assert batch.tokens == 6
    assert shard.batch([0, 1], 8, 19, exact=True).input_ids.shape == (2, 8)
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}


def test_a_cut_keeps_the_closing_token_for_classification_only():
    assert Shard.of(CLASSES, SEQUENCE_CLASSIFICATION, 3).batch([2], 4, 0).input_ids.tolist() == [[9, 10, 11, 2]]
    assert Shard.of(TEXTS, CAUSAL_LM).batch([1], 3, 0).input_ids.tolist() == [[8, 9, 10]]


def test_only_the_response_counts_and_no_padding_does():
    batch = Shard.of(TEXTS, CAUSAL_LM).batch([0, 1, 2], 8, 0)
    nothing = NOT_COUNTED
    assert batch.labels.tolist() == [
        [nothing, 6, 7, 2],
        [nothing, nothing, 10, 2],
        [nothing, 2, nothing, nothing],
    ]


@pytest.mark.parametrize(("examples", "size"), [(10, 3), (7, 7), (5, 8), (1, 4), (64, 8)])
def test_a_pass_shows_every_example_once(examples, size):
    steps = math.ceil(3 * examples / size) if size < examples else 3
    seen = [i for step in range(steps) for i in batch_indices(examples, size, 1, 2, 3, step)]
    for start in range(0, 3 * examples, examples):
        assert sorted(seen[start : start + examples]) == list(range(examples))


def test_the_draw_depends_on_seed_round_client_and_step_only():
    first = batch_indices(100, 8, 1, 2, 3, 4)
    assert batch_indices(100, 8, 1, 2, 3, 4) == first
    others = [(2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)]
    assert all(batch_indices(100, 8, *other) != first for other in others)


def test_the_draw_is_the_same_on_every_machine():
    assert batch_indices(10, 4, 0, 0, 0, 0) == [8, 9, 4, 2]
    assert shuffled(6, "key", 1) == [0, 3, 2, 4, 1, 5]


# ── loss and quality ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LlamaForSequenceClassification, LLAMA),
        (
            GPT2ForSequenceClassification,
            GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0, num_labels=3),
        ),
        (
            BertForSequenceClassification,
            BertConfig(
                vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                num_labels=3,
            ),
        ),
    ],
)  # fmt: skip
def test_classification_loss_is_that_of_transformers(kind, config):
    model = model_of(kind, config)
    batch = Shard.of(CLASSES, SEQUENCE_CLASSIFICATION, 3).batch([0, 1, 2], 8, 0)
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(loss(model, batch, SEQUENCE_CLASSIFICATION), theirs)


@pytest.mark.parametrize(
    ("kind", "config"),
    [(LlamaForCausalLM, LLAMA), (GPT2LMHeadModel, GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2))],
)
def test_causal_lm_loss_is_that_of_transformers(kind, config):
    model = model_of(kind, config)
    batch = Shard.of(TEXTS, CAUSAL_LM).batch([0, 1, 2], 8, 0)
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(loss(model, batch, CAUSAL_LM), theirs)


def test_logits_are_fp32_and_no_cache_is_kept():
    model = model_of(LlamaForCausalLM, LLAMA).to(torch.bfloat16)
    kept = []
    model.register_forward_hook(lambda _module, _args, output: kept.append(output.past_key_values))
    assert logits(model, Shard.of(TEXTS, CAUSAL_LM).batch([0], 8, 0)).dtype == torch.float32
    assert kept == [None]


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_gradient():
    model = model_of(LlamaForCausalLM, LLAMA)
    batch = Shard.of([Example([5, 6, 7, 8], loss_from=3)], CAUSAL_LM).batch([0], 3, 0)
    found = loss(model, batch, CAUSAL_LM)
    found.backward()
    assert found.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_quality_does_not_depend_on_the_batches():
    model = model_of(LlamaForCausalLM, LLAMA)
    shard = Shard.of(TEXTS, CAUSAL_LM)
    whole = evaluate_batches(model, shard, 3, 8, 0)
    single = evaluate_batches(model, shard, 1, 8, 0)
    assert single.loss == pytest.approx(whole.loss, rel=1e-5)
    assert (single.accuracy, single.examples) == (whole.accuracy, 3)
    assert whole.loss == pytest.approx(loss(model, shard.batch([0, 1, 2], 8, 0), CAUSAL_LM).item(), rel=1e-5)


def test_accuracy_is_the_share_of_right_classes():
    model = model_of(LlamaForSequenceClassification, LLAMA)
    shard = Shard.of(CLASSES, SEQUENCE_CLASSIFICATION, 3)
    answers = logits(model, shard.batch([0, 1, 2], 8, 0)).argmax(-1).tolist()
    model.train()
    found = evaluate_batches(model, shard, 2, 8, 0)
    assert found.accuracy == sum(a == e.label for a, e in zip(answers, CLASSES, strict=True)) / 3
    assert isinstance(found, Quality)
    assert model.training


def test_a_planted_task_is_learned():
    model = model_of(LlamaForSequenceClassification, LLAMA)
    shard = Shard.of([Example([5 + i % 3, 11, 2], i % 3) for i in range(24)], SEQUENCE_CLASSIFICATION, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(30):
        rows = batch_indices(len(shard), 8, 0, 0, 0, step)
        loss(model, shard.batch(rows, 8, 0), SEQUENCE_CLASSIFICATION).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert evaluate_batches(model, shard, 8, 8, 0).accuracy == 1.0


def test_batches_to_evaluate_on_are_of_like_length():
    lengths = Counter()
    model = model_of(LlamaForCausalLM, LLAMA)
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: lengths.update([tuple(kwargs["input_ids"].shape)]), with_kwargs=True
    )
    shard = Shard.of([Example([5] * n) for n in (9, 2, 9, 2, 2, 9)], CAUSAL_LM)
    evaluate_batches(model, shard, 3, 16, 0)
    assert lengths == {(3, 2): 1, (3, 9): 1}


def test_importing_the_task_needs_neither_torch_nor_numpy():
    code = "import sys, testbed.task; print({'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
