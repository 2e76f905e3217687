"""The round loop under faults: whatever a client does, it costs its own update and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods.fedpruner import FedPruner
from methods.lora import Lora
from testbed.errors import PlanError
from testbed.job import OUT_OF_MEMORY
from testbed.measurement import Measurement, PeakMemory, PhaseMeasurement
from testbed.model.combine import state_hash
from testbed.model.footprint import Baseline
from testbed.rounds import draw_participants, federate, learning_rate
from testbed.run import RunConfig
from tests.contract.harness import SerialRunner, run_of

MIB = 1 << 20


class Faulty(SerialRunner):
    """Client 1 sends what `spoil` makes of its update's file and header."""

    spoil = staticmethod(lambda result, path: (result, path))

    def _do(self, job, payload):
        result, path = super()._do(job, payload)
        return self.spoil(result, path) if job.client == 1 else (result, path)


def faulty_run(tmp_path, spoil, **config):
    run = run_of(Lora(rank=2), tmp_path, rounds=1, **config)
    run.engine = Faulty(run.method, run.base, run.engine.folder)
    run.engine.spoil = spoil
    return run


def rewritten(change):
    """A spoiler that changes the update's tensors on disk, and tells their new shapes truthfully."""

    def spoil(result, path):
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        specs = tuple(
            replace(spec, shape=tuple(tensors[spec.name].shape)) for spec in result.tensors if spec.name in tensors
        )
        return replace(result, tensors=specs), path

    return spoil


def first(tensors):
    return min(tensors)


def put_nan(tensors):
    tensors[first(tensors)][0, 0] = torch.nan


def widen(tensors):
    tensors[first(tensors)] = torch.zeros(3, 3)


def corrupt(result, path):
    path.write_bytes(b"\xff" * 64)
    return result, path


def vanish(result, path):
    path.unlink()
    return result, path


def rename(result, path):
    return replace(result, tensors=(replace(result.tensors[0], name="somebody.else"), *result.tensors[1:])), path


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (rewritten(put_nan), "not finite"),
        (rewritten(widen), "expected a piece of"),
        (corrupt, "cannot be read"),
        (vanish, "cannot be read"),
        (rename, "no tensor of this run's state"),
        (lambda result, path: (result, None), "did not arrive"),
    ],
    ids=["nan", "wrong shape", "corrupt file", "vanished file", "unknown name", "nothing came"],
)
def test_an_update_that_must_not_be_combined_is_a_failed_job_with_its_cause(spoil, cause, tmp_path):
    run = faulty_run(tmp_path, spoil)
    state = federate(run)
    outcomes = {result.client: result for result in run.folder.results()}
    assert outcomes[1].outcome == "failed"
    assert cause in outcomes[1].error
    assert [outcomes[client].outcome for client in (0, 2, 3)] == ["finished"] * 3
    assert all(bool(tensor.isfinite().all()) for tensor in state.tensors.values())


def test_the_others_are_combined_as_if_the_bad_client_had_never_been(tmp_path):
    bad = federate(faulty_run(tmp_path / "bad", rewritten(put_nan)))
    absent = run_of(Lora(rank=2), tmp_path / "absent", rounds=1)
    absent.engine.absent = {1}
    without = federate(absent)
    assert state_hash(bad.tensors, {}) == state_hash(without.tensors, {})


def test_too_few_updates_leave_the_state_as_it_was_and_the_run_goes_on(tmp_path):
    run = run_of(Lora(rank=2), tmp_path, rounds=2, min_participants=4)
    start = run.method.start(run.base, run.work, [], run.config.seed, run.config.rounds)
    run.engine.absent = {3}
    assert state_hash(federate(run).tensors, {}) == state_hash(start.tensors, {})
    assert [record.finished for record in run.folder.rounds()] == [3, 3]


def test_a_run_in_which_nobody_finishes_is_given_up_with_the_causes(tmp_path):
    run = run_of(Lora(rank=2), tmp_path, rounds=9)
    run.engine.absent = {0, 1, 2, 3}
    with pytest.raises(PlanError, match=r"no client finished in 2 rounds in a row.*unreachable: no answer"):
        federate(run)
    assert len(run.folder.results()) == 8


def test_rounds_that_ended_a_run_as_hopeless_are_done_again(tmp_path):
    whole = federate(run_of(Lora(rank=2), tmp_path / "whole", rounds=3))
    run = run_of(Lora(rank=2), tmp_path / "mended", rounds=3)
    useful = run.engine.run

    def gone_after_the_first_round(jobs):
        run.engine.absent = {0, 1, 2, 3} if jobs[0][1].round else set()
        return useful(jobs)

    run.engine.run = gone_after_the_first_round
    with pytest.raises(PlanError, match="in 2 rounds in a row"):
        federate(run)
    assert run.folder.forget_empty_rounds()
    assert not run.folder.forget_empty_rounds()
    assert [record.round for record in run.folder.rounds()] == [0]
    assert {result.round for result in run.folder.results()} == {0}
    run.engine.run, run.engine.absent = useful, set()
    again = federate(run)
    assert [record.finished for record in run.folder.rounds()] == [4, 4, 4]
    assert state_hash(again.tensors, {}) == state_hash(whole.tensors, {})


def test_refit_gives_a_client_that_ran_out_of_memory_a_smaller_submodel(tmp_path):
    run = run_of(FedPruner(rank=2), tmp_path, rounds=2, refit=True)
    run.plan = replace(
        run.plan,
        clients=tuple(
            replace(c, predicted_bytes=300 * MIB, predicted_peak_bytes=300 * MIB, budget_bytes=320 * MIB)
            for c in run.plan.clients
        ),
    )
    run.baselines = {"here": Baseline(200 * MIB, 0)}

    def out_of_memory(result, path):
        if len(run.engine.jobs[-1].submodel.blocks) < 4:
            return result, path
        peak = PeakMemory(lower_bytes=300 * MIB, estimate_bytes=310 * MIB)
        measured = Measurement((PhaseMeasurement("train", 1.0, peak),), 1.0, 320 * MIB)
        return replace(result, outcome=OUT_OF_MEMORY, phase="train", error="killed", measurement=measured), None

    run.engine = Faulty(run.method, run.base, run.engine.folder)
    run.engine.spoil = out_of_memory
    federate(run)
    kept = {(job.round, job.client): job for job in run.engine.jobs}
    assert len(kept[0, 1].submodel.blocks) == 4
    assert kept[1, 1].scalars["keep"] == [[["attention", "feed_forward"], 3]]
    assert run.folder.plan["refits"][0]["index"] == 1


@pytest.mark.parametrize(("index", "rate"), [(0, 1.0), (5, 0.55), (10, 0.1)])
def test_the_learning_rate_falls_as_a_cosine_over_rounds(index, rate):
    config = RunConfig("lora", rounds=11, learning_rate=1.0, final_learning_rate=0.1)
    assert learning_rate(config, index) == pytest.approx(rate)


@pytest.mark.parametrize(("participants", "count"), [(1.0, 8), (0.5, 4), (3, 3), (0.01, 1)])
def test_participants_are_a_fraction_or_a_count_and_the_same_for_the_same_seed(participants, count):
    config = RunConfig("lora", participants=participants, seed=3)
    drawn = draw_participants(config, range(8), range(8), 2)
    assert len(drawn) == count
    assert drawn == sorted(draw_participants(config, range(8), range(8), 2))


def test_who_cannot_take_part_does_not_change_the_order_in_which_the_others_are_drawn():
    config = RunConfig("lora", participants=3, seed=1)
    everybody = draw_participants(config, range(8), range(8), 0)
    able = [client for client in range(8) if client != everybody[0]]
    assert set(everybody[1:]) <= set(draw_participants(config, range(8), able, 0))
