"""Methods that train a part of the model, or make it for the client: they give what their references give."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from methods.c2a import C2A
from methods.fed_pilot import FedPilot
from methods.fedadapter import FedAdapter
from methods.inclusivefl import InclusiveFL
from testbed.method import SEQUENCE_CLASSIFICATION
from testbed.task import Shard
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import CLASSES, given, planted
from tests.reference import c2a, fed_pilot, fedadapter, inclusivefl
from tests.reference.driver import data_of, finished, float64_run, largest_difference, rates_of, started, weights_of

DEEPER, WIDER = 8, 2  # seeds whose trials end so


def included(folder, mutation):
    """Three capacities, so that each momentum comes from its own deeper blocks."""
    run = float64_run(InclusiveFL(rank=2), folder, clients=3)
    choices = {len(choice.blocks): choice for choice in run.method.choices(run.base.shape)}
    run = given(run, [choices[count] for count in (1, 2, 4)])
    expected = inclusivefl.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        capacities=(1, 2, 4), momentum=0.2, scale=16.0, learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    return finished(run), expected


def piloted(folder, mutation):
    """Long enough that both clients choose by importance; they reach differently far."""
    run = float64_run(FedPilot(rank=2), folder, rounds=4)
    choices = {len(choice.trained): choice for choice in run.method.choices(run.base.shape)}
    run = given(run, [choices[4], choices[3]])
    expected = fed_pilot.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        reaches=(4, 3), share=0.5, scale=16.0, learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    return finished(run), expected


def raised(folder, mutation, *, seed):
    """A trial with its three groups, and a round with what it chose, twice; some seeds go deeper, others wider."""
    run = float64_run(FedAdapter(bottleneck=6, width=2), folder, clients=3, rounds=5, seed=seed)
    expected, turns = fedadapter.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        first=(1, 2), depth_step=1, trial_every=2, learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    found = finished(run)
    goes_on = found.scalars["depth"], found.scalars["width"]
    assert goes_on == ((3, 2) if seed == DEEPER else (1, 4))
    assert mutation or turns[-1] == goes_on
    return found, expected


def customized(folder, mutation):
    """Clients whose labels are shared out differently."""
    run = float64_run(C2A(bottleneck=3, condition=5), folder)
    kept = ((0, 0, 0, 1), (1, 2, 2, 3))  # the labels of every four examples
    run = replace(run, shards=[_skewed(run.store, labels, f"skewed {index}") for index, labels in enumerate(kept)])
    expected = c2a.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        histograms=[torch.bincount(torch.tensor(labels), minlength=CLASSES).double() / 4 for labels in kept],
        learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    return finished(run), expected


def _skewed(store, labels, seed):
    """48 planted examples with these labels, over and over."""
    by_label = {label: [one for one in planted(200, seed) if one.label == label] for label in range(CLASSES)}
    examples = [by_label[label].pop() for _ in range(12) for label in labels]
    path = store.folder / "skewed.partial"
    Shard.of(examples, SEQUENCE_CLASSIFICATION, CLASSES).save(path)
    return store.put_file(path)


RUNS = {
    "inclusivefl": (included, "sign"),
    "fed_pilot": (piloted, "least"),
    "fedadapter, deeper": (partial(raised, seed=DEEPER), "worst"),
    "fedadapter, wider": (partial(raised, seed=WIDER), "worst"),
    "c2a": (customized, "uniform"),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_method_gives_what_the_reference_gives(name, tmp_path):
    compare, _ = RUNS[name]
    found, expected = compare(tmp_path, None)
    assert largest_difference(found.tensors, expected) < 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_a_reference_with_the_mutation_is_told_apart(name, tmp_path):
    compare, mutation = RUNS[name]
    found, expected = compare(tmp_path, mutation)
    assert largest_difference(found.tensors, expected) > 1e-3
