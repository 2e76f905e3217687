"""A visit, with steps that change files of this machine: checked, changed, verified."""

from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import pytest

from testbed.connection import LocalConnection, Ran
from testbed.errors import DeviceError, HostKeyError, RightError
from testbed.inventory import Access, Budget, Device, HardwareProfile
from testbed.node import landing
from testbed.provision.facts import FACTS_SCRIPT_PARTS
from testbed.provision.part import Part
from testbed.provision.step import Change, Command, Note, Problem
from testbed.provision.visit import CHANGED, DIFFERS, FAILED, INTERRUPTED, READY, REBOOT, Options, Visit

PROFILE = HardwareProfile("box", "A box", 1 << 40, 1 << 20, 1)


@dataclass
class FileStep:
    """The file `name` in `folder` holds the word `wanted`."""

    name: str
    wanted: str = "right"
    commands: tuple[Command, ...] | None = None
    action: object = None

    def check(self, facts, device):
        found = facts["files"].get(self.name, "nothing")
        if found == self.wanted:
            return None
        if self.action is not None:
            return Change(self.name, found, self.wanted, action=self.action)
        made = (Command(("sh", "-c", f"echo {self.wanted} >{facts['where']}/{self.name}")),)
        return Change(self.name, found, self.wanted, self.commands or made)


@dataclass
class Says:
    """A step that says the same always."""

    name: str
    finding: object

    def check(self, facts, device):
        return self.finding


@pytest.fixture
def visit(tmp_path):
    """A visit with these steps; `folder` is what the facts tell of."""
    folder = tmp_path / "board"
    folder.mkdir()

    def files(answer):
        return {
            "files": {path.rpartition("/")[2]: text.strip() for path, text in answer.files.items()},
            "where": folder,
        }

    def make(*steps, **more):
        device = more.pop("device", Device("box", "generic", PROFILE, Budget(1), folder=str(tmp_path / "testbed")))
        parts = (*FACTS_SCRIPT_PARTS, Part("files", files, files=(f"{folder}/*",)))
        return Visit(device, steps, parts, more.pop("connect", lambda: LocalConnection("box")), **more)

    make.folder = folder
    return make


def names(findings):
    return [finding.step for finding in findings]


def test_what_differs_is_changed_and_found_so(visit):
    outcome = visit(FileStep("a"), FileStep("b")).go()
    assert (outcome.status, names(outcome.changes), outcome.problems) == (CHANGED, ["a", "b"], ())
    assert outcome.facts["files"] == {"a": "right", "b": "right"}


def test_the_second_visit_changes_nothing(visit):
    visit(FileStep("a")).go()
    outcome = visit(FileStep("a")).go()
    assert (outcome.status, outcome.changes) == (READY, ())


def test_what_an_interrupted_visit_has_made_is_not_made_again(visit):
    visit(FileStep("a")).go()
    assert names(visit(FileStep("a"), FileStep("b")).go().changes) == ["b"]


def test_check_changes_nothing_and_tells_what_would_be(visit):
    outcome = visit(FileStep("a"), options=Options(check=True)).go()
    assert (outcome.status, names(outcome.changes)) == (DIFFERS, ["a"])
    assert list(visit.folder.iterdir()) == []


def test_a_change_that_does_not_take_is_a_problem(visit):
    outcome = visit(FileStep("a", commands=(Command(("true",)),)), FileStep("b")).go()
    assert outcome.status == FAILED
    assert [(problem.step, problem.text) for problem in outcome.problems] == [
        ("a", "was changed, and is found as before: nothing, not right")
    ]
    assert outcome.facts["files"] == {"b": "right"}


def test_a_command_that_fails_is_a_problem_and_the_others_go_on(visit):
    broken = FileStep("a", commands=(Command(("sh", "-c", "echo the disk is read-only >&2; exit 1")),))
    outcome = visit(broken, FileStep("b")).go()
    assert outcome.status == FAILED
    assert "exit code 1: the disk is read-only" in outcome.problems[0].text
    assert names(outcome.changes) == ["b"]


