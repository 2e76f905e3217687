"""Each measure against a computation of its own: one sequence at a time, or the run's own evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import testbed
from testbed.data import DataSpec, load_data
from testbed.data_sources import alpaca_prompt
from testbed.errors import DataError
from testbed.evaluation import generation, perplexity
from testbed.evaluation.likelihood import losses, span_of
from testbed.evaluation.perplexity import Text, windows
from testbed.evaluation.subject import of_run
from testbed.task import evaluate_batches
from tests.evaluation.conftest import LABELLED, WORDS
from tests.evaluation.made_runs import CONTEXT, make_run, write_rows


@pytest.fixture(scope="module")
def language(lab):
    """The language model of the lab, and its tokenizer."""
    subject = of_run(lab / "runs", "lora-language")
    return subject.tuned(), subject.tokenizer


def greedily(model, ids, count):
    """The next tokens, each from a whole forward."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids


@given(st.integers(1, 40), st.integers(1, 60), st.integers(2, 30), st.data())
def test_windows_count_every_token_once_and_feed_no_more_than_the_model_takes(context, counted, most, data):
    stride = data.draw(st.integers(1, most))
    fitted = perplexity._fitted(Text(tuple(range(context + counted)), context, 1), most)
    seen = []
    for span in windows(fitted, most, stride):
        assert 1 <= len(span.tokens) - 1 <= most
        seen += span.tokens[span.counted :]
    assert seen == list(range(context, context + counted))


def test_losses_of_a_batch_are_those_of_each_text_alone(language):
    model, _ = language
    spans = [span_of(range(3, 3 + n), range(50, 50 + m), CONTEXT)[0] for n, m in ((1, 1), (9, 3), (40, 17), (2, 30))]
    for found, span in zip(losses(model, spans, 3), spans, strict=True):
        with torch.no_grad():
            table = model(torch.tensor([span.tokens])).logits[0].log_softmax(-1)
        alone = -sum(float(table[at - 1, span.tokens[at]]) for at in range(span.counted, len(span.tokens)))
        assert found == pytest.approx(alone, rel=1e-5)


def test_a_context_too_long_loses_its_left_end_and_an_answer_too_long_is_refused():
    span, cut = span_of(range(100), (7, 8), 10)
    assert (span.tokens, span.counted, cut) == ((*range(91, 100), 7, 8), 9, True)
    with pytest.raises(DataError, match="longer than the 10"):
        span_of([1], range(11), 10)
    with pytest.raises(DataError, match="no token of its own"):
        span_of([1], [], 10)


def test_generation_is_greedy_whether_or_not_prompts_are_of_one_length(language):
    model, tokenizer = language
    prompts = [tokenizer(text)["input_ids"] for text in ("Return the", "Compute the mean of an array along", "If")]
    rules = generation.Rules(new_tokens=6, stops=())
    assert generation.keeps_cache(model, prompts[1])
    texts = [made.text for made in generation.generate(model, tokenizer, prompts, rules, 3)]
    assert texts == [tokenizer.decode(greedily(model, ids, 6)[len(ids) :], skip_special_tokens=True) for ids in prompts]


def test_a_model_with_a_soft_prompt_is_asked_without_a_cache_and_has_less_room(lab, evaluate):
    folder = make_run(lab, "fedprompt-measured", "fedprompt")
    model, tokenizer = testbed.load(folder.path), of_run(lab / "runs", folder.run_id).tokenizer
    ids = tokenizer("Return the")["input_ids"]
    assert not generation.keeps_cache(model, ids)
    goes_on = tokenizer.decode(greedily(model, ids, 4)[len(ids) :])
    path = write_rows(lab / "asked.jsonl", [{"question": "Return the", "answer": goes_on}])
    words = (folder.run_id, "--data", path, "--as", "exact_match", "--prompt", "{question}", "--no-base")
    assert evaluate(*words, "--max-new-tokens", "4")["figures"]["exact_match"]["value"] == 1
    assert f"from 2 to {CONTEXT - 20} tokens" in evaluate(*words, "--length", str(CONTEXT - 19), code=2)


