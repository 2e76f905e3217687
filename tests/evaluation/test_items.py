"""How rows become questions: every way to name the answer, and what is said where it cannot be read."""

from __future__ import annotations

import json

import pytest

from testbed.errors import DataError, UsageError
from testbed.evaluation.items import Source, choices_of, questions_of
from tests.evaluation.made_runs import write_rows


def read(tmp_path, row, read_with=choices_of, prompt=None, **words):
    path = write_rows(tmp_path / "data.jsonl", [row])
    [item], _ = read_with(Source(str(path), words, prompt), lambda _: None)
    return item


THREE = {"question": "q", "choices": ["red", "green", "blue"]}


@pytest.mark.parametrize(
    ("row", "words", "right"),
    [
        ({**THREE, "answer": 1}, {}, 1),
        ({**THREE, "answer": "1"}, {}, 1),
        ({**THREE, "answer": "b"}, {}, 1),
        ({**THREE, "answer": "green"}, {}, 1),
        ({**THREE, "answer": 2}, {"answer_as": "number"}, 1),
        ({**THREE, "choices": json.dumps(THREE["choices"]), "answer": "B"}, {}, 1),
        ({"prompt": "q", "A": "red", "B": "green", "C": "", "answer": "B"}, {}, 1),
        ({"stem": "q", "one": "red", "two": "green", "key": "two"}, {"question": "stem", "choices": "one,two"}, 1),
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, {}, 1),
        ({"question": "q", "choices": ["3", "4"], "answer": "4"}, {}, 1),
        ({"question": "q", "choices": ["1", "0"], "answer": 1}, {"answer_as": "index"}, 1),
        ({"question": "q", "choices": ["1", "0"], "answer": 1}, {"answer_as": "text"}, 0),
    ],
)
def test_an_answer_is_an_index_a_letter_or_the_text(tmp_path, row, words, right):
    if "key" in row:
        words = {**words, "answer": "key"}
    assert read(tmp_path, row, **words).right == right


@pytest.mark.parametrize(
    ("row", "words", "said"),
    [
        ({**THREE, "answer": 3}, {}, "none of the 3 choices"),
        ({**THREE, "answer": "Green"}, {}, "none of the 3 choices"),
        ({"question": "q", "choices": ["1", "0"], "answer": 1}, {}, "'0' as index"),
        ({"question": "q", "choices": ["only"], "answer": 0}, {}, "two choices or more"),
        ({"question": "q", "choices": "red", "answer": 0}, {}, "two choices or more"),
        ({**THREE, "answer": ""}, {}, "nothing in column 'answer'"),
        ({**THREE, "anwser": 1}, {}, 'did you mean "anwser"?'),
        ({"question": "q", "options": ["a", "b"], "answer": 1}, {}, "--data-set choices=COLUMN"),
        ({**THREE, "answer": 1}, {"choices": "choises"}, 'did you mean "choices"?'),
    ],
)
def test_an_answer_that_cannot_be_read_is_refused_with_its_place_and_the_way_out(tmp_path, row, words, said):
    with pytest.raises(DataError, match=r"data\.jsonl") as caught:
        read(tmp_path, row, **words)
    assert said in str(caught.value)


def test_a_prompt_is_filled_with_the_columns_of_its_row(tmp_path):
    row = {"topic": "maths", "question": "1+1?", "answer": "2"}
    assert read(tmp_path, row, questions_of).prompt == "Question: 1+1?\nAnswer:"
    assert read(tmp_path, row, questions_of, "[{topic}] {question}").prompt == "[maths] 1+1?"
    with pytest.raises(DataError, match="there are: topic, question, answer"):
        read(tmp_path, row, questions_of, "{subject}: {question}")


def test_with_a_template_the_model_is_asked_as_in_training(tmp_path):
    item = read(tmp_path, {"instruction": "Add.", "input": "1 1", "response": "2"}, questions_of, template="alpaca")
    assert item.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n")
    assert item.answers == ("2",)


@pytest.mark.parametrize("words", [{"chioces": "x"}, {"template": "vicuna"}, {"answer_as": "roman"}])
def test_unknown_words_are_refused_with_the_right_ones(tmp_path, words):
    with pytest.raises(UsageError, match="are:"):
        read(tmp_path, {**THREE, "answer": 1}, **words)


def test_a_limit_draws_the_same_items_every_time_and_the_hash_tells_what_was_asked(tmp_path):
    path = str(write_rows(tmp_path / "data.jsonl", [{**THREE, "question": f"q{i}", "answer": 0} for i in range(30)]))
    some, about = choices_of(Source(path, limit=5), lambda _: None)
    again, about_again = choices_of(Source(path, limit=5), lambda _: None)
    _, about_all = choices_of(Source(path), lambda _: None)
    assert some == again
    assert [item.prompt for item in some] != [f"Question: q{i}\nAnswer:" for i in range(5)]
    assert about == about_again
    assert (about["items"], about["available"]) == (5, 30)
    assert about["sha256"] != about_all["sha256"]
    assert about["file_sha256"] == about_all["file_sha256"]
