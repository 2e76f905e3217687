"""A run that is given ends: which of them is met, what counts, and what is refused."""

from __future__ import annotations

import pytest

from testbed.config import load_inventory
from testbed.costs import RoundCost
from testbed.energy import Energy
from testbed.errors import PlanError, UsageError
from testbed.options import until_settings
from testbed.run import Plan, RunConfig
from testbed.stopping import FACT, Stopping, check_until, first_reaching, stop_after, stop_text, within_budget
from testbed.store import RunFolder
from tests.run_records import add_rounds, finished, record


def costs(*accuracies, joules=True):
    """Ten seconds, fifty joules and a thousand bytes a round."""
    return [
        RoundCost(
            round=index,
            seconds=10.0 * (index + 1),
            energy=Energy(50.0 * (index + 1), 10.0) if joules else None,
            bytes_down=900 * (index + 1),
            bytes_up=100 * (index + 1),
            quality=None if accuracy is None else {"accuracy": accuracy, "loss": 1.0, "examples": 400},
        )
        for index, accuracy in enumerate(accuracies)
    ]


# ── which end is met ────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("until", "by", "reached", "counted"),
    [
        ({"accuracy": 0.6}, "accuracy", 0.6, 2),
        ({"seconds": 25}, "seconds", 30.0, 1),
        ({"joules": 120}, "joules", 150.0, 1),
        ({"bytes": 2500}, "bytes", 3000.0, 1),
        ({"seconds": 30}, "seconds", 30.0, 2),  # spent to the last second: the round lies within
        ({"accuracy": 0.6, "seconds": 25}, "seconds", 30.0, 1),  # what is beyond the budget reaches nothing
        ({"seconds": 28, "bytes": 2500}, "seconds", 30.0, 1),
    ],
)
def test_a_run_ends_when_a_target_is_reached_or_a_budget_is_spent(until, by, reached, counted):
    known = costs(0.4, 0.5, 0.6)
    stop = stop_after(until, known)
    assert (stop.by, stop.round, stop.reached, stop.counted) == (by, 2, reached, counted)
    assert stop.accuracy == known[counted].accuracy
    assert stop_after(until, known[:2]) is None


def test_a_run_without_ends_goes_on():
    assert stop_after({}, costs(0.9)) is None
    assert stop_after({"seconds": 1}, []) is None


def test_a_target_is_not_reached_by_a_round_that_was_not_evaluated():
    assert stop_after({"accuracy": 0.1}, costs(None)) is None
    assert first_reaching(0.5, costs(None, 0.5, 0.4, 0.9)).round == 1
    assert first_reaching(0.95, costs(None, 0.5, 0.4, 0.9)) is None


def test_under_a_budget_that_the_first_round_exceeds_nothing_counts():
    stop = stop_after({"seconds": 5}, costs(0.4))
    assert (stop.counted, stop.accuracy) == (None, None)
    assert within_budget({"seconds": 5}, costs(0.4)) is None
    assert "no evaluated round lies within" in stop_text(stop.to_json())


def test_joules_that_are_not_known_end_in_words_and_not_in_a_run_without_an_end():
    with pytest.raises(PlanError, match=r"the energy of round 1 is not known.*set a budget of seconds"):
        stop_after({"joules": 100}, costs(0.4, joules=False))
    assert within_budget({"joules": 100}, costs(0.4, joules=False)) is None


@pytest.mark.parametrize(
    ("until", "text"),
    [
        (
            {"seconds": 15},
            "ended after round 2: 20.0 s of 15.0 s are spent; what counts is round 1, with accuracy 0.400",
        ),
        (
            {"joules": 90},
            "ended after round 2: 100.0 J of 90.0 J are spent; what counts is round 1, with accuracy 0.400",
        ),
        ({"bytes": 2000}, "ended after round 2: 2 KiB of 2 KiB are spent; what counts is round 2, with accuracy 0.500"),
        ({"accuracy": 0.45}, "ended after round 2: accuracy 0.500 has reached the target of 0.450"),
    ],
)
def test_why_a_run_ended_is_told_in_a_line(until, text):
    assert stop_text(stop_after(until, costs(0.4, 0.5)).to_json()) == text


