"""The same engine over SSH: what it sends, what it survives, and what the user is told when it cannot go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from testbed import attached, code_wheel, fact_sheets, pulse
from testbed.assigned import file_hash
from testbed.cli import main
from testbed.connection import LocalConnection
from testbed.devices import make_node
from testbed.errors import BoardError, DeviceError, HostKeyError, LockedError
from testbed.fleet import reached
from testbed.inventory import Access
from testbed.job import FINISHED, UNREACHABLE
from testbed.provision.hold import Hold
from tests import drills
from tests.drills import MIB, ROOT, job, processes_below, wait_until
from tests.ssh_server import SshServer

pytestmark = pytest.mark.sshd


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return code_wheel.build(tmp_path_factory.mktemp("wheels"))


@pytest.fixture
def server(tmp_path):
    with SshServer(tmp_path / "server") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    yield
    wait_until(lambda: agents_below(tmp_path) == [])
    assert drills.groups_of() == []


def agents_below(folder):
    """Agents and trainers, and nothing of the server itself."""
    return [pid for pid in processes_below(folder) if b"sshd" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def board(server, name="board", kind="generic", **changes):
    plain = drills.device(name)
    there = str(server.folder / "device")
    return replace(plain, kind=kind, access=server.access, python=sys.executable, folder=there, **changes)


def engine(folder, server, wheel, *devices, options=None, **changes):
    given = {"code": (str(drills.TRAINERS),), "wheel": wheel, **changes}
    return drills.engine(folder, *(devices or (board(server),)), options=options, **given)


def run_one(running, what, payload=None, device="board"):
    [ended] = running.run([(device, what, payload)])
    return ended


def spool(server):
    return server.folder / "device" / "runs" / "run" / "spool"


def agent_pid(server):
    return json.loads((spool(server) / "agent.state").read_text())["pid"]


def test_a_job_goes_out_and_its_update_comes_back(tmp_path, server, wheel):
    payload = tmp_path / "payload"
    payload.write_bytes(os.urandom(3 * MIB))
    heard = []
    with engine(tmp_path, server, wheel, options={"on_event": lambda *event: heard.append(event)}) as running:
        result, update = run_one(running, job(steps=[["phase", "train"]], update={"a": [300, 1000]}), payload)
        assert (server.folder / "device" / "lock.json").exists()
    assert (result.outcome, result.error, result.device) == (FINISHED, None, "board")
    assert result.scalars["payload"] == 3 * MIB
    assert update.stat().st_size > 1.2e6
    assert result.measurement.bytes_down > 3 * MIB
    assert [phase for _, _, phase, _ in heard if phase] == ["start", "load", "train"]
    assert not (server.folder / "device" / "lock.json").exists()


def test_what_a_run_declares_is_undergone_on_a_board_too(tmp_path, server, wheel):
    declared = {
        "straggler": {"slowdown": 4},
        "slow_link": {"bytes_per_second": 250_000.0, "delay_seconds": 0.05},
        "background_load": {"processes": 1, "memory_bytes": 0},
    }
    what = replace(job(steps=[["spin", 0.3]], update={"a": [20_000]}), disturbances=declared)
    with engine(tmp_path, server, wheel) as running:
        result, _ = run_one(running, what)
    assert result.outcome == FINISHED, result.error
    told = result.measurement.disturbances
    assert told["straggler"]["by"] == "stop_continue"
    assert told["straggler"]["stopped_seconds"] > 0.1
    assert told["slow_link"]["up_seconds"] >= 80_000 / 250_000
    assert told["slow_link"]["down_bytes"] > 0
    assert told["background_load"]["cpu_seconds"] > 0


def test_agent_and_trainer_are_those_of_the_wheel_and_no_installed_ones(tmp_path, server, wheel):
    code = server.folder / "device" / "code" / wheel.sha256
    with engine(tmp_path, server, wheel) as running:
        result, _ = run_one(running, job())
        command = Path(f"/proc/{agent_pid(server)}/cmdline").read_text()
    assert result.scalars["code"] == str(code / "testbed" / "__init__.py")
    assert f"sys.path.insert(0, {str(code)!r})" in command


def test_what_is_there_is_not_sent_again_by_a_later_run_either(tmp_path, server, wheel):
    block = tmp_path / "block"
    block.write_bytes(os.urandom(2 * MIB))
    options = {"content_path": lambda content: block}
    with engine(tmp_path, server, wheel, options=options) as running:
        assert run_one(running, job("job-1"))[0].outcome == FINISHED
        first = running.deployed_bytes
        assert run_one(running, job("job-2"))[0].outcome == FINISHED
        assert running.deployed_bytes == first == 3 * 2 * MIB + wheel.path.stat().st_size
    with engine(tmp_path, server, wheel, options=options) as running:
        assert run_one(running, job("job-3"))[0].outcome == FINISHED
        assert running.deployed_bytes == 0


def test_devices_emulated_on_a_server_share_it_and_need_no_lock(tmp_path, server, wheel):
    there = [replace(board(server), name=name, kind="emulated") for name in ("one", "two")]
    facts = {name: {"board": {"cores": 2, "memory_bytes": 1 << 30}} for name in ("one", "two")}
    marks = [str(tmp_path / name) for name in ("one", "two")]
    with engine(tmp_path, server, wheel, *there, facts=facts) as running:
        jobs = [
            ("one", job("job-1", steps=[["touch", marks[0]], ["wait_for", marks[1]]]), None),
            ("two", job("job-2", client=1, steps=[["touch", marks[1]], ["wait_for", marks[0]]]), None),
        ]
        assert {result.outcome for result, _ in running.run(jobs)} == {FINISHED}
        assert {path.name for path in (server.folder / "device").iterdir()} == {"code", "content", "runs"}


@pytest.mark.parametrize("takes_part", [True, False])
def test_what_a_site_needs_crosses_the_uplink_once_and_shards_go_their_own_way(tmp_path, server, wheel, takes_part):
    files = {name: tmp_path / name for name in ("config", "outside", "shard")}
    for path in files.values():
        path.write_bytes(os.urandom(MIB))
    hashes = {name: file_hash(path) for name, path in files.items()}
    paths = {hashes[name]: path for name, path in files.items()}
    what = replace(job(), config=hashes["config"], outside=hashes["outside"], shard=hashes["shard"])
    with SshServer(tmp_path / "other", alias="near") as near:
        gate = board(server, "gate")
        other = board(near, "other")
        other = replace(other, access=replace(other.access, via="gate"))
        devices = [gate, other] if takes_part else [other]
        settings = {"private": frozenset({hashes["shard"]}), "others": () if takes_part else (gate,)}
        with engine(tmp_path, server, wheel, *devices, options={"content_path": paths.get}, **settings) as running:
            assert run_one(running, what, device="other")[0].outcome == FINISHED
            sent = running.deployed_bytes
        size = wheel.path.stat().st_size
        assert sent == 2 * (size + 2 * MIB) + MIB  # to the gate, from there to the other, and its shard
        at_gate = {path.name for path in (server.folder / "device" / "content").iterdir()}
        assert at_gate == {wheel.sha256, hashes["config"], hashes["outside"]}
        assert not (server.folder / "device" / "lock.json").exists()
        with engine(tmp_path, server, wheel, *devices, options={"content_path": paths.get}, **settings) as running:
            assert run_one(running, replace(what, id="job-2"), device="other")[0].outcome == FINISHED
            assert running.deployed_bytes == 0


def test_where_the_way_through_another_device_fails_content_is_sent_directly(tmp_path, server, wheel, caplog):
    block = tmp_path / "block"
    block.write_bytes(os.urandom(MIB))
    with SshServer(tmp_path / "other", alias="near") as near:
        gate, other = board(server, "gate"), board(near, "other")
        other = replace(other, access=replace(other.access, via="gate"))
        server.stop()
        options = {"content_path": lambda content: block}
        with engine(tmp_path, server, wheel, other, options=options, others=(gate,)) as running:
            assert run_one(running, job(), device="other")[0].outcome == FINISHED
    assert "other: sent directly" in caplog.text


# ── links, agents and controllers that fail ───────────────────────────────────────────────────────────────────────────
class Mender:
    """Breaks the link once, when the first progress comes, and does what is to be done when that was noticed."""

    def __init__(self, folder, break_it, when_lost=lambda: None):
        self.heard = []
        self.steps = [
            ["phase", "train"],
            ["count", str(folder / "runs")],
            ["progress"],
            ["wait_for", str(folder / "go")],
        ]
        self._folder, self._break, self._when_lost = folder, break_it, when_lost
        self._broken = False

    def __call__(self, name, client, phase, progress):
        self.heard.append(phase or "progress")
        if progress and not self._broken:
            self._broken = True
            self._break()
        if phase == attached.LINK_LOST:
            self._when_lost()
            (self._folder / "go").touch()

    def ran_once(self):
        return (self._folder / "runs").read_text() == "ran\n"


def test_a_link_that_is_cut_and_mended_costs_nothing_that_was_done(tmp_path, server, wheel):
    mender = Mender(tmp_path, server.stop, server.start)
    with engine(tmp_path, server, wheel, options={"on_event": mender}) as running:
        result, update = run_one(running, job(steps=mender.steps, update={"x": [5]}))
    assert (result.outcome, update.exists(), mender.ran_once()) == (FINISHED, True, True)
    assert mender.heard[-3:] == ["progress", attached.LINK_LOST, "train"]


def test_a_dead_link_is_noticed_within_ten_seconds(tmp_path):
    node = make_node(replace(drills.device(), kind="generic", access=Access("board")), drills.settings(tmp_path))
    assert pulse.PING_SECONDS + node.silence_seconds <= 10


def test_a_host_that_stands_still_is_noticed_by_its_silence(tmp_path, server, wheel, monkeypatch):
    monkeypatch.setattr(pulse, "PING_SECONDS", 0.1)
    mender = Mender(tmp_path, server.freeze, server.thaw)
    with engine(tmp_path, server, wheel, options={"on_event": mender}) as running:
        running._lines["board"].attached._pulse = pulse.Pulse(silence_seconds=0.3)
        result, _ = run_one(running, job(steps=mender.steps))
    assert (result.outcome, mender.ran_once()) == (FINISHED, True)
    assert attached.LINK_LOST in mender.heard


def test_a_link_that_is_cut_for_good_costs_its_own_job_and_no_other(tmp_path, server, wheel):
    mender = Mender(tmp_path, server.stop)
    with SshServer(tmp_path / "other") as second:
        devices = [board(server), board(second, "other")]
        options = {"on_event": lambda name, *rest: mender(name, *rest) if name == "board" else None}
        for each, where in zip(devices, (server, second), strict=True):
            assert each.folder == str(where.folder / "device")
        devices[1] = replace(devices[1], name="other")
        with engine(tmp_path, server, wheel, *devices, options=options, reconnect_seconds=0.5) as running:
            jobs = [
                ("board", job("job-1", steps=mender.steps), None),
                ("other", job("job-2", client=1, steps=[["wait_for", str(tmp_path / "go")]]), None),
            ]
            ended = {result.job: result for result, _ in running.run(jobs)}
            os.kill(agent_pid(server), signal.SIGTERM)
        assert [problem[:5] for problem in running.problems] == ["board"]
    assert ended["job-2"].outcome == FINISHED
    assert ended["job-1"].outcome == UNREACHABLE
    assert ended["job-1"].error.startswith("device board: the connection to its agent ended; board:")


def test_an_agent_that_is_killed_ends_its_job_and_the_next_one_gets_a_new_agent(tmp_path, server, wheel):
    mender = Mender(tmp_path, lambda: os.kill(agent_pid(server), signal.SIGKILL))
    with engine(tmp_path, server, wheel, options={"on_event": mender}) as running:
        result, _ = run_one(running, job("job-1", steps=mender.steps))
        assert (result.outcome, result.error) == (
            UNREACHABLE,
            "device board: its agent was killed while it had the job",
        )
        assert run_one(running, job("job-2"))[0].outcome == FINISHED


def test_a_device_that_was_restarted_is_given_its_job_again(tmp_path, server, wheel):
    def restart():
        os.kill(agent_pid(server), signal.SIGKILL)
        running._lines["board"].attached.welcome["boot"] = "the one before"

    mender = Mender(tmp_path, restart)
    with engine(tmp_path, server, wheel, options={"on_event": mender}) as running:
        result, _ = run_one(running, job("job-1", steps=mender.steps))
    assert result.outcome == FINISHED
    assert (tmp_path / "runs").read_text() == "ran\n" * 2  # what had not ended begins again


def test_an_update_that_is_cut_off_in_the_middle_is_sent_again(tmp_path, server, wheel, monkeypatch):
    cut = []
    write = attached.UpdateSink.write

    def write_and_cut(sink, data):
        write(sink, data)
        if not cut:
            cut.append(sink.partial.stat().st_size)
            server.stop()

    monkeypatch.setattr(attached.UpdateSink, "write", write_and_cut)
    options = {"on_event": lambda name, client, phase, _: server.start() if phase == attached.LINK_LOST else None}
    sent = job(steps=[["count", str(tmp_path / "runs")]], update={"x": [5 * MIB]})
    with engine(tmp_path, server, wheel, options=options) as running:
        result, update = run_one(running, sent)
    assert (result.outcome, cut[0] < 4 * MIB) == (FINISHED, True)
    assert update.stat().st_size > 20 * MIB
    assert (tmp_path / "runs").read_text() == "ran\n"


def test_a_payload_that_is_cut_off_in_the_middle_is_sent_again(tmp_path, server, wheel, monkeypatch):
    payload = tmp_path / "payload"
    payload.write_bytes(os.urandom(24 * MIB))
    cut = []
    flush = attached.AttachedNode.flush

    def flush_and_cut(node):
        flush(node)
        if node.channel.writer.sent_bytes > 2 * MIB and not cut:
            cut.append(bool(node.channel.writer))
            server.stop()

    monkeypatch.setattr(attached.AttachedNode, "flush", flush_and_cut)
    options = {"on_event": lambda name, client, phase, _: server.start() if phase == attached.LINK_LOST else None}
    with engine(tmp_path, server, wheel, options=options) as running:
        result, _ = run_one(running, job(steps=[["count", str(tmp_path / "runs")]]), payload)
    assert (result.outcome, result.scalars["payload"], cut) == (FINISHED, 24 * MIB, [True])
    assert (tmp_path / "runs").read_text() == "ran\n"


def lasting_job(folder):
    steps = [["phase", "train"], ["count", str(folder / "runs")], ["touch", str(folder / "here")]]
    return job(steps=[*steps, ["wait_for", str(folder / "go")]], update={"x": [3]})


@pytest.mark.parametrize("meanwhile", ["it goes on", "it has ended"])
def test_what_a_controller_that_was_killed_had_ordered_is_collected_by_the_next(tmp_path, server, wheel, meanwhile):
    program = f"""
