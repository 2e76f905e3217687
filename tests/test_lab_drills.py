"""What happens to links, hosts, agents, disks and clocks while devices train, on hosts of a virtual lab.

Real agents under real caps; their trainers do what a job tells them, so that it is known how often each one ran.
"""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from testbed import attached, code_wheel, pulse
from testbed import ssh as over_ssh
from testbed.assigned import file_hash
from testbed.devices import _board
from testbed.fleet import reached
from testbed.job import FAILED, FINISHED, OUT_OF_MEMORY, UNREACHABLE
from tests.drills import MIB, job, wait_until
from tests.lab_runs import (
    DRILL,
    FOLDER,
    Mishap,
    agent_pids,
    console,
    counted,
    furnish_for_drills,
    idle_devices,
    idle_engine,
    lasting,
    ours,
    release,
    times_begun,
    touch,
    traffic,
)
from tests.virtual_lab import as_new

pytestmark = pytest.mark.lab
ONE, TWO, THREE = "board-1", "board-2", "board-3"
LOST = attached.LINK_LOST
DAY_SECONDS = 86_400


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return code_wheel.build(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def devices(plain_lab):
    return idle_devices(plain_lab)


@pytest.fixture(scope="module")
def facts(devices):
    return furnish_for_drills(devices)


@pytest.fixture(autouse=True)
def nothing_is_left(plain_lab):
    """Every host is put right; no agent, no trainer, no cgroup and no lock of ours stays on it."""
    for host in plain_lab.hosts:
        console(host, f"rm -rf {DRILL}/*job* {FOLDER}/runs")
    yield
    for host in plain_lab.hosts:
        as_new(host)
        wait_until(lambda host=host: ours(host) == [])
        assert console(host, f"ls {FOLDER}/lock.json 2>/dev/null", code=None) == ""
        assert console(host, "find /sys/fs/cgroup -type d -name 'testbed-run-*'") == ""


@pytest.fixture
def impatient(monkeypatch):
    """A host that does not answer is given up after a second, where a user's engine waits for ten."""
    monkeypatch.setattr(over_ssh.connect, "__kwdefaults__", {"timeout_seconds": 1.0})


@pytest.fixture
def quick(monkeypatch, impatient):
    """Silence is noticed in less than half a second, where a user's engine takes 8.5."""
    monkeypatch.setattr(pulse, "PING_SECONDS", 0.1)
    monkeypatch.setattr(_board, "_PATIENCE", replace(_board._PATIENCE, silence_seconds=0.3))


@pytest.fixture
def engine(tmp_path, devices, facts, wheel):
    def make(listener=lambda *_: None, there=devices, more=None, **changes):
        options = {"on_event": listener, **(more or {})}
        return idle_engine(tmp_path, there, facts, options=options, wheel=wheel, **changes)

    return make


def outcomes(ended):
    return {result.job: result.outcome for result, _ in ended}


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.usefixtures("quick")
def test_a_link_that_is_cut_and_mended_costs_nothing_that_was_done(plain_lab, engine):
    hosts = {host.name: host for host in plain_lab.hosts}
    lost = []

    def mend():
        lost.append(times_begun(hosts[ONE], "job-1"))
        hosts[ONE].mend()
        for number, name in enumerate((ONE, TWO, THREE), 1):
            release(hosts[name], f"job-{number}")

    mishap = Mishap(ONE, hosts[ONE].cut, mend)
    with engine(mishap) as running:
        jobs = [
            (name, job(f"job-{number}", client=number, steps=lasting(f"job-{number}"), update={"x": [5000]}), None)
            for number, name in enumerate((ONE, TWO, THREE), 1)
        ]
        ended = list(running.run(jobs))
    assert running.problems == ()
    assert {result.outcome for result, _ in ended} == {FINISHED}
    assert all(update.exists() for _, update in ended)
    assert lost == [1]
    assert mishap.heard[-2:] == [LOST, "train"]  # it was looked for, and found in the middle of its work
    assert [times_begun(host, f"job-{number}") for number, host in enumerate(plain_lab.hosts, 1)] == [1, 1, 1]


@pytest.mark.usefixtures("quick")
def test_what_ends_while_the_link_is_cut_waits_on_the_device(plain_lab, engine):
    host = plain_lab.host(ONE)
    outcome = f"{FOLDER}/runs/run/spool/jobs/job-1/outcome.json"

    def let_it_end_then_mend():
        release(host, "job-1")
        wait_until(lambda: console(host, f"cat {outcome}", code=None))
        host.mend()

    mishap = Mishap(ONE, host.cut, let_it_end_then_mend)
    with engine(mishap) as running:
        [(result, update)] = running.run([(ONE, job("job-1", steps=lasting("job-1"), update={"x": [5000]}), None)])
    assert (result.outcome, update.stat().st_size > 20_000, times_begun(host, "job-1")) == (FINISHED, True, 1)


@pytest.mark.usefixtures("quick")
def test_a_device_that_reboots_is_given_again_only_what_had_not_ended(plain_lab, engine):
    host = plain_lab.host(ONE)

    def reboot():
        host.reboot()
        host.wait_up()
        release(host, "job-2")

    mishap = Mishap(ONE, reboot)
    with engine(mishap) as running:
        jobs = [
            (ONE, job("job-1", steps=counted("job-1")), None),
            (ONE, job("job-2", steps=lasting("job-2"), update={"x": [5]}), None),
            (TWO, job("job-3", client=1, steps=counted("job-3")), None),
        ]
        ended = list(running.run(jobs))
    assert outcomes(ended) == {"job-1": FINISHED, "job-2": FINISHED, "job-3": FINISHED}
    assert [times_begun(host, name) for name in ("job-1", "job-2")] == [1, 2]
    assert times_begun(plain_lab.host(TWO), "job-3") == 1


@pytest.mark.usefixtures("quick")
def test_a_device_that_reboots_while_it_waits_for_the_others_has_its_next_job(plain_lab, engine):
    """It was the first to be done with the round."""
    host = plain_lab.host(ONE)

    def reboot():
        host.reboot()
        host.wait_up()
        release(plain_lab.host(TWO), "job-2")

    with engine(Mishap(TWO, reboot)) as running:
        jobs = [
            (ONE, job("job-1", steps=counted("job-1")), None),
            (TWO, job("job-2", client=1, steps=[["wait_for", f"{DRILL}/job-2.alone"], *lasting("job-2")]), None),
        ]
        results = running.run(jobs)
        assert next(results)[0].job == "job-1"
        touch(plain_lab.host(TWO), f"{DRILL}/job-2.alone")
        assert [result.outcome for result, _ in results] == [FINISHED]
        [(result, _)] = running.run([(ONE, job("job-3", steps=counted("job-3")), None)])
    assert (result.outcome, times_begun(host, "job-3")) == (FINISHED, 1)
    assert running.problems == ()


def silence_told(result):
    """The seconds of silence after which the engine gave a link up, as the user is told."""
    return float(re.search(r"its agent has not answered for (\d+) s", result.error)[1])


@pytest.mark.usefixtures("quick")
def test_a_link_that_is_cut_for_good_costs_its_own_job_and_no_other(plain_lab, engine):
    host = plain_lab.host(ONE)

    def let_the_others_go():
        release(plain_lab.host(TWO), "job-2")
        release(plain_lab.host(THREE), "job-3")

    mishap = Mishap(ONE, host.cut, let_the_others_go)
    with engine(mishap, reconnect_seconds=0.5) as running:
        jobs = [
            (name, job(f"job-{number}", client=number, steps=lasting(f"job-{number}"), update={"x": [3]}), None)
            for number, name in enumerate((ONE, TWO, THREE), 1)
        ]
        ended = {result.job: (result, update) for result, update in running.run(jobs)}
    assert outcomes(ended.values()) == {"job-1": UNREACHABLE, "job-2": FINISHED, "job-3": FINISHED}
    assert silence_told(ended["job-1"][0]) <= 10
    assert ended["job-1"][0].error.startswith(f"device {ONE}: its agent has not answered for ")
    assert f"{ONE}" in " ".join(running.problems)
    host.mend()
    release(host, "job-1")
    with engine() as running:  # it comes back for the next round, and its old work is none of it
        [(again, _)] = running.run([(ONE, job("job-9", client=1, steps=counted("job-9")), None)])
    assert again.outcome == FINISHED


@pytest.mark.usefixtures("impatient")
def test_a_host_that_stands_still_is_given_up_within_ten_seconds_of_silence(plain_lab, engine):
    host = plain_lab.host(ONE)
    mishap = Mishap(ONE, host.freeze, lambda: release(plain_lab.host(TWO), "job-2"))
    with engine(mishap, reconnect_seconds=0.5) as running:
        jobs = [
            (ONE, job("job-1", steps=lasting("job-1")), None),
            (TWO, job("job-2", client=1, steps=lasting("job-2")), None),
        ]
        ended = {result.job: result for result, _ in running.run(jobs)}
        host.thaw()
        release(host, "job-1")
    assert {name: result.outcome for name, result in ended.items()} == {"job-1": UNREACHABLE, "job-2": FINISHED}
    assert 0 < silence_told(ended["job-1"]) <= 10


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_trainer_above_its_budget_is_out_of_memory_and_the_others_go_on(plain_lab, engine):
    with engine() as running:
        jobs = [
            (ONE, job("job-1", steps=[["phase", "train"], ["allocate", 200 * MIB]]), None),
            (ONE, job("job-2", steps=counted("job-2")), None),
            (TWO, job("job-3", client=1, steps=counted("job-3")), None),
        ]
        ended = {result.job: result for result, _ in running.run(jobs)}
    assert {name: result.outcome for name, result in ended.items()} == {
        "job-1": OUT_OF_MEMORY,
        "job-2": FINISHED,
        "job-3": FINISHED,
    }
    killed = ended["job-1"]
    assert (killed.phase, killed.measurement.limit_bytes) == ("train", 64 * MIB)
    assert "the kernel killed the trainer" in killed.error
    assert "its limit is 64.0 MiB" in killed.error


def test_out_of_memory_is_told_within_a_second_of_its_beginning(plain_lab, engine):
    """From the first byte too many to the result at the controller; the best of three, where this machine is busy."""
    host, late = plain_lab.host(ONE), []
    steps = [["phase", "train"], ["touch", f"{DRILL}/job-begins"], ["allocate", 200 * MIB]]
    with engine() as running:
        for number in range(3):
            [(result, _)] = running.run([(ONE, job(f"job-{number}", steps=steps), None)])
            now = time.time()  # of the kernel that the host has, too
            assert result.outcome == OUT_OF_MEMORY
            late.append(now - float(console(host, f"stat -c %.Y {DRILL}/job-begins")))
    assert min(late) < 1.0, late


def test_an_agent_that_is_killed_costs_its_job_and_the_next_gets_another(plain_lab, engine):
    host = plain_lab.host(ONE)

    def kill_agent():
        [pid] = agent_pids(host)
        console(host, f"kill -KILL {pid}")

    with engine(Mishap(ONE, kill_agent)) as running:
        jobs = [
            (ONE, job("job-1", steps=lasting("job-1")), None),
            (ONE, job("job-2", steps=counted("job-2")), None),
            (TWO, job("job-3", client=1, steps=counted("job-3")), None),
        ]
        ended = {result.job: result for result, _ in running.run(jobs)}
    assert outcomes((result, None) for result in ended.values()) == {
        "job-1": UNREACHABLE, "job-2": FINISHED, "job-3": FINISHED,
    }  # fmt: skip
    assert ended["job-1"].error == f"device {ONE}: its agent was killed while it had the job"


# ── disks ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def small_disk(plain_lab):
    """The testbed's folder of a host on a disk of 8 MiB."""
    host = plain_lab.host(ONE)
    console(host, f"mkdir -p {FOLDER} && mount -t tmpfs -o size=8m,uid=1000,gid=1000,mode=755 tmpfs {FOLDER}")
    yield host
    console(host, f"umount -l {FOLDER}")


def test_a_disk_that_is_full_when_the_run_begins_keeps_only_its_own_device_away(small_disk, engine):
    console(small_disk, f"dd if=/dev/zero of={FOLDER}/filler bs=1M 2>/dev/null", code=None)
    with engine() as running:
        assert list(running.hold()) == [ONE]
        jobs = [(ONE, job("job-1"), None), (TWO, job("job-2", client=1, steps=counted("job-2")), None)]
        ended = {result.job: result for result, _ in running.run(jobs)}
        assert (ended["job-1"].outcome, ended["job-2"].outcome) == (FAILED, FINISHED)
        assert "no space left" in ended["job-1"].error
        console(small_disk, f"rm {FOLDER}/filler")
        [(again, _)] = running.run([(ONE, job("job-3", steps=counted("job-3")), None)])
    assert again.outcome == FINISHED


def test_a_payload_that_the_disk_does_not_take_is_a_failed_job_that_names_the_disk(tmp_path, small_disk, engine):
    payload = tmp_path / "payload"
    payload.write_bytes(bytes(24 * MIB))
    with engine() as running:
        jobs = [
            (ONE, job("job-1", steps=counted("job-1")), payload),
            (ONE, job("job-2", steps=counted("job-2")), None),
            (TWO, job("job-3", client=1, steps=counted("job-3")), payload),
        ]
        ended = {result.job: result for result, _ in running.run(jobs)}
    assert outcomes((result, None) for result in ended.values()) == {
        "job-1": FAILED, "job-2": FINISHED, "job-3": FINISHED,
    }  # fmt: skip
    assert ended["job-1"].error == f"no space left in {FOLDER}/runs/run/spool"
    assert times_begun(small_disk, "job-1") == 0


def test_an_update_that_the_disk_does_not_take_is_a_failed_job_that_names_the_disk(small_disk, engine):
    with engine() as running:
        jobs = [
            (ONE, job("job-1", steps=[["phase", "train"], ["fill_disk"]]), None),
            (ONE, job("job-2", steps=counted("job-2")), None),
        ]
        ended = {result.job: result for result, _ in running.run(jobs)}
    assert outcomes((result, None) for result in ended.values()) == {"job-1": FAILED, "job-2": FINISHED}
    assert ended["job-1"].error == f"no space left in {FOLDER}/runs/run/spool"


def test_blocks_that_the_disk_does_not_take_are_a_failed_job_that_names_the_disk(tmp_path, small_disk, engine):
    block = tmp_path / "block"
    block.write_bytes(bytes(24 * MIB))
    options = {"content_path": lambda content: block}
    with engine(more=options) as running:
        jobs = [(ONE, job("job-1"), None), (TWO, job("job-2", client=1), None)]
        ended = {result.job: result for result, _ in running.run(jobs)}
    assert outcomes((result, None) for result in ended.values()) == {"job-1": FAILED, "job-2": FINISHED}
    assert "No space left on device" in ended["job-1"].error
    assert ONE in ended["job-1"].error


# ── sites ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_a_site_needs_crosses_its_uplink_once(tmp_path, plain_lab, devices, engine):
    """What both boards lack goes to one, and from there to the other."""
    near, far = plain_lab.host(ONE), plain_lab.host(TWO)
    block = tmp_path / "block"
    block.write_bytes(os.urandom(8 * MIB))
    content = file_hash(block)
    what = replace(job("job-1"), config=content, outside=content, shard=content)
    behind = replace(devices[1], access=replace(devices[1].access, via=ONE))
    before = [traffic(host) for host in (near, far)]
    with engine(there=[devices[0], behind], more={"content_path": lambda _: block}) as running:
        ended = list(running.run([(ONE, what, None), (TWO, replace(what, id="job-2", client=1), None)]))
    assert outcomes(ended) == {"job-1": FINISHED, "job-2": FINISHED}
    (near_in, near_out), (far_in, far_out) = (
        [now - then for now, then in zip(traffic(host), was, strict=True)]
        for host, was in zip((near, far), before, strict=True)
    )
    assert all(8 * MIB < count < 12 * MIB for count in (near_in, near_out, far_in)), (near_in, near_out, far_in)
    assert far_out < 2 * MIB


# ── clocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────
LIBFAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
#: Everything of the testbed on a host believes what a file says about the time of day; what counts from the start of
#: the machine stays the kernel's, as when somebody sets a clock.
WITH_A_CLOCK = f"""\
#!/bin/sh
export LD_PRELOAD={LIBFAKETIME} FAKETIME_TIMESTAMP_FILE={DRILL}/clock FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1
exec {sys.executable} "$@"
"""


@pytest.fixture
def with_a_clock(plain_lab, devices):
    """A device whose time of day can be set, and the verb that sets it."""
    if LIBFAKETIME is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("libfaketime is not installed")
    host, python = plain_lab.host(ONE), f"{DRILL}/python"
    console(host, f"echo +0d >{DRILL}/clock && cat >{python} <<'end'\n{WITH_A_CLOCK}end\nchmod 755 {python}")
    return replace(devices[0], python=python), lambda step: console(host, f"echo {step} >{DRILL}/clock")


@pytest.mark.parametrize("step", ["+400d", "-400d"])
def test_a_clock_that_is_set_in_mid_job_changes_no_measurement_and_no_outcome(plain_lab, with_a_clock, engine, step):
    device, set_clock = with_a_clock
    host = plain_lab.host(ONE)

    def set_and_release():
        set_clock(step)
        release(host, "job-1")

    begun = time.monotonic()
    steps = [["now"], *lasting("job-1"), ["phase", "after"], ["now"]]
    with engine(Mishap(ONE, set_and_release), [device], more={"job_timeout_seconds": 60}) as running:
        jobs = [
            (ONE, job("job-1", steps=steps, update={"x": [3]}), None),
            (ONE, job("job-2", steps=[["now"]]), None),
        ]
        ended = {result.job: result for result, _ in running.run(jobs)}
        with reached(device) as remote:
            holder = remote.survey()["holder"]
    elapsed = time.monotonic() - begun
    assert {name: result.error for name, result in ended.items()} == {"job-1": None, "job-2": None}
    before, after = ended["job-1"].scalars["now"]
    assert abs(after - before) > 300 * DAY_SECONDS  # its time of day was another one from then on
    assert all(0 <= phase.seconds < elapsed for phase in ended["job-1"].measurement.phases)
    assert 0 <= holder["age_seconds"] < elapsed
    assert (times_begun(host, "job-1"), holder["stale"]) == (1, False)
