"""What a user can ask of boards beside and between runs, on a virtual lab: status, logs, stop, unlock, deploy."""

from __future__ import annotations

import signal

import pytest

from testbed.lab.link import LinkShape
from tests.drills import wait_until
from tests.lab_runs import (
    BLOCK_BYTES,
    BOARDS,
    FOLDER,
    ORIN,
    PI4,
    PI5,
    advises,
    agent_pids,
    console,
    traffic,
    wait_for_jobs,
)
from tests.virtual_lab import as_new

pytestmark = [pytest.mark.slow, pytest.mark.lab, pytest.mark.usefixtures("boards_put_right")]


def states(study, runs, code=0):
    """What `testbed status` says of the boards, by name."""
    told = study.desk.json("status", "--inventory", study.inventory, "--runs", study.desk.folder / runs, code=code)
    return told["runs"], {each["device"]: each for each in told["devices"]}


def agents_of(boards):
    return {name: [run["run"] for run in board["runs"] if run["agent_alive"]] for name, board in boards.items()}


def holders_of(boards):
    return {name: board["holder"] and board["holder"]["run"] for name, board in boards.items()}


def test_a_run_under_way_is_seen_has_the_boards_for_itself_and_can_be_stopped(study):
    desk, runs = study.desk, study.desk.folder / "live"
    with desk.started("run-method", "fedpruner", *study.words("live", "--rounds", "500")) as process:
        run = wait_for_jobs(study, "live", process).name

        [told], boards = states(study, "live")
        assert (told["run"], told["state"], told["controller"]) == (run, "running", process.pid)
        assert agents_of(boards) == {name: [run] for name in BOARDS}
        assert holders_of(boards) == dict.fromkeys(BOARDS, run)

        before = {name: sorted(console(study.lab.host(name), f"ls {FOLDER}/runs").split()) for name in BOARDS}
        refused = desk.testbed("run-method", "fedpruner", *study.words("other"), code=1).text
        for name in BOARDS:
            assert f"device {name} is held by run {run}" in refused
        assert advises(refused, f"stop {run}")
        assert advises(refused, f"unlock {PI5}")
        assert before == {name: sorted(console(study.lab.host(name), f"ls {FOLDER}/runs").split()) for name in BOARDS}

        unlock = desk.testbed("unlock", PI5, "--inventory", study.inventory, code=1).text
        assert "its agent is at work" in unlock
        assert "--force" in unlock
        deployed = desk.testbed("deploy", "lora", *study.words(None, "--only", PI5), code=1).text
        assert f"{PI5} is held by run {run}" in deployed

        assert f"go on: testbed run-method --resume {run}" in desk.testbed("stop", run, "--runs", runs).text
        process.communicate(timeout=60)
    assert process.returncode == 130
    [told], boards = states(study, "live")
    assert (told["state"], told["controller"]) == ("interrupted", None)
    assert agents_of(boards) == {name: [] for name in BOARDS}
    assert holders_of(boards) == dict.fromkeys(BOARDS)


def test_what_a_trainer_writes_is_shown_and_followed(study, undisturbed):
    log = f"{FOLDER}/runs/{undisturbed.name}/spool/trainer.log"
    words = ("logs", PI5, "--run", undisturbed.name, "--runs", undisturbed.parent)
    # What the run left there may have been cleared up, as the pages of the documentation do.
    console(study.lab.host(PI5), f"mkdir -p {log.rpartition('/')[0]} && echo the first line >>{log}")
    assert study.desk.testbed(*words).out.endswith("the first line\n")
    with study.desk.started(*words, "--follow") as process:
        for line in process.stdout:
            if line == "the first line\n":
                break
        console(study.lab.host(PI5), f"echo and another >>{log}")
        assert process.stdout.readline() == "and another\n"
        process.send_signal(signal.SIGINT)
        process.wait()
    assert process.returncode == 130


