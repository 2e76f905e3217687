"""`testbed evaluate` as a user meets it."""

from __future__ import annotations

import json

import pytest

from testbed.cli import main
from testbed.store import RunFolder
from tests.evaluation.made_runs import make_run, write_rows
from tests.run_records import record


@pytest.fixture(scope="module")
def broken(lab):
    """Files and runs that something is wrong with."""
    write_rows(lab / "strange.jsonl", [{"text": "x y", "label": "plot"}])
    (lab / "empty.jsonl").write_text("")
    RunFolder.create(lab / "runs", "lora-young", record())
    (lab / "folder").mkdir()
    return lab


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("lora-young --data texts.jsonl --as perplexity", 1, "no checkpoint yet"),
        ("lora-classes --data texts.jsonl --as perplexity", 2, "sequence classifier of 3 classes"),
        ("lora-classes --data strange.jsonl", 1, 'did you mean "plots"?'),
        ("lora-classes --data texts.jsonl", 1, "there is no column 'label'"),
        ("lora-language --data texts.jsonl", 2, "multiple_choice, exact_match, perplexity"),
        ("lora-language --data texts.jsonl --as multiple_choice", 1, "there is no column 'choices'"),
        ("lora-language --data choices.jsonl --as perplexity", 1, "--data-set text=COLUMN"),
        ("lora-language --data empty.jsonl --as exact_match", 1, "it holds no rows"),
        ("lora-language --data lost.jsonl --as exact_match", 1, "there is no such file"),
        ("lora-language --data docstrings --as multiple_choice", 1, "no questions"),
        ("lora-language --data texts.jsonl --as perplexity --stride 600", 2, "expected 1 to 128"),
        ("lora-language --data texts.jsonl --as perplexity --length 600", 2, "from 2 to 128 tokens"),
        ("lora-language --data texts.jsonl --as perplexity --batch-size 0", 2, "expected 1 or more"),
        ("lora-language --data choices.jsonl --as exact_match --max-new-tokens 128", 2, "128 tokens, the prompt among"),
        ("lora-language --data choices.jsonl --as exact_match --extract (", 2, "not a regular expression"),
        ("lora-language --data texts.jsonl --as perplexity --accelerator cude", 2, "on this machine"),
        ("lora-language --data texts.jsonl --as perplexity --client 3", 1, "no model of client 3"),
        ("lora-language --data lost.jsonl --as perplexity --client 3", 1, "no model of client 3; its clients are"),
        ("lora-language --data lost.jsonl --as perplexity --length 600", 2, "from 2 to 128 tokens"),
        ("lora-language --data lost.jsonl --as perplexity --stride 0", 2, "--stride"),
        (
            "lora-language --data texts.jsonl --as perplexity --ignore-case",
            2,
            "--ignore-case goes with --as exact_match",
        ),
        ("lora-language --data choices.jsonl --as multiple_choice --max-new-tokens 3", 2, "goes with --as exact_match"),
        ("lora-language --data choices.jsonl --as exact_match --stride 3", 2, "--stride goes with --as perplexity"),
        ("lora-language --data texts.jsonl --suite x", 2, "name one"),
        ("lora-language --suite x --as perplexity", 2, "--as goes with --data"),
        ("lora-language --data texts.jsonl --as perplexity --online", 2, "--online goes with --suite"),
        ("--data texts.jsonl --as perplexity", 2, "name one: a RUN"),
        ("--model folder --data texts.jsonl --as perplexity", 1, "config.json"),
        ("--model runs/lora-classes/export --data texts.jsonl --as perplexity", 1, "SEQ_CLS"),
        ("--model resnet --data texts.jsonl --as perplexity", 1, "no language model's head"),
    ],
)
def test_what_is_wrong_is_said_with_the_way_out(broken, capsys, monkeypatch, words, code, said):
    monkeypatch.chdir(broken)
    assert main(["evaluate", *words.split()]) == code
    out, err = capsys.readouterr()
    assert said in err
    assert "Traceback" not in err
    assert not out


def test_an_evaluation_is_kept_listed_and_replaced_by_the_same_question_only(lab, capsys, monkeypatch):
    monkeypatch.chdir(lab)
    make_run(lab, "lora-listed")
    words = ["evaluate", "lora-listed", "--data", "choices.jsonl", "--as", "multiple_choice", "--limit", "4"]
    assert main(["evaluate", "lora-listed", "--list"]) == 0
    assert "no evaluations of this run yet" in capsys.readouterr().out
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert main(words) == 0
    capsys.readouterr()
    [kept] = (lab / "runs/lora-listed/evaluations").glob("*.json")
    stored = json.loads(kept.read_text())
    assert (stored["model"]["round"], len(stored["model"]["state"]), stored["data"]["items"]) == (2, 64, 4)
    assert set(stored["figures"]) == set(stored["base"]) == set(stored["difference"])
    assert main([*words, "--batch-size", "2", "--prompt", "{question}"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "lora-listed", "--list"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("lora-listed after round 2: multiple_choice on choices.jsonl, 4 of 24 items") == 2
    assert shown in listed
    assert "guessing: " in shown


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
def test_an_exported_adapter_is_as_good_as_its_run_and_leaves_nothing_behind(lab, evaluate):
    asked = ("--data", lab / "texts.jsonl", "--as", "perplexity")
    export = lab / "runs/lora-language/export"
    before = sorted(export.iterdir())
    of_run, of_folder = evaluate("lora-language", *asked), evaluate("--model", export, *asked)
    for model in ("figures", "base"):
        ours, theirs = of_run[model]["perplexity"], of_folder[model]["perplexity"]
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-4)
    assert of_run["figures"]["perplexity"]["value"] != of_run["base"]["perplexity"]["value"]
    assert sorted(export.iterdir()) == before


def test_a_model_in_a_folder_is_evaluated_and_a_shorter_stride_gives_more_context(lab, evaluate):
    found = evaluate("--model", lab / "model", "--data", lab / "texts.jsonl", "--as", "perplexity", "--stride", "32")
    whole = evaluate("--model", lab / "model", "--data", lab / "texts.jsonl", "--as", "perplexity")
    assert found["base"] is None
    assert found["notes"] == whole["notes"] == {"texts_in_several_windows": 2}
    assert found["figures"]["perplexity"]["value"] < whole["figures"]["perplexity"]["value"]
