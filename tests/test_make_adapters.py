"""`testbed make-adapters`: whole adapters with cards, an interruption that loses none, texts that no client has."""

from __future__ import annotations

import json

import pytest
import torch

from testbed import adapter_training
from testbed.adapter_pool import find_pool
from testbed.adapter_training import Recipe, command_line, make_pool
from testbed.cli import INTERRUPTED, WRONG_USE, main
from testbed.errors import UsageError
from testbed.method import SEQUENCE_CLASSIFICATION
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.options import data_settings
from testbed.package_data import PACKAGE
from tests.tiny_lab import make_lab

COLUMNS = ("text=body", "label=kind")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_of(lab, *data_options, **changes):
    options = {"slices": 2, "rank": 2, "steps": 3, "length": 16, **changes}
    data = data_settings(str(lab / "data.jsonl"), (*COLUMNS, *data_options))
    return Recipe(model=str(lab / "model"), data=data, **options)


def words_of(lab, output, **options):
    named = {"model": lab / "model", "data": lab / "data.jsonl", "length": 16, "slices": 2, "rank": 2, "steps": 3}
    given = [word for name, value in {**named, **options}.items() for word in (f"--{name}", str(value))]
    return ["make-adapters", *given, "--data-set", COLUMNS[0], "--data-set", COLUMNS[1], "-o", str(output)]


def weights(folder):
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/adapter_model.safetensors")}


def test_the_command_makes_a_pool_of_the_model_with_cards(lab, tmp_path, capsys):
    output = tmp_path / "pool"
    assert main(words_of(lab, output)) == 0
    assert f"2 adapters are in {output}" in capsys.readouterr().out
    base = BaseModel.open(lab / "model", ContentStore(tmp_path / "content"), SEQUENCE_CLASSIFICATION, 4)
    pool = find_pool(str(output), base.shape)
    assert set(pool.sizes().values()) == {4}
    assert len(pool.sizes()) == 2 * len(base.shape)
    first, second = pool.experts()["model.layers.0.self_attn.q_proj.experts_A"].split(2)
    assert not torch.equal(first, second)
    card = (output / "slice-1" / "README.md").read_text()
    assert "tells alpha, beta apart" in card
    assert "tells delta, gamma apart" in (output / "slice-2" / "README.md").read_text()
    assert "testbed make-adapters" in (output / "README.md").read_text()
    config = json.loads((output / "slice-1" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(lab / "model")


def test_an_interruption_keeps_whole_adapters_and_the_same_command_makes_the_rest_alike(lab, tmp_path, monkeypatch):
    recipe, cut, whole = recipe_of(lab), tmp_path / "cut", tmp_path / "whole"
    make_pool(recipe, whole)

    def interrupt(name, step, loss):
        if (name, step) == ("slice-2", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_pool(recipe, cut, progress=interrupt)
    assert set(weights(cut)) == {"slice-1"}
    kept = (cut / "slice-1" / "adapter_model.safetensors").stat()
    make_pool(recipe, cut)
    assert (cut / "slice-1" / "adapter_model.safetensors").stat().st_mtime_ns == kept.st_mtime_ns
    assert weights(cut) == weights(whole)
    monkeypatch.setattr(adapter_training, "load_data", lambda *_: pytest.fail("nothing is missing"))
    assert len(make_pool(recipe, cut)) == 2


def test_ctrl_c_is_told_in_words(lab, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_training, "make_pool", interrupted)
    assert main(words_of(lab, tmp_path / "pool")) == INTERRUPTED
    assert "the same command goes on" in "".join(capsys.readouterr().err.split("\n")).replace("  ", " ")


def test_a_folder_made_otherwise_is_left_alone(lab, tmp_path):
    make_pool(recipe_of(lab), tmp_path)
    before = weights(tmp_path)
    with pytest.raises(UsageError, match="not made with these options"):
        make_pool(recipe_of(lab, rank=3), tmp_path)
    assert weights(tmp_path) == before


def test_texts_that_no_client_gets_are_taken_where_there_are_enough(lab):
    taken, source = adapter_training._texts(recipe_of(lab, "per_class=20"), print)
    assert "to no client" in source
    clients, _ = adapter_training._texts(recipe_of(lab), print)
    of_run = adapter_training.load_data(
        adapter_training.spec_of(recipe_of(lab, "per_class=20").data, SEQUENCE_CLASSIFICATION, 16),
        adapter_training.tokenizer_of(lab / "model"),
        lab,
    )
    used = {row.text for row in taken.train_rows}
    assert used
    assert not used & {row.text for row in (*of_run.train_rows, *of_run.held_out_rows)}
    assert len(clients.train_rows) == 360


def test_without_texts_to_spare_it_says_that_clients_have_them(lab):
    _, source = adapter_training._texts(recipe_of(lab), print)
    assert "divides among its clients" in source


def test_more_slices_than_pairs_of_classes_are_refused(lab, tmp_path, capsys):
    assert main(words_of(lab, tmp_path / "pool", slices=3)) == WRONG_USE
    assert "at most 2" in capsys.readouterr().err
    assert main(words_of(lab, tmp_path / "pool", slices=0)) == WRONG_USE


def test_maps_that_the_model_lacks_are_refused(lab, tmp_path, capsys):
    assert main([*words_of(lab, tmp_path / "pool"), "--targets", "query"]) == WRONG_USE
    assert "self_attn.q_proj" in capsys.readouterr().err


def test_a_causal_lms_texts_are_dealt_out(lab, tmp_path):
    first, second = make_pool(recipe_of(lab, task="causal_lm"), tmp_path / "pool")
    counts = [json.loads((folder / "made.json").read_text())["texts"] for folder in (first, second)]
    assert counts == [180, 180]
    assert json.loads((first / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_the_card_has_the_command_that_makes_the_pool_again(lab):
    assert command_line(Recipe(data=data_settings("docstrings", ())), "DIR") == "testbed make-adapters --output DIR"
    line = command_line(recipe_of(lab, "per_class=20"), "DIR")
    assert f"--model {lab / 'model'} --slices 2 --rank 2 --steps 3 --length 16 --data {lab / 'data.jsonl'}" in line
    assert "--data-set per_class=20 --data-set text=body --data-set label=kind --output DIR" in line


def test_the_pool_that_comes_along_is_what_the_command_makes_without_any_option(monkeypatch):
    monkeypatch.setattr(adapter_training, "load_data", lambda *_: pytest.fail("it was made with other options"))
    folder = PACKAGE / "quickstart" / "adapters"
    assert len(make_pool(Recipe(data=data_settings("docstrings", ())), folder)) == 4
    assert "`testbed make-adapters --output DIR`" in (folder / "README.md").read_text()
