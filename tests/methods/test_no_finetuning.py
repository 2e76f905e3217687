"""No fine-tuning: a loss is told once, and nothing changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from methods.lora import Lora
from methods.no_finetuning import NoFineTuning
from testbed.model.combine import state_hash
from testbed.model.footprint import Baseline, predict
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, run_of
from tests.reference.driver import started


def test_only_the_first_round_asks_and_the_state_never_changes(tmp_path):
    run = run_of(NoFineTuning(), tmp_path, rounds=3, clients=2, steps=1, evaluate_every=100)
    before, after = started(run), federate(run)
    assert [(job.round, job.client) for job in run.engine.jobs] == [(0, 0), (0, 1)]
    assert set(run.engine.phases) == {"forward"}
    assert state_hash(after.tensors, after.scalars) == state_hash(before.tensors, before.scalars)
    assert all(not result.tensors for result in run.folder.results())


def test_the_loss_it_tells_is_that_of_the_first_step_of_lora_before_it_moved_anything(tmp_path):
    zero_shot = run_of(NoFineTuning(), tmp_path / "zero", rounds=1, clients=2, steps=1)
    federate(zero_shot)
    trained = run_of(Lora(), tmp_path / "lora", rounds=1, clients=2, steps=1)
    federate(trained)
    told = {result.client: result.scalars["loss"] for result in zero_shot.folder.results()}
    first = {result.client: result.scalars["loss"] for result in trained.folder.results()}
    assert told == pytest.approx(first, rel=1e-6)
    assert told[0] != told[1]


def test_a_resumed_run_asks_nobody_again(tmp_path):
    run = run_of(NoFineTuning(), tmp_path, rounds=3, clients=2, steps=1, evaluate_every=100)

    def killed(index, quality):
        raise KeyboardInterrupt

    run.watcher.round_started = lambda index, *_: killed(index, None) if index == 1 else None
    with pytest.raises(KeyboardInterrupt):
        federate(run)
    run.watcher.round_started = lambda *_: None
    federate(run)
    assert len(run.engine.jobs) == 2


def test_a_clients_prediction_holds_one_block_and_neither_optimizer_nor_gradients(tmp_path):
    method, shape = NoFineTuning(), base_model(tmp_path).shape
    [choice] = method.choices(shape)
    [forward] = predict(method.phases(choice, shape, WORK), shape, WORK, Baseline(1 << 20)).phases
    whole = predict((replace(method.phases(choice, shape, WORK)[0], streamed=False),), shape, WORK, Baseline(1 << 20))
    assert forward.parts.keys().isdisjoint({"optimizer", "gradients", "weights"})
    assert forward.bytes < whole.bytes


def test_export_is_the_new_head(tmp_path):
    run = run_of(NoFineTuning(), tmp_path)
    state = started(run)
    run.method.export(state, run.base, run.work, tmp_path / "export")
    written = load_file(tmp_path / "export" / "head.safetensors")
    assert state_hash(written, {}) == state_hash(dict(state.tensors), {})
    assert list(written) == ["score.weight"]
