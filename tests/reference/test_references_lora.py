"""FedProx, FFA-LoRA, RoLoRA, FedSA-LoRA, FedDPA give what their references give; a mutated reference is told apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from methods.feddpa import FedDPA
from methods.fedprox import FedProx
from methods.fedsa_lora import FedSALora
from methods.ffa_lora import FFALora
from methods.rolora import RoLora
from testbed.model.adapters import lora_tensors
from tests.contract.conftest import cheap_collection  # noqa: F401 -- a fixture
from tests.reference import feddpa, fedprox, fedsa_lora, ffa_lora, rolora
from tests.reference.driver import data_of, finished, float64_run, largest_difference, rates_of, started, weights_of

SCALE = 16.0  # alpha 32, rank 2
STEPS, PERSONAL_STEPS = 2, 3


def of_all(run, reference, mutation, **settings):
    """How far the run's state is from that of a reference in which everything is shared."""
    expected = reference.run(
        weights_of(run), started(run).tensors, data_of(run), run.config.rounds,
        scale=SCALE, learning_rates=rates_of(run), mutation=mutation, **settings,
    )  # fmt: skip
    return largest_difference(finished(run).tensors, expected)


def kept_by(run):
    """What each client has on its node after the last round."""
    last = {result.client: result.state for result in run.folder.results() if result.state}
    folder = run.engine.folder / "state"
    return [load_file(folder / str(client) / f"{kept}.safetensors") for client, kept in sorted(last.items())]


def farthest(run, shared, private):
    """The largest difference of the state, or of what any client keeps."""
    state = finished(run)
    kept = kept_by(run)
    assert len(kept) == len(private) == 2
    return max(
        largest_difference(state.tensors, shared),
        *(largest_difference(*pair) for pair in zip(kept, private, strict=True)),
    )


def prox(folder, mutation):
    return of_all(float64_run(FedProx(rank=2, mu=3.0), folder), fedprox, mutation, mu=3.0)


def frozen_a(folder, mutation):
    return of_all(float64_run(FFALora(rank=2), folder), ffa_lora, mutation)


def in_turns(folder, mutation):
    return of_all(float64_run(RoLora(rank=2), folder, rounds=3), rolora, mutation)


def a_first(folder, mutation):
    return of_all(float64_run(RoLora(rank=2, first="A"), folder, rounds=3), rolora, mutation, first="A")


def shared_a(folder, mutation):
    run = float64_run(FedSALora(rank=2), folder)
    whole = lora_tensors(run.base.shape, run.method.lora(run.base.shape), run.config.seed)
    own = {name: tensor for name, tensor in whole.items() if name.endswith("lora_B.weight")}
    own = {name: tensor.double() for name, tensor in {**own, **run.base.new_head(run.config.seed)}.items()}
    shared, private = fedsa_lora.run(
        weights_of(run), started(run).tensors, own, data_of(run), run.config.rounds,
        scale=SCALE, learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    return farthest(run, shared, private)


def dual(folder, mutation):
    """At lower rates: what the model computes in float32 whatever its type counts for more after ten steps of Adam."""
    method = FedDPA(rank=2, personal_weight=0.3, personal_steps=PERSONAL_STEPS)
    run = float64_run(method, folder, steps=STEPS, learning_rate=4e-3, final_learning_rate=2e-3, seed=1)
    shape = run.base.shape
    personal = lora_tensors(shape, replace(run.method.lora(shape), name="personal"), run.config.seed)
    both = replace(run, config=replace(run.config, steps=STEPS + PERSONAL_STEPS))
    shared, private = feddpa.run(
        weights_of(run), started(run).tensors, {name: tensor.double() for name, tensor in personal.items()},
        data_of(both), run.config.rounds, steps=STEPS, scale=SCALE, weight=0.3,
        learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    return farthest(run, shared, private)


CASES = {
    "fedprox": (prox, "sign"),
    "ffa_lora": (frozen_a, "both"),
    "rolora": (in_turns, "stuck"),
    "rolora, A first": (a_first, "stuck"),
    "fedsa_lora": (shared_a, "average_b"),
    "feddpa": (dual, "unweighted"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_few_rounds_give_what_the_reference_gives(case, tmp_path):
    compared, _ = CASES[case]
    assert compared(tmp_path, None) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_mutated_reference_is_told_apart(case, tmp_path):
    compared, mutation = CASES[case]
    assert compared(tmp_path, mutation) > 1e-3
