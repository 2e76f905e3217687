"""The agent by its protocol: whom it serves, what it refuses, what it does with jobs and with its trainer."""

import json
import os
import re
import signal
import socket
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.devices import make_node
from testbed.errors import DeviceError, LimitError
from testbed.node import host
from testbed.node.frames import PREFIX, PROTOCOL, Channel, encode
from testbed.node.spool import FileSink
from tests import drills
from tests.drills import MIB, wait_until


class Client:
    """A controller that says one thing at a time; `close_clients` hangs up for it."""

    opened: list["Client"] = []  # noqa: RUF012 -- emptied after each test

    def __init__(self, node, greet=True):
        self.frames = []
        self.folder = drills.spool_of(node).parent
        self.channel = Channel(node.reach({}), self.sink, lambda header, *_: self.frames.append(header))
        self.opened.append(self)
        self.channel.sock.setblocking(True)
        self.channel.sock.settimeout(drills.PATIENCE_SECONDS)
        if greet:
            self.channel.send({"type": "hello", "run": "run", "version": PROTOCOL})

    def sink(self, header, _):
        return FileSink(self.folder / f"{header['id']}.update")

    def deliver(self, job, payload=None):
        self.channel.send({"type": "job", "id": job.id, "job": job.to_json(), "hash": None}, payload)
        wait_until(lambda: self.channel.flush() or not self.channel.writer)

    def expect(self, kind, **values):
        """The next frame of that type; others are let pass."""

        def found():
            matching = [f for f in self.frames if f["type"] == kind and all(f.get(k) == v for k, v in values.items())]
            if not matching:
                assert self.channel.receive(), f"hung up before {kind}"
                return None
            self.frames.remove(matching[0])
            return matching[0]

        return wait_until(found)

    def wait_for_the_end(self):
        wait_until(lambda: not self.channel.receive())


@pytest.fixture(autouse=True)
def close_clients():
    yield
    while Client.opened:
        Client.opened.pop().channel.close()


@pytest.fixture
def start(tmp_path):
    """Starts the agent of a node; at the end nothing of it may be left."""
    nodes = []

    def begin(name="board", device=None, greet=True, **changes):
        node = make_node(device or drills.device(name), drills.settings(tmp_path, **changes))
        nodes.append(node)
        return node, Client(node, greet)

    yield begin
    for node in nodes:
        node.kill()
    wait_until(lambda: drills.processes_below(tmp_path) == [])


def test_the_first_word_is_a_welcome_that_tells_the_cap(start):
    node, client = start()
    welcome = client.expect("welcome")
    assert welcome["cap"] == {"version": "none", "path": None, "limit_bytes": None}
    assert (welcome["running"], welcome["queued"], welcome["waiting"]) == (None, [], [])
    assert welcome["pid"] == json.loads((drills.spool_of(node) / "agent.state").read_text())["pid"]
    assert (drills.spool_of(node) / "agent.sock").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"type": "hello", "run": "another", "version": PROTOCOL}, "another"),
        ({"type": "hello", "run": "run", "version": 99}, "protocol"),
        ({"type": "ping"}, "hello"),
    ],
)
def test_a_stranger_is_refused_and_the_agent_lives_on(start, message, word):
    node, client = start(greet=False)
    client.channel.send(message)
    assert word in client.expect("refused")["error"]
    client.wait_for_the_end()
    assert Client(node).expect("welcome")


@pytest.mark.parametrize(
    "message",
    [
        {"type": "job", "id": "../../escape", "job": {}},
        {"type": "job", "id": 7, "job": {}},
        {"type": "job", "id": "x"},
        {"type": "cancel"},
        {"type": "dance"},
    ],
)
def test_nonsense_is_refused(start, message):
    node, client = start()
    client.channel.send(message)
    assert client.expect("refused")["error"]
    client.wait_for_the_end()
    assert list((drills.spool_of(node) / "jobs").iterdir()) == []


def test_the_newest_controller_wins(start):
    node, first = start()
    first.expect("welcome")
    second = Client(node)
    second.expect("welcome")
    first.expect("superseded")
    first.wait_for_the_end()
    second.channel.send({"type": "ping"})
    second.expect("pong")


def test_one_spool_has_one_agent(start, tmp_path):
    node, _ = start()
    with pytest.raises(DeviceError, match="at work here already"):
        host.start(drills.spool_of(node), sys.executable, str(drills.ROOT), scoped=False)
    assert node.alive()


def test_of_starts_at_the_same_time_one_counts(start, tmp_path):
    """As when a connection was lost while the agent was being started, and is there again."""
    node, client = start()
    client.channel.close()
    node.kill()
    with ThreadPoolExecutor(4) as pool:
        channels = list(pool.map(lambda _: node.reach({}), range(4)))
    assert len({_peer(channel) for channel in channels}) == 1
    for channel in channels:
        channel.close()