@pytest.mark.parametrize(
    ("text", "options", "right"),
    [
        (" Seven. ", {}, False),
        (" seven\n", {}, True),
        ("Seven", {"ignore_case": True}, True),
        ("It is so. #### seven", {"extract": r"#### (\w+)"}, True),
        ("It is seven", {"extract": r"#### (\w+)"}, False),
        ("se,ven", {"ignore": (",",)}, True),
        ("7", {}, True),
    ],
)
def test_texts_match_after_extraction_and_what_is_ignored(text, options, right):
    rules = generation.Rules(**options)
    item = generation.Asked("", ("#### seven" if "extract" in options else "seven", "7"))
    assert generation._matches(rules, rules.extracted(text), item) is right


def test_a_stop_text_ends_the_answer(language):
    model, tokenizer = language
    ids = tokenizer("Return the")["input_ids"]
    whole = tokenizer.decode(greedily(model, ids, 8)[len(ids) :])
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    [made] = generation.generate(model, tokenizer, [ids], generation.Rules(8, (stop,)), 1)
    assert (made.text, made.cut) == (whole.partition(stop)[0], False)


def test_how_often_each_model_was_cut_short_stands_beside_its_figure(lab, evaluate):
    path = write_rows(lab / "open.jsonl", [{"question": "Return the " + word, "answer": "x"} for word in WORDS[:4]])
    found = evaluate("lora-language", "--data", path, "--as", "exact_match", "--max-new-tokens", "1")
    assert found["notes"] == found["base_notes"] == {"ended_by_max_new_tokens": 4}


def test_a_classifier_has_the_accuracy_and_loss_of_the_runs_own_evaluation(lab, evaluate):
    found = evaluate(
        "lora-classes", "--data", lab / "labelled.jsonl", "--data-set", "text=body", "--data-set", "label=kind"
    )
    subject = of_run(lab / "runs", "lora-classes")
    spec = DataSpec(
        str(lab / "labelled.jsonl"), columns={"text": "body", "label": "kind"}, length=32,
        held_out=str(lab / "labelled.jsonl"),
    )  # fmt: skip
    shard = load_data(spec, subject.tokenizer, lab / "cache").held_out_shard()
    quality = evaluate_batches(subject.tuned(), shard, 16, 32, 0)
    assert found["figures"]["accuracy"]["value"] == pytest.approx(quality.accuracy)
    assert found["figures"]["loss"]["value"] == pytest.approx(quality.loss, rel=1e-5)
    most = max([row["kind"] for row in LABELLED].count(kind) for kind in ("numbers", "plots", "tables"))
    assert found["reference"] == {"majority_class": most / len(LABELLED)}
    assert found["base"]["loss"]["value"] != found["figures"]["loss"]["value"]


def test_the_perplexity_of_responses_is_the_exponential_of_the_runs_own_loss(lab, evaluate):
    rows = [{"instruction": f"Name {n} things.", "input": "", "response": "an array " * n} for n in range(1, 9)]
    path = write_rows(lab / "instructions.jsonl", rows)
    found = evaluate("lora-language", "--data", path, "--as", "perplexity", "--data-set", "template=alpaca")
    subject = of_run(lab / "runs", "lora-language")
    spec = DataSpec(str(path), "causal_lm", template="alpaca", length=CONTEXT, held_out=str(path))
    shard = load_data(spec, subject.tokenizer, lab / "cache").held_out_shard()
    quality = evaluate_batches(subject.tuned(), shard, 4, CONTEXT, 0)
    assert found["figures"]["perplexity"]["value"] == pytest.approx(math.exp(quality.loss), rel=1e-5)
    counted = sum(length - int(start) for length, start in zip(shard.lengths, shard.targets, strict=True))
    bits = quality.loss * counted / math.log(2) / sum(len(row["response"].encode()) for row in rows)
    assert found["figures"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert found["definition"]["counted"] == "the response and what closes it"


def test_choices_behind_a_template_are_tokenised_as_in_training(lab, evaluate, language):
    model, tokenizer = language
    choices = ["two", "three", "an array"]
    opening = tokenizer(alpaca_prompt("Add 1 to 1."))["input_ids"]
    answers = [tokenizer(choice)["input_ids"] for choice in choices]
    nats = losses(model, [span_of(opening, answer, CONTEXT)[0] for answer in answers], 1)
    best = nats.index(min(nats))
    path = write_rows(lab / "one.jsonl", [{"question": "Add 1 to 1.", "choices": choices, "answer": best}])
    found = evaluate("lora-language", "--data", path, "--as", "multiple_choice", "--data-set", "template=alpaca")
    assert found["figures"]["accuracy"]["value"] == 1
    assert found["definition"]["prompt"] == "template=alpaca"
