"""Jobs through real agents, and every way in which they can end; nothing may be left behind but the spools."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from testbed import attached
from testbed.errors import LimitError, UsageError
from testbed.job import FAILED, FINISHED, OUT_OF_MEMORY, TIMED_OUT, UNREACHABLE
from testbed.node.tensors import read_tensor_header
from tests import drills
from tests.drills import MIB, ROOT, device, engine, exists, groups_of, job, processes_below, wait_until


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    yield
    wait_until(lambda: processes_below(tmp_path) == [])
    assert groups_of() == []


def run_all(running, *jobs):
    """Results by job id; each job is (device, Job) or (device, Job, payload)."""
    sent = [(where, what, payload[0] if payload else None) for where, what, *payload in jobs]
    return {result.job: (result, update) for result, update in running.run(sent)}


def run_one(running, what, payload=None):
    return run_all(running, ("board", what, payload))[what.id]


# ── how it should go ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_job_goes_out_and_its_update_comes_back(tmp_path):
    payload = tmp_path / "payload"
    payload.write_bytes(os.urandom(3 * MIB))
    what = job(steps=[["phase", "train"], ["progress"], ["phase", "write"]], update={"a": [300, 1000], "b": []})
    heard = []
    with engine(tmp_path, options={"on_event": lambda *event: heard.append(event)}) as running:
        result, update = run_one(running, what, payload)
    assert (result.outcome, result.error, result.phase, result.device) == (FINISHED, None, None, "board")
    assert (result.job, result.client, result.round, result.kind) == (what.id, 0, 3, "train")
    assert (result.examples, result.tokens, result.scalars["payload"]) == (7, 70, 3 * MIB)
    assert read_tensor_header(update) == {"a": ("F32", (300, 1000)), "b": ("F32", ())}
    names = [phase.name for phase in result.measurement.phases]
    assert names == ["idle", "receive", "start", "load", "train", "write", "send"]
    assert result.measurement.bytes_down > 3 * MIB
    assert update.stat().st_size < result.measurement.bytes_up < update.stat().st_size + 2000
    assert result.measurement.measurement_bytes > 500
    assert result.measurement.limit_bytes is None
    assert result.measurement.peak.upper_bytes is None
    assert result.measurement.peak.estimate_bytes > MIB
    assert [phase for _, _, phase, _ in heard if phase] == ["start", "load", "train", "write"]
    assert [progress["loss"] for *_, progress in heard if progress] == [0.5]


def test_the_trainer_stays_from_job_to_job_and_from_run_to_run(tmp_path):
    with engine(tmp_path) as running:
        pids = [run_one(running, job(f"job-{number}"))[0].scalars["pid"] for number in range(3)]
        assert exists(pids[0])
    assert len(set(pids)) == 1
    assert not exists(pids[0])


def test_devices_work_side_by_side(tmp_path):
    ready = [str(tmp_path / name) for name in ("one", "two")]
    with engine(tmp_path, device("one"), device("two"), options={"parallel": 2}) as running:
        ended = run_all(
            running,
            ("one", job("job-1", steps=[["touch", ready[0]], ["wait_for", ready[1]]])),
            ("two", job("job-2", client=1, steps=[["touch", ready[1]], ["wait_for", ready[0]]])),
        )
    assert [ended[name][0].outcome for name in ("job-1", "job-2")] == [FINISHED, FINISHED]


def test_one_after_another_a_device_begins_when_the_other_has_unloaded(tmp_path):
    heard = []
    options = {"parallel": 1, "unload_between": True, "on_event": lambda name, *_: heard.append(name)}
    with engine(tmp_path, device("one"), device("two"), options=options) as running:
        names = [("one", 1), ("two", 2), ("one", 3), ("two", 4)]
        ended = run_all(running, *[(name, job(f"job-{i}", client=i)) for name, i in names])
    assert list(ended) == ["job-1", "job-3", "job-2", "job-4"]
    assert heard == sorted(heard)


def test_a_result_waits_on_the_node_until_the_next_one_is_asked_for(tmp_path):
    with engine(tmp_path) as running:
        results = running.run([("board", job(), None)])
        next(results)
        spooled = tmp_path / "nodes" / "board" / "spool" / "jobs" / "job-1"
        assert spooled.exists()
        assert list(results) == []
        wait_until(lambda: not spooled.exists())


def test_content_is_put_once_and_what_is_known_to_be_there_is_not_asked_for(tmp_path):
    block = tmp_path / "block"
    block.write_bytes(bytes(1000))
    options = {"content_path": lambda content: block}
    with engine(tmp_path, options=options) as running:
        node = running.node("board")
        for number in range(3):
            assert run_one(running, job(f"job-{number}"))[0].outcome == FINISHED
        assert running.deployed_bytes == 3 * 1000  # configuration, outside and shard
        assert node.holds(["c", "o", "s"])
        with pytest.raises(UsageError, match="board"):
            running.node("bored")
    with engine(tmp_path, options=options) as running:
        assert run_one(running, job("job-3"))[0].outcome == FINISHED
        assert running.deployed_bytes == 0


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.cgroup
def test_above_its_cap_a_trainer_is_killed_and_the_run_goes_on(tmp_path):
    hog = job("job-1", steps=[["phase", "train"], ["allocate", 200 * MIB]])
    with engine(tmp_path, capped=True) as running:
        ended = run_all(running, ("board", hog), ("board", job("job-2")))
        assert running.caps()["board"]["limit_bytes"] == 64 * MIB
        assert running.caps()["board"]["version"] in ("v1", "v2")
    result, update = ended["job-1"]
    assert (result.outcome, result.phase, update) == (OUT_OF_MEMORY, "train", None)
    assert result.error.startswith("out of memory in phase train: the kernel killed the trainer at a peak of 64.0 MiB")
    assert result.measurement.limit_bytes == 64 * MIB
    assert 50 * MIB < result.measurement.peak.estimate_bytes <= 64 * MIB
    assert result.measurement.peak.upper_bytes == 64 * MIB
    assert ended["job-2"][0].outcome == FINISHED


@pytest.mark.cgroup
def test_a_process_of_the_trainer_that_is_killed_for_memory_ends_the_job_too(tmp_path):
    with engine(tmp_path, capped=True) as running:
        result, _ = run_one(running, job(steps=[["phase", "train"], ["fork_hog", 200 * MIB]]))
    assert (result.outcome, result.phase) == (OUT_OF_MEMORY, "train")


@pytest.mark.cgroup
def test_each_phase_has_peaks_of_its_own(tmp_path):
    steps = [["phase", "small"], ["phase", "large"], ["allocate", 30 * MIB], ["free"], ["phase", "after"]]
    with engine(tmp_path, capped=True) as running:
        result, _ = run_one(running, job(steps=steps))
    peaks = {phase.name: phase.peak for phase in result.measurement.phases}
    for bound in ("estimate_bytes", "upper_bytes"):
        small, large, after = (getattr(peaks[name], bound) for name in ("small", "large", "after"))
        assert large - small > 29 * MIB
        assert after < large - 29 * MIB
    assert result.measurement.largest.name == "large"
    assert result.measurement.baseline_bytes < 20 * MIB
    assert peaks["large"].lower_bytes <= peaks["large"].upper_bytes


def test_where_no_group_can_be_made_the_run_does_not_begin(tmp_path):
    with (
        engine(tmp_path, capped=True, cgroup_parent=tmp_path / "nowhere") as running,
        pytest.raises(LimitError, match="--no-cap"),
    ):
        run_one(running, job())


# ── what can go wrong ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_job_that_takes_too_long_is_cancelled(tmp_path):
    slow = job("job-1", steps=[["phase", "train"], ["wait_for_ever"]])
    with engine(tmp_path, options={"job_timeout_seconds": 0.5}) as running:
        ended = run_all(running, ("board", slow))
        assert (ended["job-1"][0].outcome, ended["job-1"][0].phase) == (TIMED_OUT, "train")
        assert ended["job-1"][0].error == "it was cancelled in phase train, over its job_timeout_seconds (0.50 s)"
        running._timeout = None
        assert run_one(running, job("job-2"))[0].outcome == FINISHED


def test_an_agent_that_is_killed_makes_its_job_unreachable_and_the_next_one_gets_a_new_agent(tmp_path):
    marker = tmp_path / "here"
    jobs = [("board", job("job-1", steps=[["touch", str(marker)], ["wait_for_ever"]])), ("board", job("job-2"))]

    def kill(name, client, phase, progress):
        if progress:
            os.kill(drills.agent_pid(tmp_path), signal.SIGKILL)

    jobs[0][1].scalars["steps"].insert(1, ["progress"])
    with engine(tmp_path, options={"on_event": kill}) as running:
        ended = run_all(running, *jobs)
    assert ended["job-1"][0].outcome == UNREACHABLE
    assert "board" in ended["job-1"][0].error
    assert ended["job-2"][0].outcome == FINISHED
    assert not exists(json.loads(marker.read_text())["pid"])


@pytest.mark.cgroup
def test_what_an_agent_left_that_was_killed_is_removed(tmp_path):
    def kill(name, client, phase, progress):
        if phase == "train":
            os.kill(drills.agent_pid(tmp_path), signal.SIGKILL)

    with engine(tmp_path, capped=True, options={"on_event": kill}) as running:
        result, _ = run_one(running, job(steps=[["phase", "train"], ["wait_for_ever"]]))
        assert result.outcome == UNREACHABLE
        assert len(groups_of()) == 1
    assert groups_of() == []


def test_an_agent_that_is_frozen_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(attached, "CANCEL_SECONDS", 0.2)

    def freeze(name, client, phase, progress):
        if phase == "train":
            os.kill(drills.agent_pid(tmp_path), signal.SIGSTOP)

    with engine(tmp_path, options={"on_event": freeze, "job_timeout_seconds": 1.0}) as running:
        result, _ = run_one(running, job(steps=[["phase", "train"], ["wait_for_ever"]]))
        assert result.outcome == TIMED_OUT
        running._timeout = None
        assert run_one(running, job("job-2"))[0].outcome == FINISHED


def test_a_connection_that_drops_is_taken_up_again(tmp_path):
    marker = tmp_path / "go"
    running = engine(tmp_path)

    def drop(name, client, phase, progress):
        if progress and not marker.exists():
            marker.touch()
            running._lines["board"].attached.channel.sock.shutdown(2)

    running._lines["board"].attached.listener = drop
    steps = [["count", str(tmp_path / "runs")], ["progress"], ["wait_for", str(marker)]]
    with running:
        result, update = run_one(running, job(steps=steps, update={"x": [5]}))
    assert result.outcome == FINISHED
    assert update.exists()
    assert (tmp_path / "runs").read_text() == "ran\n"


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ({"corrupt": "truncate"}, "describes 24 bytes of tensors, and 19 are there"),
        ({"corrupt": "garbage"}, "update.*safetensors"),
        ({"corrupt": "header"}, "not a complete safetensors file"),
        ({"said": {"x": [3, 2]}}, "not those that the result names"),
        ({"said": {"x": [2, 3], "y": [1]}}, "not those that the result names"),
        ({"said": {}}, "not those that the result names"),
        ({"result": {"examples": -1}}, "not what was asked for"),
        ({"result": {"examples": "many"}}, "not what was asked for"),
        ({"result": {"scalars": []}}, "not what was asked for"),
        ({"result": {"tensors": [{"name": "x"}]}}, "cannot be read"),
        (
            {"result": {"tensors": [{"name": "x", "dtype": "F32", "shape": [2, 3], "ranges": [[0, 2], [0, 4]]}]}},
            "do not have its shape",
        ),
    ],
)
def test_an_update_that_is_not_what_it_says_it_is(tmp_path, script, cause):
    with engine(tmp_path) as running:
        result, update = run_one(running, job(update={"x": [2, 3]}, **script))
        assert (result.outcome, update) == (FAILED, None)
        assert re.search(cause, result.error)
        assert run_one(running, job("job-2", update={"x": [2]}))[0].outcome == FINISHED
    assert [path.name for path in (tmp_path / "updates").iterdir()] == ["job-2.safetensors"]


def test_an_update_that_changed_on_its_way_is_refused(tmp_path):
    sent = job(update={"x": [50]})
    spooled = tmp_path / "nodes" / "board" / "spool" / "jobs" / sent.id / "update.safetensors"
    with engine(tmp_path) as running:
        results = running.run([("board", sent, None)])
        result, _ = next(results)
        assert result.outcome == FINISHED
        data = bytearray(spooled.read_bytes())
        data[-1] ^= 1
        spooled.write_bytes(data)
        results.close()
        result, _ = run_one(running, sent)  # the same job: what waits is sent again
    assert result.outcome == FAILED
    assert "hash" in result.error


def without_a_disk(reason):
    """CI has what the drill needs, or fails."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB where the node's spool will be."""
    spool = tmp_path / "nodes" / "board" / "spool"
    spool.mkdir(parents=True)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        without_a_disk("mounting a small file system needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "testbed", str(spool)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        without_a_disk(f"no file system can be mounted here: {done.stderr}")
    yield spool
    subprocess.run(["umount", "-l", str(spool)], check=True)


def test_a_full_disk_fails_the_job_that_needed_it_and_no_other(tmp_path, small_disk):
    payload = tmp_path / "payload"
    payload.write_bytes(bytes(4 * MIB))
    with engine(tmp_path) as running:
        pid = None
        ended = run_all(
            running,
            ("board", job("too-large"), payload),
            ("board", job("fills-it", steps=[["phase", "send"], ["fill_disk"]])),
            ("board", job("small", update={"x": [4]})),
        )
        pid = drills.agent_pid(tmp_path)
        assert exists(pid)
    for name in ("too-large", "fills-it"):
        assert ended[name][0].outcome == FAILED
        assert ended[name][0].error == f"no space left in {small_disk}"
    assert ended["small"][0].outcome == FINISHED


# ── a controller that ends ────────────────────────────────────────────────────────────────────────────────────────────
CONTROLLER = """
import sys
from pathlib import Path
from tests.drills import device, engine, job
folder, orphan, capped = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "capped"
steps = [["phase", "train"], ["count", str(folder / "runs")], ["touch", str(folder / "here")],
         ["wait_for", str(folder / "go")]]
with engine(folder, orphan_seconds=orphan, capped=capped) as running:
    for result, update in running.run([("board", job(steps=steps, update={"x": [3]}), None)]):
        print(result.outcome, flush=True)
"""


def same_job(folder):
    steps = [["phase", "train"], ["count", str(folder / "runs")], ["touch", str(folder / "here")]]
    return job(steps=[*steps, ["wait_for", str(folder / "go")]], update={"x": [3]})


def controller(folder, orphan_seconds, capped="uncapped"):
    arguments = [str(folder), str(orphan_seconds), capped]
    process = subprocess.Popen([sys.executable, "-c", CONTROLLER, *arguments], cwd=ROOT, stdout=subprocess.PIPE)
    wait_until((folder / "here").exists)
    return process


@pytest.mark.cgroup
def test_a_controller_that_is_killed_leaves_only_the_spool(tmp_path):
    with controller(tmp_path, 0.2, "capped") as process:
        assert groups_of()
        process.kill()
    wait_until(lambda: processes_below(tmp_path) == [])
    wait_until(lambda: groups_of() == [])
    assert (tmp_path / "nodes" / "board" / "spool" / "jobs").exists()


@pytest.mark.cgroup
def test_ctrl_c_leaves_nothing(tmp_path):
    with controller(tmp_path, 30, "capped") as process:
        process.send_signal(signal.SIGINT)
        process.wait(drills.PATIENCE_SECONDS)
        assert processes_below(tmp_path) == []
        assert groups_of() == []


def test_a_controller_that_comes_back_attaches_to_the_job_that_went_on(tmp_path):
    with controller(tmp_path, 30) as process:
        process.kill()
    with engine(tmp_path) as running:
        (tmp_path / "go").touch()
        result, update = run_one(running, same_job(tmp_path))
    assert (result.outcome, update.exists()) == (FINISHED, True)
    assert (tmp_path / "runs").read_text() == "ran\n"


def test_a_result_that_came_after_the_controller_had_gone_is_collected_from_the_spool(tmp_path):
    with controller(tmp_path, 2) as process:
        process.kill()
    (tmp_path / "go").touch()
    wait_until((tmp_path / "nodes" / "board" / "spool" / "jobs" / "job-1" / "outcome.json").exists)
    wait_until(lambda: processes_below(tmp_path) == [])
    with engine(tmp_path) as running:
        result, update = run_one(running, same_job(tmp_path))
    assert (result.outcome, update.exists()) == (FINISHED, True)
    assert (tmp_path / "runs").read_text() == "ran\n"


def test_a_job_that_was_interrupted_is_done_by_the_next_controller_as_if_it_had_never_begun(tmp_path):
    steps = [["count", str(tmp_path / "runs")], ["progress"], ["wait_for", str(tmp_path / "go")]]

    def interrupt(name, client, phase, progress):
        if progress:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), engine(tmp_path, options={"on_event": interrupt}) as running:
        run_one(running, job(steps=steps))
    (tmp_path / "go").touch()
    with engine(tmp_path) as running:
        assert run_one(running, job(steps=steps))[0].outcome == FINISHED
    assert (tmp_path / "runs").read_text() == "ran\n" * 2
