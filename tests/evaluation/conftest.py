"""What the tests of evaluation share: two runs, and files of questions."""

from __future__ import annotations

import json

import pytest

from testbed.cli import main
from tests.evaluation.made_runs import make_model, make_run, write_rows

CLASSES = ("numbers", "plots", "tables")
WORDS = ("array", "index", "plot", "matrix", "axis", "frame", "value", "model", "return", "function")
CHOICES = [
    {
        "question": f"What does the {WORDS[index % 10]} of a {WORDS[(3 * index + 1) % 10]} give?",
        "choices": [f"a {WORDS[(index + 2 * place) % 10]}" + " é" * (place % 2) for place in range(2 + index % 3)],
        "answer": index % 2,
    }
    for index in range(24)
]
TEXTS = [{"text": f"Return the {word} of the given array. " * (1 + 4 * place)} for place, word in enumerate(WORDS[:6])]
LABELLED = [
    {"body": f"the {word} of {index} numbers", "kind": CLASSES[index % 3 if index % 4 else 0]}
    for index, word in enumerate(WORDS * 3)
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with runs of a language model and of a classifier, and data."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_CACHE", str(folder / "cache"))
        make_model(folder / "model")
        make_run(folder, "lora-language")
        make_run(folder, "lora-classes", task="sequence_classification", classes=CLASSES)
        write_rows(folder / "choices.jsonl", CHOICES)
        write_rows(folder / "texts.jsonl", TEXTS)
        write_rows(folder / "labelled.jsonl", LABELLED)
        yield folder


@pytest.fixture
def evaluate(lab, capsys):
    """`testbed evaluate` on the lab's runs; its first result."""

    def run(*words, code=0):
        assert main(["evaluate", *map(str, words), "--runs", str(lab / "runs"), "--json"]) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return json.loads(out)[0] if code == 0 else err

    return run