def test_what_a_dead_controller_left_at_work_is_seen_and_ended(study):
    desk, runs = study.desk, study.desk.folder / "dead"
    with desk.started("run-method", "fedpruner", *study.words("dead")) as process:
        run = wait_for_jobs(study, "dead", process).name
        process.send_signal(signal.SIGKILL)
        process.wait()
    [told], boards = states(study, "dead")
    assert (told["run"], told["state"]) == (run, "interrupted")
    assert agents_of(boards) == {name: [run] for name in BOARDS}

    taken = desk.testbed("unlock", PI4, "--inventory", study.inventory, "--force").text
    assert f"device {PI4} is free; run {run}" in taken
    assert agent_pids(study.lab.host(PI4)) == []

    ended = desk.testbed("stop", run, "--runs", runs).out
    assert f"device {ORIN}: its agent was ended" in ended
    assert f"device {PI4}: no agent of the run was there" in ended
    _, boards = states(study, "dead")
    assert agents_of(boards) == {name: [] for name in BOARDS}
    assert holders_of(boards) == dict.fromkeys(BOARDS)

    words = ("clean", "--inventory", study.inventory, "--runs", runs)
    desk.testbed(*words)  # it is not finished: what it needs stays
    assert all(run in console(host, f"ls {FOLDER}/runs") for host in study.lab.hosts)
    desk.testbed(*words, "--run", run)
    assert not any(run in console(host, f"ls {FOLDER}/runs") for host in study.lab.hosts)


# ── deploy ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def received_bytes(host):
    return traffic(host)[0]


def deploy(study, *more, code=0, inventory=None):
    """What `testbed deploy` tells of the boards, by name."""
    told = study.desk.json("deploy", "fedpruner", *study.words(None, *more, inventory=inventory), code=code)
    return {cargo["device"]: cargo for cargo in told}


def blocks_of(told):
    return {name: cargo["model_bytes"] // BLOCK_BYTES for name, cargo in told.items()}


@pytest.fixture
def empty_boards(study):
    study.desk.testbed("clean", "--inventory", study.inventory, "--all", "--contents")
    for host in study.lab.hosts:
        assert console(host, f"ls {FOLDER}/content {FOLDER}/code 2>/dev/null", code=None) == ""
    return study.lab.hosts


def test_deploy_tells_what_travels_sends_it_and_then_nothing_travels(study, empty_boards):
    without_a_probe = deploy(study, "--dry-run", "--set", "selection=even")
    assert blocks_of(without_a_probe) == {ORIN: 4, PI5: 4, PI4: 2}
    would = deploy(study, "--dry-run")
    assert blocks_of(would) == {ORIN: 4, PI5: 4, PI4: 4}  # a probe passes over the whole model, block by block
    assert all(cargo["code_bytes"] > 0 and cargo["shard_bytes"] > 0 for cargo in would.values())
    assert all(console(host, f"ls {FOLDER}/content 2>/dev/null", code=None) == "" for host in empty_boards)

    before = {host.name: received_bytes(host) for host in empty_boards}
    assert deploy(study) == would
    for host in empty_boards:
        assert would[host.name]["bytes"] < received_bytes(host) - before[host.name] < 1.1 * would[host.name]["bytes"]
        assert console(host, f"ls {FOLDER}/lock.json 2>/dev/null", code=None) == ""

    assert [cargo["bytes"] for cargo in deploy(study, "--dry-run").values()] == [0, 0, 0]


def test_a_deploy_that_is_cut_off_goes_on_where_it_stopped(study, empty_boards):
    host = study.lab.host(PI5)
    words = study.words(None, "--only", PI5, inventory=study.attentive())
    host.shape(LinkShape(bits_per_second=80_000_000))
    with study.desk.started("deploy", "fedpruner", *words) as process:
        partial = f"cat {FOLDER}/content/.*.partial 2>/dev/null | wc -c"
        wait_until(lambda: process.poll() is not None or int(console(host, partial)) > BLOCK_BYTES // 2)
        host.cut()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "is lost: it has not answered for" in err
    there = int(console(host, partial))
    as_new(host)
    before = received_bytes(host)
    sent = deploy(study, "--only", PI5)[PI5]
    assert 0 < received_bytes(host) - before < 1.03 * (sent["bytes"] - there)
    before = received_bytes(host)
    assert deploy(study, "--only", PI5)[PI5]["bytes"] == 0
    assert received_bytes(host) - before < 200_000