def test_one_change_may_call_for_another(visit):
    class Second(FileStep):
        def check(self, facts, device):
            return super().check(facts, device) if facts["files"].get("a") == "right" else None

    outcome = visit(Second("b"), FileStep("a")).go()
    assert (outcome.status, names(outcome.changes)) == (CHANGED, ["a", "b"])


def test_after_a_fatal_problem_nothing_is_done(visit):
    outcome = visit(Says("identity", Problem("identity", "another board", fatal=True)), FileStep("a")).go()
    assert (outcome.status, names(outcome.problems)) == (FAILED, ["identity"])
    assert list(visit.folder.iterdir()) == []


def test_a_fatal_problem_lets_the_steps_before_it_be_made(visit):
    outcome = visit(FileStep("a"), Says("python", Problem("python", "too old", fatal=True)), FileStep("b")).go()
    assert (outcome.status, names(outcome.changes), names(outcome.problems)) == (FAILED, ["a"], ["python"])


def test_a_problem_that_is_not_fatal_lets_the_others_be_made(visit):
    outcome = visit(Says("disk", Problem("disk", "full")), FileStep("a")).go()
    assert (outcome.status, names(outcome.changes)) == (FAILED, ["a"])


def test_a_note_is_no_failure(visit):
    outcome = visit(Says("desktop", Note("desktop", "is running"))).go()
    assert (outcome.status, names(outcome.notes)) == (READY, ["desktop"])


def test_actions_come_in_their_turn(visit):
    order = []

    def act(connection, say):
        say("half done")
        order.append(sorted(path.name for path in visit.folder.iterdir()))
        (visit.folder / "b").write_text("right")

    outcome = visit(FileStep("a"), FileStep("b", action=act), FileStep("c")).go()
    assert (outcome.status, order) == (CHANGED, [["a"]])


def test_after_an_action_that_fails_no_other_is_tried(visit):
    tried = []

    def fails(connection, say):
        tried.append("first")
        raise DeviceError("no room")

    outcome = visit(
        FileStep("a", action=fails), FileStep("b", action=lambda *_: tried.append("second")), FileStep("c")
    ).go()
    assert (outcome.status, names(outcome.problems), tried) == (FAILED, ["a"], ["first"])
    assert names(outcome.changes) == ["c"]


def test_what_holds_from_the_next_boot_on_is_asked_for(visit):
    class FromNextBoot(FileStep):
        def check(self, facts, device):
            if facts["files"].get(self.name) == "right":
                return Change(self.name, "not yet in effect", "right", needs_reboot=True)
            return replace(super().check(facts, device), needs_reboot=True)

    for expected in (["kernel", "a"], ["kernel"]):
        outcome = visit(FromNextBoot("kernel"), FileStep("a")).go()
        assert (outcome.status, names(outcome.changes), outcome.waiting) == (REBOOT, expected, ("kernel",))
        assert outcome.failed


def test_new_groups_are_there_after_a_new_login(visit):
    connections = []

    def connect():
        connections.append(LocalConnection("box"))
        return connections[-1]

    class Group(FileStep):
        def check(self, facts, device):
            change = super().check(facts, device)
            return change and replace(change, needs_login=True)

    assert visit(Group("a"), connect=connect).go().status == CHANGED
    assert len(connections) == 2


def test_without_become_a_change_that_needs_root_is_somebody_elses(visit, monkeypatch, tmp_path):
    device = Device("box", "generic", PROFILE, Budget(1), access=Access("box", become=False), folder=str(tmp_path))
    root = FileStep("a", commands=(Command(("swapoff", "-a"), become=True), Command(("true",))))
    made = visit(root, FileStep("b"), device=device, options=Options(check=True))
    monkeypatch.setattr("testbed.provision.visit.gather", as_user(1000))
    outcome = made.go()
    assert outcome.status == FAILED
    assert outcome.problems[0].text == (
        "nothing, not right; that needs root (`become: false` in the inventory): let an administrator run "
        "sudo swapoff -a && true"
    )
    assert names(outcome.changes) == ["b"]