import sys; from pathlib import Path; from types import SimpleNamespace
from testbed.code_wheel import CodeWheel; from testbed.inventory import Access
from tests import test_engine_over_ssh as drill
folder = Path({str(tmp_path)!r})
server = SimpleNamespace(folder=folder / "server", access=Access("board", ssh_config={str(server.ssh_config)!r}))
wheel = CodeWheel(Path({str(wheel.path)!r}), {wheel.sha256!r}, ())
with drill.engine(folder, server, wheel) as running:
    drill.run_one(running, drill.lasting_job(folder))
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as process:
        wait_until((tmp_path / "here").exists)
        process.kill()
    if meanwhile == "it has ended":
        (tmp_path / "go").touch()
        wait_until((spool(server) / "jobs" / "job-1" / "outcome.json").exists)
    with engine(tmp_path, server, wheel) as running:
        running.hold()
        (tmp_path / "go").touch()
        result, update = run_one(running, lasting_job(tmp_path))
    assert (result.outcome, update.exists()) == (FINISHED, True)
    assert (tmp_path / "runs").read_text() == "ran\n"


# ── whom a device is kept from ────────────────────────────────────────────────────────────────────────────────────────
def test_a_device_that_another_run_holds_is_refused_and_nothing_is_done_there(tmp_path, server, wheel):
    other = drills.settings(tmp_path, wheel=wheel)
    holding = make_node(board(server), replace(other, run="another"))
    holding.hold()
    before = sorted(path.name for path in (server.folder / "device").iterdir())
    with engine(tmp_path, server, wheel) as running:
        with pytest.raises(
            LockedError, match=r"board is held by run another of \S+@\S+:\d+, for .*testbed unlock board"
        ):
            running.hold()
        with pytest.raises(LockedError, match="testbed stop another"):
            run_one(running, job())
    assert sorted(path.name for path in (server.folder / "device").iterdir()) == before == ["lock.barred", "lock.json"]
    holding.leave(1)
    with engine(tmp_path, server, wheel) as running:
        assert running.hold() == {}


