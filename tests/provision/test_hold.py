"""A device is held while a visit changes something there: against runs, against other visits, and not for ever."""

import fcntl
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

from testbed.connection import LocalConnection
from testbed.errors import DeviceError, LockedError
from testbed.inventory import Budget, Device, HardwareProfile
from testbed.node import landing
from testbed.provision.facts import FACTS_SCRIPT_PARTS
from testbed.provision.hold import Hold
from testbed.provision.step import Change, Note
from testbed.provision.visit import CHANGED, FAILED, INTERRUPTED, READY, Options, Visit

PROFILE = HardwareProfile("box", "A box", 1 << 40, 1 << 20, 1)


@pytest.fixture
def box(tmp_path):
    return Device("box", "generic", PROFILE, Budget(1), folder=str(tmp_path / "testbed"), python=sys.executable)


@pytest.fixture
def lock(box):
    return f"{box.folder}/lock.json"


class Acts:
    """Changes something once, by doing what it is given; True: it is as it should be."""

    name = "it"

    def __init__(self, act=lambda: None):
        self._act = act
        self.done = False

    def check(self, facts, device):
        return None if self.done else Change(self.name, "wrong", "right", action=self._change)

    def _change(self, connection, say):
        self._act()
        self.done = True


def visited(device, act=lambda: None, connect=None, **more):
    return Visit(device, (Acts(act),), FACTS_SCRIPT_PARTS, connect or (lambda: LocalConnection(device.name)), **more)


def refused(device):
    """Why a visit is; it has then changed nothing."""
    touched = []
    outcome = visited(device, lambda: touched.append(True)).go()
    assert (outcome.status, [problem.step for problem in outcome.problems], touched) == (FAILED, ["lock"], [])
    return outcome.problems[0].text


def claim(device, run="lora-7", orphan_seconds=1800.0):
    """Of a run of somebody else."""
    spool = f"{device.folder}/runs/{run}/spool"
    return {
        "run": run, "device": device.name, "owner": "bob@desk:17", "since": 0.0, "spool": spool,
        "orphan_seconds": orphan_seconds,
    }  # fmt: skip


@contextmanager
def agent(device, place):
    """Somebody is at work on a spool."""
    spool = Path(device.folder, "runs", place, "spool")
    spool.mkdir(parents=True)
    with (spool / "agent.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ── as a run holds it ────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_visit_holds_the_device_while_it_changes_something_and_then_lets_go(box, lock):
    seen = []
    outcome = visited(box, lambda: seen.append((landing.holder(lock), landing.hold(lock, claim(box))))).go()
    [(held, other)] = seen
    assert (held["run"], held["device"], held["agent_alive"], held["stale"]) == ("provision", "box", False, False)
    assert held["owner"].endswith(f":{os.getpid()}")
    assert held["boot"] == landing.boot()
    assert 0 <= held["age_seconds"] < held["orphan_seconds"]
    assert (other["run"], other["owner"]) == ("provision", held["owner"])  # a run is refused
    assert (outcome.status, landing.holder(lock)) == (CHANGED, None)
    assert "lock" not in outcome.facts


@pytest.mark.parametrize("options", [Options(), Options(check=True)])
def test_where_nothing_is_changed_nothing_is_held(box, options):
    step = Note("it", "told") if not options.check else Change("it", "wrong", "right", action=lambda *_: None)
    said = type("Says", (), {"name": "it", "check": lambda *_: step})()
    Visit(box, (said,), FACTS_SCRIPT_PARTS, lambda: LocalConnection("box"), options).go()
    assert not Path(box.folder).exists()


def test_it_lets_go_after_a_failure(box, lock):
    def fails():
        raise DeviceError("no room")

    def faulty():
        raise KeyError("a fault of ours")

    assert visited(box, fails).go().status == FAILED
    assert landing.holder(lock) is None
    with pytest.raises(KeyError):
        visited(box, faulty).go()
    assert landing.holder(lock) is None


def test_it_lets_go_when_the_user_has_hung_up(box, lock):
    """As Ctrl-C does it: from another thread the link is closed, and the visit finds that out."""
    stopped = Event()

    def interrupted():
        stopped.set()
        visit.close()
        raise DeviceError("box: the connection was closed")

    visit = visited(box, interrupted, stopped=stopped)
    assert visit.go().status == INTERRUPTED
    assert landing.holder(lock) is None


def test_the_folder_is_the_users_alone_from_the_first(box):
    visited(box).go()
    assert Path(box.folder).stat().st_mode & 0o777 == 0o700


# ── who else has it ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_nothing_is_changed_under_a_run(box, lock):
    landing.hold(lock, claim(box))
    text = refused(box)
    assert text.startswith("device box is held by run lora-7 of bob@desk:17, for ")
    assert "end it with `testbed stop lora-7`, or take the device from it with `testbed unlock box`" in text
    assert text.endswith("; nothing was changed")
    assert landing.holder(lock)["run"] == "lora-7"


def test_a_device_that_is_held_and_ready_is_ready(box, lock):
    landing.hold(lock, claim(box))
    visit = visited(box)
    visit.steps[0].done = True
    assert visit.go().status == READY


def test_a_run_that_is_gone_is_told_as_such(box, lock):
    landing.hold(lock, claim(box, orphan_seconds=-1.0))
    assert "the lock is stale; remove it with `testbed unlock box`, or go on with that run" in refused(box)


def test_a_run_with_an_agent_at_work_is_never_stale(box, lock):
    landing.hold(lock, claim(box, orphan_seconds=-1.0))
    with agent(box, "lora-7"):
        assert "`testbed unlock box --force`" in refused(box)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "7", '"lora-7"', '{"run": "lora-7"}', '{"run": "provision"}'])