def as_user(uid):
    from testbed.provision.facts import gather

    def as_that_user(*arguments):
        facts = gather(*arguments)
        return {**facts, "login": {**facts["login"], "uid": uid}}

    return as_that_user


def test_a_device_that_cannot_be_reached_is_a_problem(visit):
    def refuse():
        raise DeviceError("box: no route to host")

    outcome = visit(FileStep("a"), connect=refuse).go()
    assert (outcome.status, outcome.facts) == (FAILED, None)
    assert [(problem.step, problem.text) for problem in outcome.problems] == [("connection", "box: no route to host")]


def test_a_board_whose_boots_cannot_be_told_apart_is_not_rebooted(visit, monkeypatch):
    from testbed.provision.facts import gather

    class FromNextBoot:
        name = "kernel"

        def check(self, facts, device):
            return Change("kernel", "not yet in effect", "right", needs_reboot=True)

    made = visit(FromNextBoot(), options=Options(reboot=True))
    monkeypatch.setattr("testbed.provision.visit.gather", lambda *of: {**gather(*of), "boot": {"id": None}})
    outcome = made.go()
    assert outcome.status == FAILED
    assert "boot_id cannot be read, so nobody could tell when it is back" in outcome.problems[0].text


class Reboots(LocalConnection):
    """A board that is told to reboot, and then asked which boot this is; an answer that is an error is raised."""

    def __init__(self, *answers):
        super().__init__("box")
        self.answers = list(answers)

    def attempt(self, command, patience_seconds=60.0, *, data=b"", become=False):
        if command == ["cat", "/proc/sys/kernel/random/boot_id"]:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return Ran(0, answer, "")
        if become:
            return Ran(0, "", "")
        return super().attempt(command, patience_seconds, data=data, become=become)


def rebooted(visit, *answers, **more):
    """The outcome of a visit that reboots the board, which then answers so."""

    class UntilBoot:
        name = "kernel"

        def check(self, facts, device):
            return Change("kernel", "not yet in effect", "right", needs_reboot=True) if board.answers else None

    board = Reboots(*answers)
    return visit(UntilBoot(), connect=lambda: board, options=Options(reboot=True), **more).go()


def test_a_board_is_waited_for_until_it_answers_with_another_boot(visit, monkeypatch, tmp_path):
    monkeypatch.setattr("testbed.provision.visit._POLL_SECONDS", 0.0)
    before = Path("/proc/sys/kernel/random/boot_id").read_text()
    outcome = rebooted(visit, before, DeviceError("box: no route to host"), "another")
    assert (outcome.status, names(outcome.changes)) == (CHANGED, ["kernel"])
    assert landing.holder(str(tmp_path / "testbed" / "lock.json")) is None


def test_a_board_that_does_not_come_back_is_told_with_the_last_reason(visit):
    outcome = rebooted(visit, DeviceError("box: ada@box refused every key"), "never asked", reboot_seconds=-1.0)
    assert outcome.status == FAILED
    assert "s after its reboot; look at it (box: ada@box refused every key)" in outcome.problems[0].text


@pytest.mark.parametrize("error", [HostKeyError("box: its host key has changed"), RightError("box: needs root")])
def test_after_a_reboot_what_waiting_does_not_mend_is_told_at_once(visit, error):
    outcome = rebooted(visit, error, "never asked")
    assert [problem.text for problem in outcome.problems] == [str(error)]


def test_a_visit_that_is_stopped_ends_between_two_steps(visit):
    stopped = Event()

    def stop(connection, say):
        stopped.set()
        say("never said")

    outcome = visit(FileStep("a"), FileStep("b", action=stop), FileStep("c"), stopped=stopped).go()
    assert outcome.status == INTERRUPTED
    assert sorted(path.name for path in visit.folder.iterdir()) == ["a"]


def test_it_is_said_that_a_board_is_being_reached_before_it_answers(visit):
    said = []

    def connect():
        said.append("(no answer)")
        raise DeviceError("box does not answer")

    assert visit(FileStep("a"), connect=connect, say=said.append).go().status == FAILED
    assert said == ["connecting", "(no answer)"]