def test_a_device_that_was_taken_away_is_not_held_again_until_the_run_is_resumed(
    tmp_path, server, wheel, monkeypatch, capsys
):
    inventory = tmp_path / "lab.yaml"
    own = {"host": "board", "ssh_config": str(server.ssh_config), "python": sys.executable}
    more = {"kind": "generic", "profile": "raspberry_pi_5_8gb", "folder": str(server.folder / "device")}
    inventory.write_text(json.dumps({"devices": {"board": {**own, **more, "budget": {"memory": "5 GiB"}}}}))
    with engine(tmp_path, server, wheel) as running:
        assert run_one(running, job())[0].outcome == FINISHED
        assert main(["unlock", "board", "--inventory", str(inventory)]) == 1
        assert main(["unlock", "board", "--inventory", str(inventory), "--force"]) == 0
        told = capsys.readouterr()
        assert "take the device with --force" in told.err
        assert "device board is free" in told.out
        result, _ = run_one(running, job("job-2"))
        assert (result.outcome, agents_below(server.folder)) == (UNREACHABLE, [])
        assert "was taken from run" in result.error
        with pytest.raises(LockedError, match="--resume"):
            running.hold()
    monkeypatch.setattr("testbed.devices._agent_node.login_name", lambda: "another")
    with engine(tmp_path, server, wheel) as resumed:
        assert resumed.hold() == {}
        assert run_one(resumed, job("job-3"))[0].outcome == FINISHED