def _peer(channel):
    return struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def test_a_spool_may_lie_deeper_than_the_path_of_a_socket_may_be_long(tmp_path):
    node = make_node(drills.device(), drills.settings(tmp_path.joinpath(*["a" * 60] * 4)))
    client = Client(node)
    assert client.expect("welcome")
    node.kill()


def test_a_job_delivered_twice_runs_once_and_its_result_waits(start, tmp_path):
    node, client = start()
    job = drills.job(steps=[["count", str(tmp_path / "runs")]], update={"x": [2]})
    client.deliver(job)
    client.deliver(job)
    client.expect("update", id=job.id)
    first = client.expect("result", id=job.id)["result"]
    client.deliver(job)
    client.expect("update", id=job.id)
    assert client.expect("result", id=job.id)["result"]["scalars"] == first["scalars"]
    assert (tmp_path / "runs").read_text() == "ran\n"
    again = Client(node)
    assert again.expect("welcome")["waiting"] == [job.id]
    again.channel.send({"type": "stored", "id": job.id})
    wait_until(lambda: not (drills.spool_of(node) / "jobs" / job.id).exists())


@pytest.mark.parametrize("when", ["running", "queued", "waiting"])
def test_a_job_that_nobody_asks_for_any_more_is_forgotten(start, tmp_path, when):
    node, client = start()
    go, runs = tmp_path / "go", tmp_path / "runs"
    what = drills.job("what", steps=[["count", str(runs)], ["touch", str(tmp_path / "here")], ["wait_for", str(go)]])
    if when == "queued":
        client.deliver(drills.job("before", steps=[["wait_for", str(go)]]))
    client.deliver(what)
    if when == "running":
        wait_until((tmp_path / "here").exists)
    if when == "waiting":
        go.touch()
        client.expect("result", id="what")
    client.channel.send({"type": "cancel", "id": "what", "outcome": None})
    go.touch()
    if when == "queued":
        client.expect("result", id="before")
    wait_until(lambda: not (drills.spool_of(node) / "jobs" / "what").exists())
    client.deliver(what)
    assert client.expect("result", id="what")["result"]["outcome"] == "finished"
    assert runs.read_text() == "ran\n" * (1 if when == "queued" else 2)


def test_jobs_take_turns_in_one_trainer(start):
    _, client = start()
    for number in range(3):
        client.deliver(drills.job(f"job-{number}"))
    results = [client.expect("result", id=f"job-{number}")["result"] for number in range(3)]
    assert len({result["scalars"]["pid"] for result in results}) == 1


def test_a_payload_that_is_cut_off_leaves_no_job(start):
    node, client = start()
    client.expect("welcome")
    job = drills.job()
    client.channel.sock.sendall(encode({"type": "job", "id": job.id, "job": job.to_json()}, 1000) + bytes(500))
    wait_until((drills.spool_of(node) / "jobs" / job.id).exists)
    client.channel.close()
    wait_until(lambda: not (drills.spool_of(node) / "jobs" / job.id).exists())
    assert Client(node).expect("welcome")["queued"] == []


def test_a_frame_that_is_too_large_is_refused_before_it_is_read(start):
    _, client = start()
    client.channel.sock.sendall(PREFIX.pack(2**32 - 1, 0))
    assert "at most" in client.expect("refused")["error"]


def test_the_trainer_is_killed_by_hand_and_the_next_job_gets_a_new_one(start, tmp_path):
    _, client = start()
    client.deliver(drills.job(steps=[["phase", "train"], ["touch", str(tmp_path / "here")], ["wait_for_ever"]]))
    wait_until(lambda: (tmp_path / "here").exists() and (tmp_path / "here").read_text())
    os.kill(json.loads((tmp_path / "here").read_text())["pid"], signal.SIGKILL)
    result = client.expect("result")["result"]
    assert (result["outcome"], result["phase"]) == ("failed", "train")
    assert "signal 9 (SIGKILL) in phase train" in result["error"]
    client.deliver(drills.job("job-2"))
    assert client.expect("result", id="job-2")["result"]["outcome"] == "finished"


@pytest.mark.parametrize(
    ("steps", "outcome", "word"),
    [
        ([["exit", 3]], "failed", "exited with code 3.*the drill says goodbye"),
        ([["exit", 0]], "failed", "exited with code 0"),
        ([["fail", "the learning rate is odd"]], "failed", "^the learning rate is odd$"),
        ([["raise_memory_error"]], "out_of_memory", "MemoryError"),
        ([["say", "no json"]], "failed", "not JSON"),
        ([["say", "[1]"]], "failed", "not a JSON object"),
        ([["say", '{"done": "another"}']], "failed", "means nothing here"),
    ],
)
def test_how_a_trainer_can_fail(start, steps, outcome, word):
    _, client = start()
    client.deliver(drills.job(steps=[["phase", "train"], *steps, ["wait_for_ever"]]))
    result = client.expect("result")["result"]
    assert (result["outcome"], result["phase"]) == (outcome, "train")
    assert re.search(word, result["error"], re.DOTALL)
    client.deliver(drills.job("job-2"))
    assert client.expect("result", id="job-2")["result"]["outcome"] == "finished"