# ── round by round, and after a resume ──────────────────────────────────────────────────────────────────────────────
def test_what_was_spent_before_a_resume_counts(tmp_path):
    run = RunFolder.create(tmp_path, "lora-20260314-150926-5f3a", record())
    for index in range(3):
        run.record_result(finished(index, 0, "orin-1", 700))
    add_rounds(run, [0.4, 0.5, 0.6])
    whole = Stopping({"bytes": 3000}, run)  # 1250 bytes a round
    assert [whole.ended(rounds, last=False) for rounds in (0, 1, 2, 3)] == [False, False, False, True]
    resumed = Stopping({"bytes": 3000}, run)
    assert resumed.ended(2, last=False) is False
    assert resumed.ended(3, last=False) is True
    stop = run.status.facts[FACT]
    assert (stop["by"], stop["round"], stop["reached"], stop["counted"]) == ("bytes", 2, 3750.0, 1)


def test_all_rounds_done_without_an_end_is_noted_too(tmp_path):
    run = RunFolder.create(tmp_path, "lora-20260314-150926-5f3a", record())
    add_rounds(run, [0.4, 0.5])
    assert Stopping({"accuracy": 0.9}, run).ended(2, last=True)
    assert run.status.facts[FACT]["by"] == "rounds"
    assert "all rounds are done, and no end was met" in stop_text(run.status.facts[FACT])


def test_without_ends_nothing_is_read_or_written(tmp_path):
    run = RunFolder.create(tmp_path, "lora-20260314-150926-5f3a", record())
    (run.path / "rounds.jsonl").mkdir()  # to be read would be an error
    stopping = Stopping({}, run)
    assert (stopping.ended(3, last=False), stopping.ended(6, last=True)) == (False, True)
    assert FACT not in run.status.facts


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acuracy=0.5", 'did you mean "accuracy"'),
        ("accuracy", "expected NAME=VALUE"),
        ("seconds=soon", "--until seconds: expected a number, got 'soon'"),
        ("bytes=50 MB", 'expected bytes such as "4 GiB", got "50 MB"'),
        ("accuracy=60", "expected a share above 0 and up to 1"),
        ("seconds=0", "expected a number above 0"),
        ("joules=nan", "expected a number above 0"),
    ],
)
def test_a_wrong_end_is_refused_with_the_way_out(text, message):
    with pytest.raises(UsageError) as error:
        RunConfig("lora", until=until_settings([text]))
    assert message in str(error.value)


def test_bytes_have_a_unit():
    assert until_settings(["bytes=50 MiB", "seconds=120"]) == {"bytes": 50 * 2**20, "seconds": 120.0}


@pytest.mark.parametrize("amount", ["bytes=1000", "bytes=5e7"])
def test_bytes_without_a_unit_are_refused(amount):
    """50 was meant as MiB more often than as bytes."""
    with pytest.raises(UsageError, match=r'bytes: expected bytes such as "4 GiB"'):
        until_settings([amount])


def test_joules_need_a_meter_on_every_device_that_takes_part(tmp_path):
    (tmp_path / "lab.yaml").write_text(
        "devices:\n  a: {kind: emulated, profile: raspberry_pi_5_4gb, budget: {memory: 640 MiB}}\n"
    )
    inventory = load_inventory(tmp_path / "lab.yaml")
    clients = [dict(client, device="a") for client in record().plan["clients"][:1]]
    plan = Plan.from_json(clients)
    with pytest.raises(PlanError, match=r"a budget of 300.0 J needs a meter on .* there is none on a; give them one"):
        check_until(RunConfig("lora", until={"joules": 300}), inventory, plan)
    check_until(RunConfig("lora", until={"seconds": 300}), inventory, plan)