def test_two_names_for_one_board_are_told(tmp_path, server, wheel):
    with (
        engine(tmp_path, server, wheel, board(server, "one"), board(server, "two")) as running,
        pytest.raises(LockedError, match=r"is the same machine and folder as device (one|two): leave one of them out"),
    ):
        running.hold()


@pytest.mark.parametrize("kind", ["generic", "emulated"])
def test_a_device_that_is_being_made_ready_is_refused_and_its_machine_too(tmp_path, server, wheel, kind):
    """Its environment may be put in another one's place at any moment."""
    device = board(server, kind=kind)
    visit = Hold(device)
    visit.take(LocalConnection("board"), None)
    with (
        engine(tmp_path, server, wheel, device) as running,
        pytest.raises(LockedError, match=r"device board is being made ready by \S+, for .*testbed unlock board"),
    ):
        running.hold()
    visit.release(LocalConnection("board"))
    with engine(tmp_path, server, wheel, device) as running:
        assert run_one(running, job())[0].outcome == FINISHED


def test_a_lock_that_nobody_stands_behind_any_more_is_called_stale(tmp_path, server, wheel):
    holding = make_node(board(server), replace(drills.settings(tmp_path, orphan_seconds=0.0), run="another"))
    holding.hold()
    with (
        engine(tmp_path, server, wheel) as running,
        pytest.raises(LockedError, match="the lock is stale; remove it with `testbed unlock board`"),
    ):
        running.hold()
    holding.leave(1)


