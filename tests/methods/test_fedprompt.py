"""FedPrompt: a prompt is what concatenating embeddings by hand is, in every architecture."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from methods.fedprompt import FedPrompt
from testbed.errors import UsageError
from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION
from testbed.model import blocks
from testbed.model.prompt import longest_text
from testbed.rounds import federate
from testbed.task import Batch
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import CLASSES, WORK, base_model, run_of
from tests.model import tiny
from tests.reference.driver import started

TOKENS = 5
CASES = [case for case in tiny.CASES if case[1] == CAUSAL_LM or case[0] in tiny.ENCODERS]


def opened(architecture, task, folder):
    tiny.save(tiny.make(architecture, task), folder / "model")
    return tiny.open_base(folder / "model", task)


@pytest.mark.parametrize(("architecture", "task"), CASES)
def test_a_prompt_is_concatenated_embeddings(architecture, task, tmp_path):
    base = opened(architecture, task, tmp_path)
    method, batch = FedPrompt(tokens=TOKENS), tiny.batch()
    tensors = method.start(base, WORK, [], 0, 1).tensors
    plain, built = tiny.built_from(base).model.eval(), tiny.built_from(base)
    method.mount(built, tensors)
    found, without = tiny.logits(built.model), tiny.logits(plain)

    first = 1 if architecture in tiny.ENCODERS else 0
    with torch.no_grad():
        embedded = plain.get_input_embeddings()(batch["input_ids"])
        prompt = tensors["prompt.weight"].expand(len(embedded), -1, -1)
        longer = torch.cat([embedded[:, :first], prompt, embedded[:, first:]], dim=1)
        mask = torch.cat([torch.ones(len(embedded), TOKENS, dtype=torch.int64), batch["attention_mask"]], dim=1)
        expected = plain(inputs_embeds=longer, attention_mask=mask).logits
    if task == CAUSAL_LM:
        expected, shown = expected[:, TOKENS:], batch["attention_mask"].bool()
        found, expected, without = found[shown], expected[shown], without[shown]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, without)


def test_a_padded_text_is_read_at_its_own_last_token(tmp_path):
    base = opened("llama", SEQUENCE_CLASSIFICATION, tmp_path)
    method, batch = FedPrompt(tokens=TOKENS), tiny.batch()
    built = tiny.built_from(base)
    method.mount(built, method.start(base, WORK, [], 0, 1).tensors)
    built.model.eval()
    batch["input_ids"][batch["attention_mask"] == 0] = built.pad_token_id
    with torch.no_grad():
        whole = built.model(**batch).logits
        kept = batch["input_ids"][1:2, : int(batch["attention_mask"][1].sum())]
        torch.testing.assert_close(whole[1:2], built.model(kept).logits)


@pytest.mark.parametrize(("architecture", "task"), [("llama", CAUSAL_LM), ("bert", SEQUENCE_CLASSIFICATION)])
def test_the_prompt_and_the_head_are_trained_and_nothing_else(architecture, task, tmp_path):
    base = opened(architecture, task, tmp_path)
    method = FedPrompt(tokens=TOKENS)
    built = tiny.built_from(base)
    tensors = method.start(base, WORK, [], 0, 1).tensors
    method.mount(built, tensors)
    ids, mask = tiny.batch().values()
    built.loss(Batch(ids, mask, ids if task == CAUSAL_LM else torch.tensor([0, 1, 2]))).backward()
    assert set(built.trainable()) == set(tensors) == {"prompt.weight", *base.head}
    assert all(parameter.grad.abs().max() > 0 for parameter in built.trainable().values())


def test_a_prompt_begins_as_embeddings_of_tokens_by_seed_or_as_small_numbers(tmp_path):
    base = base_model(tmp_path)
    one, again, other = (FedPrompt(tokens=TOKENS).start(base, WORK, [], seed, 1).tensors for seed in (1, 1, 2))
    rows = base.tensors(base.outside)["model.embed_tokens.weight"]
    for row in one["prompt.weight"]:
        assert (rows == row).all(1).any()
    assert torch.equal(one["prompt.weight"], again["prompt.weight"])
    assert not torch.equal(one["prompt.weight"], other["prompt.weight"])
    small = FedPrompt(tokens=TOKENS, initial="uniform").start(base, WORK, [], 1, 1).tensors["prompt.weight"]
    assert small.abs().max() <= 0.1 * 3**0.5  # this model's own spread


def test_what_travels_is_the_vectors_and_the_head(tmp_path):
    run = run_of(FedPrompt(tokens=TOKENS), tmp_path)
    hidden = run.base.shape.hidden
    assert sum(tensor.numel() for tensor in started(run).tensors.values()) == (TOKENS + CLASSES) * hidden


def test_the_export_says_all_that_is_needed_to_compute_the_same(tmp_path):
    run = run_of(FedPrompt(tokens=TOKENS), tmp_path, rounds=1, clients=1)
    state = federate(run)
    run.method.export(state, run.base, WORK, tmp_path / "export")
    about = json.loads((tmp_path / "export" / "prompt.json").read_text())
    stored = load_file(tmp_path / "export" / "prompt.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(
        about["base_model_name_or_path"], num_labels=about["labels"], ignore_mismatched_sizes=True
    ).eval()
    model.score.weight = torch.nn.Parameter(stored["score.weight"])
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    built = tiny.built_from(run.base)
    run.method.mount(built, state.tensors)
    built.model.eval()
    with torch.no_grad():
        embedded, first = model.get_input_embeddings()(ids), about["first"]
        prompt = stored["prompt.weight"].expand(3, -1, -1)
        hidden = model.model(inputs_embeds=torch.cat([embedded[:, :first], prompt, embedded[:, first:]], 1))[0]
        torch.testing.assert_close(model.score(hidden[:, -1]), built.model(ids).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2"])
def test_the_export_of_a_language_models_prompt_is_one_of_peft(architecture, tmp_path):
    base = opened(architecture, CAUSAL_LM, tmp_path)
    method, batch = FedPrompt(tokens=TOKENS), tiny.batch()
    state, built = method.start(base, WORK, [], 0, 1), tiny.built_from(base)
    method.export(state, base, replace(WORK, task=CAUSAL_LM), tmp_path / "export")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), tmp_path / "export").eval()
    method.mount(built, state.tensors)
    shown = batch["attention_mask"].bool()
    with torch.no_grad():
        found = model(**batch).logits[:, TOKENS:]
    torch.testing.assert_close(found[shown], tiny.logits(built.model)[shown])


@pytest.mark.parametrize(("architecture", "longest"), [("llama", 64), ("bert", 64), ("roberta", 62), ("gpt2", 64)])
def test_texts_and_prompt_together_are_as_long_as_the_model_has_positions_for(architecture, longest, tmp_path):
    config = {**tiny.CONFIGS[architecture], "model_type": architecture}
    shape = blocks.describe(config, SEQUENCE_CLASSIFICATION, tiny.LABELS)
    work = replace(WORK, length=longest - 20)
    assert longest_text(shape, work) == longest
    FedPrompt().check(shape, work)
    with pytest.raises(
        UsageError, match=f"setting tokens=21: with texts of {longest - 20} tokens .* the {longest} that"
    ):
        FedPrompt(tokens=21).check(shape, work)
    with pytest.raises(UsageError, match="setting tokens=0: expected at least 1"):
        FedPrompt(tokens=0).check(shape, work)
