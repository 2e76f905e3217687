"""Every method found keeps its budget under a real cap: trainers are given exactly what the plan predicted."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

import testbed
from testbed import session
from testbed.commands.run_method import command
from testbed.inventory import Inventory
from testbed.method import EVALUATE, IMAGE_CLASSIFICATION, Method
from testbed.plugins import all_methods
from testbed.prepare import prepare
from testbed.task import evaluate_batches
from tests.contract.settings import words_of
from tests.tiny_lab import arguments, make_lab

# A cap holds whatever runs beside it.
pytestmark = [pytest.mark.slow, pytest.mark.cgroup, pytest.mark.beside]
ROUNDS = 4  # a method with stages has each of them
_NOT_SETTLED = ("method", "dry_run", "as_json", "resume", "runs_dir")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True)
def cache(lab, monkeypatch):
    """Also of what is loaded after the run."""
    monkeypatch.setenv("TESTBED_CACHE", str(lab / "cache"))


def planned(method, lab):
    """The run that these words of the command line ask for."""
    short = ("--rounds", str(ROUNDS), "--steps", "2", "--only", "big", "--evaluate-every", str(ROUNDS))
    if all_methods()[method].default_task == IMAGE_CLASSIFICATION:
        words = ["--inventory", str(lab / "lab.yaml"), *short]
    else:
        words = arguments(lab, *short)
    options = command.make_context("run-method", [method, *words, *words_of(method)]).params
    return session.settled(method, **{name: value for name, value in options.items() if name not in _NOT_SETTLED})


def with_exactly(prepared, budget_bytes):
    devices = [
        replace(device, budget=replace(device.budget, memory_bytes=budget_bytes)) for device in prepared.inventory
    ]
    return prepare(prepared.config, Inventory(tuple(devices)), lambda text: None)


def capped(method, lab):
    """A run of a method, with exactly the budget that the plan predicted: what was settled, and its folder."""
    prepared = planned(method, lab)
    exact = with_exactly(prepared, prepared.plan.clients[0].predicted_bytes)
    folder = session.new_folder(exact, lab / "runs")
    session.run(exact, folder, Console(file=io.StringIO()))
    return prepared, folder


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_capped_at_its_prediction_no_trainer_is_killed_and_the_run_can_be_loaded(method, lab):
    prepared, folder = capped(method, lab)
    results = folder.results()
    assert {result.outcome for result in results} == {"finished"}
    asked = [result for result in results if result.kind != EVALUATE]
    assert len(asked) == (ROUNDS if prepared.method.learns else 1)
    if type(prepared.method).evaluations is Method.evaluations:  # else, what was evaluated was put together on a device
        _expect_the_model_that_was_evaluated(prepared, folder, lab)


def _expect_the_model_that_was_evaluated(prepared, folder, lab):
    model = testbed.load(folder.run_id, lab / "runs")
    found = evaluate_batches(model, prepared.held_out, 32, prepared.work.length, model.config.pad_token_id or 0)
    [evaluated] = [record.quality for record in folder.rounds() if record.quality]
    assert found.accuracy == evaluated["accuracy"]
    # The order in which a processor adds floats may depend on where a tensor lies in memory: last digits differ.
    assert found.loss == pytest.approx(evaluated["loss"], rel=1e-6)