def test_another_board_than_the_one_that_was_made_ready_is_refused(tmp_path, server, wheel):
    facts = {"board": {"board": {"model": "Raspberry Pi 5 Model B Rev 1.0"}}}
    with (
        engine(tmp_path, server, wheel, facts=facts) as running,
        pytest.raises(BoardError, match="provision --only board"),
    ):
        running.hold()
    assert not (server.folder / "device").exists()


def test_a_changed_host_key_keeps_the_run_away(tmp_path, server, wheel):
    server.stop()
    server.change_host_key()
    server.start()
    with engine(tmp_path, server, wheel) as running, pytest.raises(HostKeyError, match="board"):
        running.hold()
    assert not (server.folder / "device").exists()


def test_a_device_that_is_off_is_no_reason_for_the_others_not_to_begin(tmp_path, server, wheel):
    with SshServer(tmp_path / "other") as second:
        devices = [board(server), replace(board(second, "other"))]
        server.stop()
        with engine(tmp_path, server, wheel, *devices) as running:
            assert list(running.hold()) == ["board"]
            jobs = [("board", job("job-1"), None), ("other", job("job-2", client=1), None)]
            outcomes = {result.job: result.outcome for result, _ in running.run(jobs)}
    assert outcomes == {"job-1": UNREACHABLE, "job-2": FINISHED}
    assert running.problems == ()


