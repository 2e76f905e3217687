"""FedDPA: a global adapter that travels, a personal one that does not, and what each is worth."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from safetensors.torch import load_file

from methods.feddpa import FedDPA
from methods.lora import Lora
from testbed.errors import UsageError
from testbed.method import EVALUATE
from testbed.model.combine import state_hash
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, run_of

SHORT = {"clients": 2, "steps": 2, "evaluate_every": 100}


def kept_by(run):
    """What each client has on its node after the last round."""
    last = {result.client: result.state for result in run.folder.results() if result.state}
    folder = run.engine.folder / "state"
    return [load_file(folder / str(client) / f"{kept}.safetensors") for client, kept in sorted(last.items())]


def test_where_the_personal_adapter_counts_for_nothing_the_global_one_is_vanilla_loras_bit_for_bit(tmp_path):
    run = run_of(FedDPA(rank=4, personal_weight=0.0), tmp_path / "dual", **SHORT)
    plain = federate(run_of(Lora(rank=4), tmp_path / "plain", **SHORT))
    assert state_hash(federate(run).tensors, {}) == state_hash(plain.tensors, {})
    assert not any(bool(kept[name].any()) for kept in kept_by(run) for name in kept if "personal_B" in name)


def test_where_it_counts_alone_the_global_one_stays_as_it_was(tmp_path):
    run = run_of(FedDPA(rank=4, personal_weight=1.0), tmp_path, **SHORT)
    state = federate(run)
    assert not any(bool(tensor.any()) for name, tensor in state.tensors.items() if "lora_B" in name)
    assert all(bool(kept[name].any()) for kept in kept_by(run) for name in kept)


def test_the_global_adapter_and_the_head_travel_and_the_personal_one_stays(tmp_path):
    run = run_of(FedDPA(rank=4), tmp_path, **SHORT)
    state = federate(run)
    assert not any("personal" in name for name in state.tensors)
    trained = [result for result in run.folder.results() if result.kind != EVALUATE]
    assert all({spec.name for spec in result.tensors} == set(state.tensors) for result in trained)
    one, other = kept_by(run)
    assert set(one) == set(other) == {name.replace("lora", "personal") for name in state.tensors if "lora_" in name}
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_the_personal_adapters_steps_go_on_from_the_jobs_and_the_first_optimizer_is_gone(tmp_path):
    run = run_of(FedDPA(rank=4, personal_steps=3), tmp_path, rounds=1, **{**SHORT, "clients": 1})
    done, optimizers = [], []
    run.engine.progress = lambda step, **_: done.append(step)
    run.engine.phase = lambda name: optimizers.append((name, alive(torch.optim.AdamW)))
    federate(run)
    assert done == [1, 2, 3, 4, 5]
    assert ("personalise", 0) in optimizers


def alive(kind):
    return sum(isinstance(item, kind) for item in gc.get_objects())


def test_the_personal_adapter_is_part_of_what_is_evaluated(tmp_path):
    losses = []
    for weight in (0.0, 0.5):
        run = run_of(FedDPA(rank=4, personal_weight=weight, personal_steps=40), tmp_path / str(weight), **SHORT)
        federate(run)
        losses.append(run.folder.rounds()[-1].quality["loss"])
    assert losses[1] < 0.9 * losses[0]


def test_the_export_is_the_global_adapter_at_its_full_scale(tmp_path):
    run = run_of(FedDPA(rank=4), tmp_path, rounds=1, **{**SHORT, "clients": 1})
    state = federate(run)
    run.method.export(state, run.base, WORK, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "adapter_config.json").read_text())["lora_alpha"] == 32.0
    stored = load_file(tmp_path / "export" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in stored} == set(state.tensors)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"personal_weight": 1.5}, r"setting personal_weight=1\.5: expected a number from 0 to 1"),
        ({"personal_weight": -0.1}, r"setting personal_weight=-0\.1: expected a number from 0 to 1"),
        ({"personal_steps": 0}, "setting personal_steps=0: expected at least 1, or none"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_the_plan(settings, told, tmp_path):
    with pytest.raises(UsageError, match=told):
        FedDPA(**settings).check(base_model(tmp_path).shape, WORK)