def test_a_trainer_that_cannot_be_started_fails_the_job(start):
    _, client = start(trainer="no_such_module")
    client.deliver(drills.job())
    result = client.expect("result")["result"]
    assert result["outcome"] == "failed"
    assert "no_such_module" in result["error"]
    assert result["phase"] == "start"


def test_unloading_answers_with_or_without_a_trainer(start):
    _, client = start()
    client.channel.send({"type": "unload"})
    client.expect("unloaded")
    client.deliver(drills.job())
    client.expect("result")
    client.channel.send({"type": "unload"})
    client.expect("unloaded")


def test_sigterm_leaves_only_the_spool(start, tmp_path):
    node, client = start()
    client.deliver(drills.job(steps=[["touch", str(tmp_path / "here")], ["wait_for_ever"]]))
    wait_until((tmp_path / "here").exists)
    os.kill(drills.agent_pid(tmp_path), signal.SIGTERM)
    client.wait_for_the_end()
    assert node.wait_gone(drills.PATIENCE_SECONDS)
    assert drills.processes_below(tmp_path) == []
    assert not (drills.spool_of(node) / "agent.sock").exists()


@pytest.mark.parametrize("first", ["the trainer", "the agent"])
def test_a_machine_that_goes_down_has_failed_no_job(start, tmp_path, first):
    """It asks every process to end, in an order of its own."""
    node, client = start()
    client.deliver(drills.job(steps=[["touch", str(tmp_path / "here")], ["wait_for_ever"]]))
    wait_until(lambda: (tmp_path / "here").exists() and (tmp_path / "here").read_text())
    pids = [json.loads((tmp_path / "here").read_text())["pid"], drills.agent_pid(tmp_path)]
    for pid in pids if first == "the trainer" else reversed(pids):
        os.kill(pid, signal.SIGTERM)
    client.wait_for_the_end()
    assert node.wait_gone(drills.PATIENCE_SECONDS)
    assert not [frame for frame in client.frames if frame["type"] == "result"]
    assert not list(drills.spool_of(node).glob("jobs/*/outcome.json"))


def test_an_agent_without_contact_ends(start, tmp_path):
    node, client = start(orphan_seconds=0.1)
    client.deliver(drills.job(steps=[["touch", str(tmp_path / "here")], ["wait_for_ever"]]))
    wait_until((tmp_path / "here").exists)
    client.channel.close()
    wait_until(lambda: not node.alive())
    wait_until(lambda: drills.processes_below(tmp_path) == [])


def test_over_a_network_it_ends_when_nothing_is_heard_however_open_the_channel_stands(tmp_path):
    node = make_node(drills.device(), drills.settings(tmp_path, orphan_seconds=0.3))
    node.place = replace(node.place, remote=True)
    client = Client(node)
    client.expect("welcome")
    for _ in range(4):  # as long as something comes, it stays
        client.channel.send({"type": "ping"})
        client.expect("pong")
    client.wait_for_the_end()
    assert node.wait_gone(drills.PATIENCE_SECONDS)


def test_while_a_payload_comes_it_says_that_it_is_there(start):
    _, client = start()
    client.expect("welcome")
    job = drills.job()
    client.channel.sock.sendall(encode({"type": "job", "id": job.id, "job": job.to_json()}, 1000) + bytes(500))
    client.expect("pong")
    client.channel.sock.sendall(bytes(500))
    client.expect("result", id=job.id)


def test_an_agent_that_is_killed_takes_its_trainer_along(start, tmp_path):
    node, client = start()
    client.deliver(drills.job(steps=[["touch", str(tmp_path / "here")], ["wait_for_ever"]]))
    wait_until((tmp_path / "here").exists)
    os.kill(drills.agent_pid(tmp_path), signal.SIGKILL)
    client.wait_for_the_end()
    wait_until(lambda: drills.processes_below(tmp_path) == [])
    assert not node.alive()


def test_where_no_group_can_be_made_the_message_gives_the_way_out(tmp_path):
    nowhere = tmp_path / "nowhere"
    node = make_node(drills.device(), drills.settings(tmp_path, capped=True, cgroup_parent=nowhere))
    with pytest.raises(LimitError, match=r"cannot start.*No such file.*--no-cap"):
        node.reach({})
    assert not node.alive()


def test_the_agent_is_small(start, tmp_path):
    _, client = start()
    payload = tmp_path / "payload"
    payload.write_bytes(bytes(8 * MIB))
    client.deliver(drills.job(update={"x": [1 << 20]}), payload)
    client.expect("result")
    lines = Path(f"/proc/{drills.agent_pid(tmp_path)}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    assert kib["Pss"] <= 15 * 1024
    assert kib["Anonymous"] <= 10 * 1024
