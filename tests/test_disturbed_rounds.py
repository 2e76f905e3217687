"""Rounds under declared disturbances: the same clients finish for the same seed, whatever interrupts the run."""

from __future__ import annotations

from dataclasses import replace

from methods.lora import Lora
from testbed.disturbances import parse
from testbed.job import UNREACHABLE, Result
from testbed.measurement import Measurement
from testbed.model.combine import state_hash
from testbed.rounds import federate
from tests.contract.harness import SerialRunner, run_of
from tests.drills import device


class Weathered(SerialRunner):
    """Does to a job what a node does that is told of a dropout."""

    def _do(self, job, payload):
        if "dropout" not in job.disturbances:
            return super()._do(job, payload)
        done = {"dropout": {**job.disturbances["dropout"], "dropped_out": True}}
        measured = Measurement(disturbances=done)
        return Result(job.id, job.client, job.round, UNREACHABLE, error="dropped out", measurement=measured), None


def disturbed_run(folder, declared, rounds, **config):
    run = run_of(Lora(rank=2), folder, rounds=rounds, steps=1, evaluate_every=9, **config)
    run.weather = parse(declared).settle(run.config.seed, [(client, device("here")) for client in range(4)])
    run.engine = Weathered(run.method, run.base, run.engine.folder)
    return run


def finished(run):
    return {(result.round, result.client) for result in run.folder.results() if result.finished}


def test_a_resumed_run_meets_the_weather_that_was_drawn(tmp_path):
    whole = disturbed_run(tmp_path / "whole", {"dropout": 0.5}, rounds=2, schedule="constant")
    half = disturbed_run(tmp_path / "half", {"dropout": 0.5}, rounds=2, schedule="constant")
    expected = federate(whole)
    federate(replace(half, config=replace(half.config, rounds=1)))
    resumed = federate(half)
    drawn = {(index, client) for index in range(2) for client in range(4) if not whole.weather.for_job(index, client)}
    assert finished(half) == finished(whole) == drawn
    assert 0 < len(drawn) < 8
    assert state_hash(resumed.tensors, {}) == state_hash(expected.tensors, {})


def test_rounds_in_which_all_drop_out_as_declared_do_not_end_a_run(tmp_path):
    run = disturbed_run(tmp_path, {"dropout": 1}, rounds=4)
    federate(run)
    assert [(each.participants, each.finished) for each in run.folder.rounds()] == [(4, 0)] * 4


def test_a_warm_up_undergoes_nothing(tmp_path):
    run = disturbed_run(tmp_path, {"dropout": 1}, rounds=1, warm_up=1)
    federate(run)
    by_kind = {"warm-up" in job.id: set(job.disturbances) for job in run.engine.jobs}
    assert by_kind == {True: set(), False: {"dropout"}}
