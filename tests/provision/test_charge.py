"""Whether CUDA memory is charged to a cgroup: when it is measured, kept, and measured again."""

import json
from dataclasses import replace

import pytest

from testbed.connection import LocalConnection, Ran
from testbed.provision import environment_build
from testbed.provision.charge import CHARGE_PART, ChargeProbe
from testbed.provision.part import Answer
from testbed.provision.step import Change, Note
from tests.provision.tables import device_of, facts_of

KEY = {"kernel": "5.15.148-tegra", "l4t": "36.4.3", "torch": "2.8.0"}
UNCLEAR = {"charged": None, "why": "256 bytes taken: the group grew by 128"}


class Board(LocalConnection):
    """A board whose probe says these things, one after the other."""

    def __init__(self, *said):
        super().__init__("it")
        self.said, self.kept = list(said), ""

    def attempt(self, command, patience_seconds=60.0, *, data=b"", become=False):
        if "cat" in command[2]:
            self.kept = data.decode()
            return Ran(0, "", "")
        return Ran(0, json.dumps(self.said.pop(0)), "")


@pytest.fixture(autouse=True)
def no_wheel(monkeypatch):
    monkeypatch.setattr(environment_build, "our_code", lambda: type("Code", (), {"sha256": "0" * 64}))


def device(**changes):
    return replace(device_of("jetpack_6"), accelerator="cuda", **changes)


def facts(kept="", **environment):
    found = {"torch": "2.8.0", "cuda_available": True, **environment}
    return {**facts_of("jetpack_6"), "environment": found, **CHARGE_PART.parse(Answer(output=kept))}


def visit(board):
    """A visit's findings: what is to be changed, and what is said when that was done."""
    step = ChargeProbe()
    found = step.check(facts(board.kept), device())
    if isinstance(found, Change):
        found.action(board, lambda words: None)
    return found, step.check(facts(board.kept), device())


@pytest.mark.parametrize("charged", [True, False])
def test_an_answer_is_kept(charged):
    board = Board({"charged": charged, "why": "…"})
    first, after = visit(board)
    assert (first.found, after) == ("not measured", None)
    assert visit(board) == (None, None)
    assert facts(board.kept)["cuda_charged_to_cgroup"] is charged


def test_what_could_not_be_told_is_a_note_and_measured_again_at_the_next_visit():
    board = Board(UNCLEAR, UNCLEAR, {"charged": True, "why": "…"})
    _, note = visit(board)
    assert note == Note(
        "CUDA in cgroup", f"it could not be told, and is tried again at the next visit: {UNCLEAR['why']}"
    )
    again, note = visit(board)
    assert (again.found, type(note)) == (f"could not be told: {UNCLEAR['why']}", Note)
    assert visit(board)[1] is None
    assert visit(board) == (None, None)


@pytest.mark.parametrize(
    ("device", "environment"),
    [
        (device(), {"cuda_available": False}),
        (replace(device(), accelerator="cpu"), {}),
        (replace(device(), kind="generic"), {}),
    ],
)
def test_a_board_without_cuda_of_its_own_is_left_alone(device, environment):
    assert ChargeProbe().check(facts(json.dumps({"key": KEY, **UNCLEAR}), **environment), device) is None


@pytest.mark.parametrize("changed", ["kernel", "l4t", "torch"])
def test_another_kernel_or_torch_is_measured_anew(changed):
    kept = json.dumps({"key": {**KEY, changed: "another"}, "charged": True, "why": "…"})
    assert ChargeProbe().check(facts(kept), device()).found == "not measured"
