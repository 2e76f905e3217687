"""Jobs that really undergo what a run declares, through real agents; what was done stands in their measurement."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.job import FAILED, FINISHED, OUT_OF_MEMORY, TIMED_OUT, UNREACHABLE
from tests import drills
from tests.drills import MIB, device, engine, groups_of, job, processes_below, wait_until

MBIT = 125_000.0


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    yield
    wait_until(lambda: processes_below(tmp_path) == [])
    assert groups_of() == []


def undergoing(disturbances, identity="job-1", client=0, **scalars):
    return replace(job(identity, client, **scalars), disturbances=disturbances)


def run_one(running, what, payload=None, where="board"):
    ((result, update),) = running.run([(where, what, payload)])
    return result, update


def load_processes(folder):
    """The processes of a background load, by what only their command line has."""
    found = []
    for pid in processes_below(folder):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"held = b" in words:
            found.append(pid)
    return found


# ── dropout ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_client_drops_out_at_its_moment_and_the_others_go_on(tmp_path):
    steps = [["phase", "train"], ["step", 1, 4], ["step", 2, 4], ["step", 3, 4], ["wait_for_ever"]]
    gone = undergoing({"dropout": {"at": 0.6}}, steps=steps, update={"a": [10]})
    with engine(tmp_path, device("one"), device("two")) as running:
        sent = [("one", gone, None), ("one", job("job-2", 1), None), ("two", job("job-3", 2), None)]
        ended = {result.job: (result, update) for result, update in running.run(sent)}
    result, update = ended["job-1"]
    assert (result.outcome, result.phase, update, result.dropped_out) == (UNREACHABLE, "train", None, True)
    assert result.error == "it dropped out after step 3 of 4, as the run declares (dropout)"
    assert result.measurement.disturbances == {"dropout": {"at": 0.6, "dropped_out": True}}
    assert [ended[name][0].outcome for name in ("job-2", "job-3")] == [FINISHED, FINISHED]
    assert ended["job-2"][0].measurement.disturbances == {}
    assert not ended["job-2"][0].dropped_out


def test_a_client_that_tells_no_steps_drops_out_before_its_update_is_sent(tmp_path):
    quick = undergoing({"dropout": {"at": 0.01}}, steps=[["phase", "train"], ["progress"]], update={"a": [10]})
    with engine(tmp_path) as running:
        result, update = run_one(running, quick)
        after, _ = run_one(running, job("job-2"))
    assert (result.outcome, update) == (UNREACHABLE, None)
    assert result.error == "it dropped out with its work done, as the run declares (dropout)"
    assert not (tmp_path / "updates" / "job-1.safetensors").exists()
    assert after.outcome == FINISHED


def test_a_client_whose_trainer_fails_by_itself_has_not_dropped_out(tmp_path):
    broken = undergoing({"dropout": {"at": 0.9}}, steps=[["step", 1, 4], ["fail", "a bug"]])
    with engine(tmp_path) as running:
        result, _ = run_one(running, broken)
    assert (result.outcome, result.dropped_out) == (FAILED, False)
    assert result.error == "a bug (while it underwent, as the run declares: dropout)"


# ── straggler and thermal limit ───────────────────────────────────────────────────────────────────────────────────────
def held_back(running, declared, spin=0.7):
    """A job that spins: the part of a core that it had, and its measurement."""
    run_one(running, job("first"))  # so that the trainer is there
    result, _ = run_one(running, undergoing(declared, steps=[["phase", "train"], ["spin", spin]]))
    assert result.outcome == FINISHED, result.error
    return result.scalars["shares"][0], result.measurement


@pytest.mark.cgroup
def test_a_straggler_gets_its_part_of_the_processor_by_a_quota_and_no_longer(tmp_path):
    with engine(tmp_path, slowed=frozenset({"board"}), capped=True) as running:
        share, measured = held_back(running, {"straggler": {"slowdown": 4}})
        quotas = [path for group in groups_of() for path in group.glob("cpu.*")]
        (left,) = [each.read_text().split()[0] for each in quotas if each.name in ("cpu.cfs_quota_us", "cpu.max")]
    assert measured.disturbances["straggler"] == {
        "slowdown": 4, "by": "cpu_quota", "full_cores": 1.0, "stopped_seconds": 0.0,
    }  # fmt: skip
    assert share < 0.25 + 0.1  # a period may be begun with its whole quota
    assert left in ("-1", "max")


@pytest.mark.cgroup
def test_a_quota_of_the_budget_is_what_a_straggler_gets_a_part_of(tmp_path):
    small = device(cores=0.5)
    with engine(tmp_path, small, slowed=frozenset({"board"}), capped=True) as running:
        share, measured = held_back(running, {"straggler": {"slowdown": 2}})
        (left,) = [path.read_text() for group in groups_of() for path in group.glob("cpu.cfs_quota_us")] or ["50000"]
    assert measured.disturbances["straggler"]["full_cores"] == 0.5
    assert share < 0.25 + 0.1
    assert int(left) == 50_000


def test_without_a_group_a_straggler_is_stopped_and_goes_on(tmp_path):
    with engine(tmp_path) as running:
        share, measured = held_back(running, {"straggler": {"slowdown": 4}})
        assert run_one(running, job("free", steps=[["spin", 0.01]]))[0].outcome == FINISHED
    told = measured.disturbances["straggler"]
    assert told["by"] == "stop_continue"
    assert told["stopped_seconds"] > 0.3
    assert share < 0.25 + 0.1


def test_a_straggler_that_is_stopped_can_still_be_cancelled(tmp_path):
    with engine(tmp_path, options={"job_timeout_seconds": 0.5}) as running:
        result, _ = run_one(running, undergoing({"straggler": {"slowdown": 50}}, steps=[["spin", 60]]))
    assert result.outcome == TIMED_OUT
    assert "straggler" in result.error


def test_a_thermal_limit_holds_back_only_after_its_time_and_is_marked(tmp_path):
    declared = {"thermal_limit": {"after_seconds": 0.3, "slowdown": 10}}
    with engine(tmp_path) as running:
        run_one(running, job("first"))
        hot, _ = run_one(running, undergoing(declared, steps=[["take_time", 0.4], ["spin", 0.5]]))
        brief, _ = run_one(running, undergoing({"thermal_limit": {"after_seconds": 60, "slowdown": 10}}, "job-2"))
    assert hot.scalars["shares"][0] < 0.1 + 0.1
    told = hot.measurement.disturbances["thermal_limit"]
    assert 0.4 < told["slowed_seconds"] <= hot.measurement.seconds - 0.3 + 0.01
    assert "declared: thermal_limit" in hot.measurement.conditions.throttled
    assert brief.measurement.disturbances["thermal_limit"]["slowed_seconds"] == 0
    assert "declared: thermal_limit" not in (brief.measurement.conditions.throttled or ())


# ── slow link ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_slow_link_lets_nothing_pass_faster_than_its_rate_either_way(tmp_path):
    payload = tmp_path / "payload"
    payload.write_bytes(os.urandom(100_000))
    link = {"slow_link": {"bytes_per_second": 2 * MBIT, "delay_seconds": 0.1}}
    with engine(tmp_path) as running:
        run_one(running, job("first"))
        begun = time.monotonic()
        result, update = run_one(running, undergoing(link, update={"a": [20_000]}), payload)
        seconds = time.monotonic() - begun
        after, _ = run_one(running, job("job-2", update={"a": [20_000]}), payload)
    assert result.outcome == FINISHED
    assert (result.scalars["payload"], update.stat().st_size > 80_000) == (100_000, True)
    told = result.measurement.disturbances["slow_link"]
    assert told["down_bytes"] > 100_000
    assert told["up_bytes"] > 80_000
    for way in ("up", "down"):
        assert told[f"{way}_seconds"] >= told[f"{way}_bytes"] / (2 * MBIT) + 0.1 - 0.001
    assert seconds >= 180_000 / (2 * MBIT) + 0.2
    assert result.measurement.phase_seconds("receive") >= 90_000 / (2 * MBIT)
    assert result.measurement.phase_seconds("send") >= 70_000 / (2 * MBIT)
    assert (after.outcome, after.measurement.disturbances) == (FINISHED, {})


def test_a_slow_link_stays_slow_when_the_connection_is_lost_meanwhile(tmp_path):
    marker = tmp_path / "go"
    running = engine(tmp_path)

    def drop(*event):
        if event[2] == "load" and not marker.exists():
            marker.touch()
            running._lines["board"].attached.channel.sock.shutdown(2)

    running._lines["board"].attached.listener = drop
    link = {"slow_link": {"bytes_per_second": MBIT, "delay_seconds": 0.0}}
    with running:
        what = undergoing(link, steps=[["wait_for", str(marker)]], update={"a": [25_000]})
        result, _ = run_one(running, what)
    assert result.outcome == FINISHED, result.error
    assert result.measurement.phase_seconds("send") >= 95_000 / MBIT


# ── background load ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.cgroup
def test_a_background_load_works_inside_the_budget_and_is_gone_after_the_job(tmp_path):
    load = {"background_load": {"processes": 2, "memory_bytes": 20 * MIB}}
    what = undergoing(load, steps=[["touch", str(tmp_path / "began")], ["spin", 0.5]])
    seen = []

    def look(*event):
        if event[2] == "load":
            seen.extend(load_processes(tmp_path))

    with engine(tmp_path, options={"on_event": look}, capped=True) as running:
        result, _ = run_one(running, what)
        assert load_processes(tmp_path) == []
        after, _ = run_one(running, job("job-2"))
    assert result.outcome == FINISHED, result.error
    assert len(seen) == 2
    told = result.measurement.disturbances["background_load"]
    assert (told["processes"], told["memory_bytes"], told["ended_early"]) == (2, 20 * MIB, 0)
    assert told["cpu_seconds"] > 0.05
    peak = result.measurement.peak
    assert peak.lower_bytes <= peak.estimate_bytes < 20 * MIB < peak.upper_bytes  # the upper bound is the whole group's
    assert "background_load" in [phase.name for phase in result.measurement.phases]
    assert after.measurement.disturbances == {}


@pytest.mark.cgroup
def test_a_background_load_can_take_the_memory_that_a_trainer_needs(tmp_path):
    steps = [["phase", "train"], ["allocate", 30 * MIB]]
    load = {"background_load": {"processes": 1, "memory_bytes": 30 * MIB}}
    with engine(tmp_path, capped=True) as running:
        alone, _ = run_one(running, job("alone", steps=steps))
        beside, _ = run_one(running, undergoing(load, steps=steps))
        after, _ = run_one(running, job("job-2"))
        assert load_processes(tmp_path) == []
    assert (alone.outcome, beside.outcome, after.outcome) == (FINISHED, OUT_OF_MEMORY, FINISHED)
    assert beside.error.endswith("(while it underwent, as the run declares: background_load)")


@pytest.mark.cgroup
def test_a_background_load_does_not_outlive_an_agent_that_is_killed(tmp_path):
    seen = []

    def kill_it(*event):
        if event[2] == "load":
            seen.extend(load_processes(tmp_path))
            os.kill(drills.agent_pid(tmp_path), signal.SIGKILL)

    load = {"background_load": {"processes": 1, "memory_bytes": 0}}
    with engine(tmp_path, options={"on_event": kill_it}, capped=True) as running:
        result, _ = run_one(running, undergoing(load, steps=[["wait_for_ever"]]))
        assert len(seen) == 1
        wait_until(lambda: not drills.exists(seen[0]))
    assert result.outcome == UNREACHABLE
