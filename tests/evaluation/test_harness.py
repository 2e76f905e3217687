"""Two implementations of one definition: lm-evaluation-harness on tasks of our own, and `testbed evaluate --as …`."""

from __future__ import annotations

import pytest

from testbed.evaluation import harness
from testbed.evaluation.perplexity import Text, windows
from testbed.evaluation.subject import of_run
from tests.evaluation.conftest import CHOICES
from tests.evaluation.made_runs import make_run, write_rows

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness' own and those of its libraries

CHOICE_TASK = """\
task: own_choices
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
EXACT_TASK = """\
task: own_exact
dataset_path: json
dataset_kwargs: {data_files: {test: asked.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}
filter_list:
  - name: word
    filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]
metric_list: [{metric: exact_match}]
"""
ROLLING_TASK = """\
task: own_texts
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
GROUP = """\
group: own_group
task: [own_choices]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
QUESTIONS = [f"{verb} the {noun}" for verb in ("Return", "Compute", "Plot") for noun in ("array", "mean of", "axis")]


@pytest.fixture(scope="module")
def suites(lab):
    """The three definitions beside their data; half of the answers are what the model says."""
    import datasets

    subject = of_run(lab / "runs", "lora-language")
    from testbed.evaluation.generation import Rules, generate

    ids = [subject.tokenizer(question)["input_ids"] for question in QUESTIONS]
    rules = Rules(6, ("\n\n",), r"([a-z]+)")
    said = [rules.extracted(made.text) for made in generate(subject.tuned(), subject.tokenizer, ids, rules, 1)]
    assert all(said)
    rows = [
        {"question": question, "answer": word if place % 2 else "nothing"}
        for place, (question, word) in enumerate(zip(QUESTIONS, said, strict=True))
    ]
    write_rows(lab / "asked.jsonl", rows)
    for name, text in (("choice", CHOICE_TASK), ("exact", EXACT_TASK), ("rolling", ROLLING_TASK)):
        (lab / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(lab / "datasets"))
        yield lab


@pytest.fixture
def figures(suites, evaluate):
    def run(*words):
        found = evaluate("lora-language", *words)
        return found["figures"], found["base"], found["difference"]

    return run


@pytest.mark.slow
@pytest.mark.beside
def test_the_harness_and_we_find_the_same(suites, figures):
    tasks = ("--suite", "own_choices,own_exact,own_texts", "--suites-folder", suites)
    theirs = figures(*tasks)
    choices = figures("--data", suites / "choices.jsonl", "--as", "multiple_choice")
    exact = figures(
        "--data", suites / "asked.jsonl", "--as", "exact_match", "--prompt", "{question}", "--max-new-tokens", "6",
        "--extract", "([a-z]+)",
    )  # fmt: skip
    texts = figures("--data", suites / "texts.jsonl", "--as", "perplexity")
    for of_tuned_and_base in range(2):
        found, ours = theirs[of_tuned_and_base], choices[of_tuned_and_base]
        assert found["own_choices acc"] == ours["accuracy"]
        assert found["own_choices acc_norm"] == ours["accuracy_per_character"]
        assert found["own_choices acc_bytes"] == ours["accuracy_per_byte"]
        assert found["own_exact exact_match (word)"] == exact[of_tuned_and_base]["exact_match"]
        bits = texts[of_tuned_and_base]["bits_per_byte"]["value"]
        assert found["own_texts bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert theirs[2]["own_choices acc"] == choices[2]["accuracy"]
    assert theirs[0]["own_exact exact_match (word)"]["value"] == pytest.approx(4 / 9)
    assert theirs[0]["own_choices acc"]["count"] == len(CHOICES)


def test_windows_are_those_of_the_harness():
    from lm_eval.utils import get_rolling_token_windows

    for length in (1, 7, 8, 9, 16, 17, 40):
        tokens = tuple(range(1, length + 1))
        ours = [(span.tokens[:-1], span.tokens[span.counted :]) for span in windows(Text((0, *tokens), 1, 1), 8, 8)]
        theirs = [(tuple(fed), tuple(said)) for fed, said in get_rolling_token_windows(list(tokens), 0, 8, 1)]
        assert [(fed[-8:], said) for fed, said in ours] == [(fed[-8:], said) for fed, said in theirs]


def test_a_limit_a_group_and_a_single_model_are_asked_for(suites, evaluate):
    (suites / "group.yaml").write_text(GROUP)
    found = evaluate("lora-language", "--suite", "own_group", "--suites-folder", suites, "--limit", "5", "--no-base")
    assert found["figures"]["own_choices acc"]["count"] == 5
    of_group = found["figures"]["own_group acc"]
    assert (of_group["value"], of_group["count"]) == (found["figures"]["own_choices acc"]["value"], 5)
    assert of_group["low"] <= of_group["value"] <= of_group["high"]
    assert (found["base"], found["difference"]) == (None, None)
    assert found["definition"]["lm_eval"]
    assert found["data"]["tasks"]["own_choices"]["items"] == 5
    assert len(found["data"]["tasks"]["own_choices"]["sha256"]) == 64


@pytest.mark.slow
@pytest.mark.beside
def test_what_a_suite_needs_and_has_not_is_said(suites, evaluate, monkeypatch):
    run = ("lora-language", "--no-base", "--suites-folder", suites)
    assert "did you mean own_choices" in evaluate(*run, "--suite", "own_choice", code=1)
    (suites / "hub.yaml").write_text(CHOICE_TASK.replace("own_choices", "far_away").replace("path: json", "path: a/b"))
    assert "--online" in evaluate(*run, "--suite", "far_away", code=1)
    (suites / "lost.yaml").write_text(CHOICE_TASK.replace("own_choices", "lost").replace("choices.jsonl", "no.jsonl"))
    assert "data files are where it says" in evaluate(*run, "--suite", "lost", code=1)
    assert "sequence classifier" in evaluate("lora-classes", "--suite", "own_choices", code=2)
    assert "no such folder" in evaluate(*run[:2], "--suite", "x", "--suites-folder", suites / "no", code=2)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert "pip install 'edge-testbed[lm-eval]'" in evaluate(*run, "--suite", "own_choices", code=2)


def test_a_soft_prompt_has_likelihoods_and_its_generation_is_refused(suites, evaluate):
    make_run(suites, "fedprompt-language", "fedprompt")
    run = ("fedprompt-language", "--no-base", "--suites-folder", suites, "--suite")
    ours = evaluate("fedprompt-language", "--no-base", "--data", suites / "choices.jsonl", "--as", "multiple_choice")
    assert evaluate(*run, "own_choices")["figures"]["own_choices acc"] == ours["figures"]["accuracy"]
    assert "--as exact_match, which can do without" in evaluate(*run, "own_exact", code=1)


def test_nothing_stays_offline_behind_an_evaluation():
    import datasets
    import huggingface_hub.constants as hub

    with harness._offline():
        assert hub.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert not hub.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE
