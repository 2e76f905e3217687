"""What a run has cost by the end of each round, from the run's folder alone."""

from dataclasses import replace

import pytest

from testbed.costs import round_costs
from testbed.job import FINISHED, Result
from testbed.measurement import Conditions, Measurement, PhaseMeasurement, PowerTrace
from testbed.method import EVALUATE
from testbed.report import summarise
from testbed.store import RunFolder
from tests.run_records import add_rounds, finished, planned, quality, record

SECONDS = 4.0


def metered(round_index, on, watts, *, client=0):
    """A job of 4 s of training at that power, sampled ten times a second."""
    rows = tuple((number / 10, 0.0, watts) for number in range(-1, 42))
    trace = PowerTrace("ina3221", "dc_input", ("IN",), ("IN",), ((0.0, 0.0, 0.0, 0.0),), 0.1, rows)
    begun = 100.0 + 10 * round_index
    measured = Measurement(
        (PhaseMeasurement("train", SECONDS, begun_seconds=0.0),), SECONDS, bytes_down=1000, bytes_up=250,
        power=(trace,), conditions=Conditions(), begun_monotonic_seconds=begun, begun_unix_seconds=1e9 + begun,
    )  # fmt: skip
    return Result(f"run-r{round_index}-c{client}", client, round_index, FINISHED, device=on, measurement=measured)


@pytest.fixture
def run(tmp_path):
    """A run of two boards, both with room for the model."""
    clients = [planned(0, "orin-1", 800, 740, 12), planned(1, "pi-1", 800, 740, 12)]
    return RunFolder.create(tmp_path, "lora-20260314-150926-5f3a", record(clients=clients))


def store(run, *results):
    for result in results:
        run.record_result(result)


def test_costs_add_up_from_round_to_round(run):
    store(run, *(finished(number, client, "orin-1", 700) for number in range(3) for client in range(2)))
    add_rounds(run, [None, 0.4, 0.6])
    costs = round_costs(run)
    assert [cost.round for cost in costs] == [0, 1, 2]
    assert [cost.seconds for cost in costs] == [10.0, 20.0, 30.0]
    assert [cost.bytes_down for cost in costs] == [2000, 4000, 6000]
    assert [cost.bytes_up for cost in costs] == [500, 1000, 1500]
    assert [cost.accuracy for cost in costs] == [None, 0.4, 0.6]


def test_the_energy_of_the_last_round_is_that_of_the_report(run):
    for number in range(3):
        store(run, metered(number, "orin-1", 5.0), metered(number, "pi-1", 2.0 + number, client=1))
    add_rounds(run, [0.2, 0.4, 0.6])
    costs = round_costs(run)
    assert [cost.joules for cost in costs] == pytest.approx([4 * 7.0, 4 * (7 + 8), 4 * (7 + 8 + 9)])
    assert costs[-1].energy == summarise(run).energy.gross
    assert costs[-1].energy.valid


def test_a_device_without_a_meter_leaves_no_energy_from_its_first_job_on(run):
    store(run, metered(0, "orin-1", 5.0), metered(1, "orin-1", 5.0), finished(1, 1, "pi-1", 700))
    add_rounds(run, [0.2, 0.4])
    assert [cost.joules for cost in round_costs(run)] == [pytest.approx(20.0), None]


def test_a_job_that_brought_no_samples_makes_the_energy_invalid_and_says_so(run):
    store(run, metered(0, "orin-1", 5.0), finished(0, 1, "orin-1", 700))
    add_rounds(run, [0.2])
    (cost,) = round_costs(run)
    assert not cost.energy.valid
    assert "orin-1: 1 of 2 jobs brought no samples" in cost.energy.problems


def test_a_round_that_asked_nobody_costs_its_time_and_no_more(run):
    store(run, metered(0, "orin-1", 5.0))
    add_rounds(run, [0.2, None])
    first, second = round_costs(run)
    assert (second.seconds, second.joules, second.bytes) == (20.0, first.joules, first.bytes)


def test_before_any_job_there_is_no_energy(run):
    add_rounds(run, [None])
    assert round_costs(run)[0].energy is None


def test_evaluation_costs_nothing_here_or_on_a_device(run):
    asked = replace(metered(0, "orin-1", 50.0), job="run-r0-c0-evaluate", kind=EVALUATE)
    store(run, metered(0, "orin-1", 5.0), asked)
    figures = {"learning_rate": 0.002, "deployed_bytes": 70, "quality": quality(0.5)}
    run.record_round(0, seconds=10.0, evaluation_seconds=4.0, **figures)
    run.record_round(1, seconds=10.0, **figures)  # of an older record, which does not tell
    first, second = round_costs(run)
    assert (first.seconds, second.seconds) == (6.0, 16.0)
    assert first.joules == pytest.approx(20.0)
    assert first.bytes == 1000 + 250 + 70


def test_a_round_that_was_run_again_counts_once(run):
    add_rounds(run, [0.2, 0.3])
    run.record_round(1, seconds=2.0, learning_rate=0.002, quality=quality(0.4))
    assert [(cost.seconds, cost.accuracy) for cost in round_costs(run)] == [(10.0, 0.2), (12.0, 0.4)]
