"""The numbers that stand beside every table of quality."""

import math

import pytest

from testbed import baselines as module
from testbed.baselines import Baseline, bag_of_words, baselines, majority_class, unigram
from testbed.data import DataSet
from testbed.data_sources import Row
from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION
from testbed.task import Example


def classification(train, held_out, texts=None):
    """Labels in, a data set out; the text names the label unless `texts` says otherwise."""
    word = texts or (lambda label: f"word{label} and more")
    sides = [[Row(word(label), label=str(label)) for label in side] for side in (train, held_out)]
    examples = [tuple(Example([5, 2], label) for label in side) for side in (train, held_out)]
    names = tuple(map(str, range(3)))
    return DataSet(SEQUENCE_CLASSIFICATION, names, *examples, *map(tuple, sides), 10, {})


def causal(train, held_out, vocabulary=10, loss_from=1):
    sides = [tuple(Example(ids, loss_from=loss_from) for ids in side) for side in (train, held_out)]
    rows = [tuple(Row(str(ids)) for ids in side) for side in (train, held_out)]
    return DataSet(CAUSAL_LM, (), *sides, *rows, vocabulary, {})


@pytest.mark.parametrize(
    ("train", "held_out", "accuracy"),
    [([0, 0, 1], [0, 1, 2, 0], 0.5), ([2, 2, 1, 0], [0, 1], 0.0), ([1, 1, 0], [1, 1], 1.0)],
)
def test_the_majority_is_that_of_the_training_examples(train, held_out, accuracy):
    assert majority_class(classification(train, held_out)) == accuracy


def test_a_bag_of_words_learns_what_words_tell():
    assert bag_of_words(classification([0, 1, 2] * 10, [0, 1, 2, 2]), seed=0) == 1.0


@pytest.mark.parametrize(
    "dataset",
    [
        classification([1, 1, 1], [0, 1]),
        classification([0, 1, 2], [0, 1], texts=lambda _label: "? !"),
    ],
)
def test_where_it_cannot_be_had_a_bag_of_words_is_not_measured(dataset):
    assert bag_of_words(dataset, seed=0) is None


def test_unigrams_count_predicted_tokens_only():
    loss, accuracy = unigram(causal([[9, 3, 3, 4]], [[9, 3, 5]]))
    assert accuracy == 0.5
    assert loss == pytest.approx(-(math.log(3 / 13) + math.log(1 / 13)) / 2)
    loss, accuracy = unigram(causal([[9, 3, 3, 4]], [[9, 3, 4]], loss_from=2))
    assert (loss, accuracy) == (pytest.approx(-math.log(2 / 12)), 0.0)


def test_baselines_are_measured_once_for_a_content(tmp_path, monkeypatch):
    dataset = classification([0, 1, 2, 2] * 5, [0, 1, 2])
    said = []
    found = baselines(dataset, 0, tmp_path, said.append)
    assert found == (Baseline("majority class", pytest.approx(1 / 3)), Baseline("bag of words", 1.0))
    monkeypatch.setattr(module, "_measure", None)
    assert baselines(dataset, 0, tmp_path, said.append) == found
    assert len(said) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (classification([0, 1, 2], [0]), classification([0, 1, 1], [0])),
        (causal([[9, 3, 4]], [[9, 3]]), causal([[9, 3, 4]], [[9, 3]], vocabulary=20)),
        (causal([[9, 3, 4, 4]], [[9, 3, 4]]), causal([[9, 3, 4, 4]], [[9, 3, 4]], loss_from=2)),
    ],
)
def test_another_content_is_measured_anew(tmp_path, first, second):
    baselines(first, 0, tmp_path)
    baselines(second, 0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_that_is_damaged_or_cannot_be_written_costs_no_result(tmp_path):
    dataset = causal([[9, 3, 3]], [[9, 3]])
    (known,) = baselines(dataset, 0, tmp_path)
    (cache,) = tmp_path.iterdir()
    cache.write_text("[{")
    assert baselines(dataset, 0, tmp_path) == (known,)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert baselines(dataset, 0, blocked) == (known,)