def test_a_lock_that_cannot_be_read_is_told_with_the_way_out(box, lock, text):
    Path(box.folder).mkdir()
    Path(lock).write_text(text)
    assert refused(box).startswith("device box has a lock that cannot be read; remove it with: testbed unlock box")
    assert landing.release(lock)
    assert visited(box).go().status == CHANGED


def test_the_way_out_where_there_is_no_python_yet(tmp_path, lock):
    new = Device("box", "generic", PROFILE, Budget(1), folder=str(tmp_path / "testbed"))
    landing.hold(lock, claim(new))
    assert f"(or, while it has no Python of ours, remove {lock} there)" in refused(new)


def test_another_visit_is_refused(box, lock):
    told = []
    assert visited(box, lambda: told.append(refused(box))).go().status == CHANGED
    assert told[0].startswith("device box is being made ready by ")
    assert "remove its lock with `testbed unlock box`; nothing was changed" in told[0]


def test_another_visit_that_has_been_gone_for_long_is_told_as_such(box, lock):
    landing.hold(lock, claim(box, "provision", orphan_seconds=-1.0))
    assert "by a visit of `testbed provision` of bob@desk:17" in refused(box)
    assert "the lock is stale; remove it with `testbed unlock box`" in refused(box)


@pytest.mark.parametrize("place", ["lora-7", "lora-7/guest"])
def test_nothing_is_changed_under_an_agent_that_needs_no_lock(box, lock, place):
    with agent(box, place):
        assert "an agent of run lora-7 is at work on the machine of device box" in refused(box)
    assert landing.holder(lock) is None
    assert visited(box).go().status == CHANGED


def test_what_is_taken_by_hand_is_not_taken_again(box, lock):
    class Twice(Acts):
        name = "that"

        def check(self, facts, device):
            return super().check(facts, device) if first.done else None

    first, second = Acts(lambda: landing.release(lock)), Twice()
    outcome = Visit(box, (first, second), FACTS_SCRIPT_PARTS, lambda: LocalConnection("box")).go()
    assert (outcome.status, second.done) == (FAILED, False)
    assert outcome.problems[0].text.startswith("device box was taken from this visit with `testbed unlock`")


def test_a_device_that_takes_no_lock_is_left_alone(box, tmp_path):
    (tmp_path / "testbed").write_text("a file in its place")
    assert refused(box).startswith("device box cannot be held: mkdir: ")


# ── what a visit leaves behind ───────────────────────────────────────────────────────────────────────────────────────
class Breaks(LocalConnection):
    """A link that breaks for good when it is told to."""

    broken = False

    def attempt(self, *arguments, **more):
        if self.broken:
            raise DeviceError(f"{self.name}: the connection was lost")
        return super().attempt(*arguments, **more)


def test_a_visit_whose_link_broke_leaves_a_lock_that_the_next_one_takes_over(box, lock):
    link = Breaks("box")

    def breaks():
        link.broken = True
        raise DeviceError("box: the connection was lost")

    assert visited(box, breaks, lambda: link).go().status == FAILED
    assert landing.holder(lock)["run"] == "provision"
    assert visited(box).go().status == CHANGED
    assert landing.holder(lock) is None


TAKES_AND_ENDS = """
import os, sys
from testbed.connection import LocalConnection
from testbed.inventory import Budget, Device, HardwareProfile
from testbed.provision.hold import Hold
profile = HardwareProfile("box", "A box", 1 << 40, 1 << 20, 1)
Hold(Device("box", "generic", profile, Budget(1), folder=sys.argv[1])).take(LocalConnection("box"), None)
os._exit(0)
"""


def left_behind(box, lock, **differs):
    """By another process, which has ended."""
    subprocess.run([sys.executable, "-c", TAKES_AND_ENDS, box.folder], check=True)
    found = json.loads(Path(lock).read_text())
    Path(lock).write_text(json.dumps({**found, **differs}))


def test_what_a_process_of_ours_left_that_is_dead_is_taken_over(box, lock):
    left_behind(box, lock)
    assert visited(box).go().status == CHANGED
    assert landing.holder(lock) is None


@pytest.mark.parametrize("differs", [{"owner": "bob@desk:17"}, {"process": None}, {"run": "lora-7"}])
def test_what_somebody_else_left_is_not(box, lock, differs):
    left_behind(box, lock, **differs)
    assert "testbed unlock box" in refused(box)


def test_of_two_that_take_over_one_has_it(box, lock):
    left_behind(box, lock)
    found = json.loads(Path(lock).read_text())
    first, second = Hold(box), Hold(box)
    first.take(LocalConnection("box"), found)
    with pytest.raises(LockedError, match="is being made ready"):
        second.take(LocalConnection("box"), found)
    second.release(LocalConnection("box"))
    first.take(LocalConnection("box"), landing.holder(lock))  # it still has it
    first.release(LocalConnection("box"))
    assert landing.holder(lock) is None


def test_no_draft_is_left(box):
    hold = Hold(box)
    hold.take(LocalConnection("box"), None)
    with pytest.raises(LockedError):
        Hold(box).take(LocalConnection("box"), None)
    hold.release(LocalConnection("box"))
    assert [path.name for path in Path(box.folder).iterdir()] == ["lock.barred"]
