"""BitFit, FedKSeed, FwdLLM and FedPrompt: their own code gives what the references give, and mutations show."""

from __future__ import annotations

import pytest

from methods.bitfit import BitFit
from methods.fedkseed import COEFFICIENTS, FedKSeed
from methods.fedprompt import FedPrompt
from methods.fwdllm import FwdLLM
from testbed.model.perturbation import normals, signs
from testbed.node.training import step_seed
from tests.contract.conftest import cheap_collection  # noqa: F401 -- a fixture
from tests.reference import bitfit, fedkseed, fedprompt, fwdllm
from tests.reference.driver import data_of, finished, float64_run, largest_difference, rates_of, started, weights_of


def bitfits(tmp_path, mutation=None):
    """How far two rounds of BitFit are from the reference's."""
    run = float64_run(BitFit(), tmp_path)
    expected = bitfit.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    return largest_difference(finished(run).tensors, expected)


def test_bitfit_gives_what_its_reference_gives(tmp_path):
    assert bitfits(tmp_path) < 1e-5


def test_bitfit_whose_biases_are_subtracted_is_told_apart(tmp_path):
    assert bitfits(tmp_path, mutation="sign") > 1e-3


def fedkseeds(tmp_path, mutation=None, **settings):
    """How far two rounds of FedKSeed are from the reference's; 24 seeds, so that some come again."""
    run = float64_run(FedKSeed(seeds=24, rate_scale=0.1, **settings), tmp_path, steps=6)
    draw = signs if run.method.direction == "signs" else normals
    before = started(run).tensors
    head = {name: tensor for name, tensor in before.items() if name != COEFFICIENTS}
    expected = fedkseed.run(
        {**weights_of(run), **head}, before[COEFFICIENTS], data_of(run), run.config.rounds,
        direction=lambda s, name, shape: draw(shape, s, name), epsilon=run.method.epsilon,
        rates=[0.1 * rate for rate in rates_of(run)], seed=run.config.seed, pro=run.method.pro, mutation=mutation,
    )  # fmt: skip
    found = finished(run).tensors
    assert largest_difference({n: found[n] for n in head}, head) == 0.0
    return float((found[COEFFICIENTS] - expected).abs().max())


@pytest.mark.parametrize("settings", [{}, {"pro": True}, {"direction": "normal"}], ids=str)
def test_fedkseed_gives_what_its_reference_gives(settings, tmp_path):
    assert fedkseeds(tmp_path, **settings) < 1e-5


def test_fedkseed_that_rebuilds_the_model_the_other_way_is_told_apart(tmp_path):
    assert fedkseeds(tmp_path, mutation="sign") > 1e-4


def fwdllms(tmp_path, mutation=None, **settings):
    """How far four rounds of FwdLLM are from the reference's, and in which of them the server stepped."""
    method = FwdLLM(rank=2, candidates=2, server_rate=5e-3, warmup=0.5, patience=1, **settings)
    run = float64_run(method, tmp_path, rounds=4, steps=2)

    def direction(t, client, step, number, name, shape):
        return normals(shape, step_seed(run.config.seed, t, client, step), f"{number}/{name}")

    expected, stepped = fwdllm.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        direction=direction, scale=16.0, h=method.h, candidates=2, perturbations=method.perturbations, rate=5e-3,
        warmup_rounds=2, variance_limit=method.variance_limit, patience=1, mutation=mutation,
    )  # fmt: skip
    return largest_difference(finished(run).tensors, expected), stepped


@pytest.mark.parametrize(
    ("limit", "steps"), [(1e9, [True] * 4), (1e-9, [False, True, False, True])], ids=["always steps", "asks for more"]
)
def test_fwdllm_gives_what_its_reference_gives(limit, steps, tmp_path):
    difference, stepped = fwdllms(tmp_path, variance_limit=limit)
    assert difference < 1e-5
    assert stepped == steps


def test_fwdllm_whose_difference_is_one_sided_is_told_apart(tmp_path):
    difference, _ = fwdllms(tmp_path, mutation="one_sided", variance_limit=1e9)
    assert difference > 1e-3


def fedprompts(tmp_path, mutation=None, **settings):
    """How far two rounds of FedPrompt are from the reference's."""
    run = float64_run(FedPrompt(tokens=3, **settings), tmp_path)
    expected = fedprompt.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    return largest_difference(finished(run).tensors, expected)


@pytest.mark.parametrize("initial", ["tokens", "uniform"])
def test_fedprompt_gives_what_its_reference_gives(initial, tmp_path):
    assert fedprompts(tmp_path, initial=initial) < 1e-5


def test_fedprompt_behind_the_first_token_is_told_apart(tmp_path):
    assert fedprompts(tmp_path, mutation="behind") > 1e-3