def test_a_device_that_comes_up_after_the_start_does_its_first_job(tmp_path, server, wheel):
    with SshServer(tmp_path / "other") as second:
        devices = [board(server), board(second, "other")]
        server.stop()
        with engine(tmp_path, server, wheel, *devices) as running:
            assert list(running.hold()) == ["board"]
            server.start()
            assert run_one(running, job())[0].outcome == FINISHED


def test_a_link_that_breaks_while_a_device_has_no_job_does_not_cost_it_the_next_one(tmp_path, server, wheel):
    alone, go = tmp_path / "alone", tmp_path / "go"
    with SshServer(tmp_path / "other") as second:

        def break_link(name, _client, _phase, progress):
            if (name, progress is None) == ("other", False):
                server.stop()
                server.start()

        steps = [["wait_for", str(alone)], ["progress"], ["wait_for", str(go)]]
        jobs = [("board", job("job-1"), None), ("other", job("job-2", client=1, steps=steps), None)]
        devices = [board(server), board(second, "other")]
        with engine(tmp_path, server, wheel, *devices, options={"on_event": break_link}) as running:
            results = running.run(jobs)
            assert next(results)[0].job == "job-1"
            alone.touch()
            threading.Thread(target=release_when_lost, args=(running, "board", go)).start()
            assert [result.outcome for result, _ in results] == [FINISHED]
            life = agent_pid(server)
            assert run_one(running, job("job-3"))[0].outcome == FINISHED
            assert agent_pid(server) == life
    assert running.problems == ()


def release_when_lost(running, device, go):
    wait_until(lambda: running._lines[device].attached.channel is None)
    go.touch()


def test_a_device_is_let_go_of_over_a_new_link_where_the_old_one_has_broken(tmp_path, server, wheel):
    with engine(tmp_path, server, wheel) as running:
        running.hold()
        assert (server.folder / "device" / "lock.json").exists()
        server.stop()
        server.start()
    assert running.problems == ()
    assert not (server.folder / "device" / "lock.json").exists()


def test_a_device_that_comes_up_late_and_is_held_by_another_run_costs_its_own_jobs_only(tmp_path, server, wheel):
    holding = make_node(board(server), replace(drills.settings(tmp_path), run="another"))
    holding.hold()
    with SshServer(tmp_path / "other") as second:
        server.stop()
        with engine(tmp_path, server, wheel, board(server), board(second, "other")) as running:
            assert list(running.hold()) == ["board"]
            server.start()
            jobs = [("board", job("job-1"), None), ("other", job("job-2", client=1), None)]
            ended = {result.job: result for result, _ in running.run(jobs)}
    holding.leave(1)
    assert {name: result.outcome for name, result in ended.items()} == {"job-1": UNREACHABLE, "job-2": FINISHED}
    assert "board is held by run another" in ended["job-1"].error


def test_another_board_that_answers_after_the_start_is_given_nothing(tmp_path, server, wheel):
    """Our code is there already, as on a card that was copied."""
    with engine(tmp_path, server, wheel) as running:
        run_one(running, job("job-1"))
    shutil.rmtree(server.folder / "device" / "runs")
    facts = {"board": {"board": {"model": "Raspberry Pi 5 Model B Rev 1.0"}}}
    with SshServer(tmp_path / "other") as second:
        server.stop()
        with engine(tmp_path, server, wheel, board(server), board(second, "other"), facts=facts) as running:
            running.hold()
            server.start()
            result, _ = run_one(running, job("job-2"))
    assert (result.outcome, "provision --only board" in result.error) == (UNREACHABLE, True)
    assert not (server.folder / "device" / "runs").exists()
    assert not (server.folder / "device" / "lock.json").exists()


def test_another_board_than_the_one_that_was_made_ready_is_asked_for_nothing(tmp_path, server, monkeypatch):
    monkeypatch.setenv("TESTBED_DATA", str(tmp_path))
    fact_sheets.store("board", {"host": server.access.host, "board": {"model": "Raspberry Pi 5 Model B Rev 1.0"}})
    with reached(board(server)) as remote, pytest.raises(BoardError, match="provision --only board"):
        remote.tidy(None, contents=True)


def test_a_device_whose_end_goes_wrong_keeps_no_other_from_being_let_go(tmp_path, server, wheel, monkeypatch):
    with SshServer(tmp_path / "other") as second:
        running = engine(tmp_path, server, wheel, board(server), board(second, "other"))
        running.hold()
        monkeypatch.setattr(running.node("board").on, "ask", lambda *_, **__: {}["nothing"])
        running.close()
        assert not (second.folder / "device" / "lock.json").exists()
        assert len(running.problems) == 1
        assert "board: unexpected KeyError" in running.problems[0]


def test_devices_of_one_machine_may_be_each_others_way(tmp_path, server, wheel):
    """The inventory refuses it, and still it must not hang."""
    there = {
        name: replace(board(server), name=name, kind="emulated", access=replace(server.access, via=via))
        for name, via in (("one", "two"), ("two", "one"))
    }
    facts = {name: {"board": {"cores": 2, "memory_bytes": None}} for name in there}
    with engine(tmp_path, server, wheel, *there.values(), facts=facts) as running:
        jobs = [("one", job("job-1"), None), ("two", job("job-2", client=1), None)]
        assert {result.outcome for result, _ in running.run(jobs)} == {FINISHED}


def test_without_an_interpreter_the_way_out_is_provisioning(tmp_path, server, wheel):
    bare = replace(board(server), python=None)
    with (
        engine(tmp_path, server, wheel, bare) as running,
        pytest.raises(DeviceError, match="testbed provision --only board"),
    ):
        running.hold()
