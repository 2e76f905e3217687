"""Commands of several changes in one script, run for real."""

import os

import pytest

from testbed.connection import LocalConnection
from testbed.errors import DeviceError
from testbed.provision.batch import Batch, batches, run, text_of
from testbed.provision.step import Change, Command


def change(step, *commands):
    return Change(step, "found", "wanted", tuple(commands))


def sh(script, **more):
    return Command(("sh", "-c", script), **more)


def run_all(*changes):
    failures = {}
    for batch in batches(changes):
        failures |= run(LocalConnection(), batch)
    return failures


def test_a_failure_ends_its_own_change_only(tmp_path):
    failures = run_all(
        change("a", sh(f"echo 1 >{tmp_path}/a1"), sh("echo no such luck >&2; exit 3"), sh(f"echo 1 >{tmp_path}/a2")),
        change("b", sh(f"echo 1 >{tmp_path}/b")),
    )
    assert failures == {0: "sh -c 'echo no such luck >&2; exit 3': exit code 3: no such luck"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a1", "b"]


def test_commands_have_their_own_input(tmp_path):
    odd = b"it's 50 %\n\x00\xff\n"
    copy = Command(("sh", "-c", 'cat >"$0"', f"{tmp_path}/a file"), data=odd)
    assert run_all(change("a", copy, sh("read line && exit 1 || exit 0"))) == {}
    assert (tmp_path / "a file").read_bytes() == odd


def test_what_is_made_for_everybody_is_readable_for_everybody(tmp_path):
    mask = os.umask(0o077)
    try:
        assert run_all(change("a", Command(("mkdir", f"{tmp_path}/folder")))) == {}
    finally:
        os.umask(mask)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def test_a_command_that_is_not_there_is_told():
    told = run_all(change("a", Command(("no-such-program", "x"))))[0]
    assert told.startswith("no-such-program x: exit code 127: ")
    assert "not found" in told


def test_what_a_command_prints_is_not_taken_for_an_answer():
    assert run_all(change("a", sh("printf 'line\\n'; exit 0"), sh("printf 'no newline'; exit 1"))) == {
        0: "sh -c 'printf '\"'\"'no newline'\"'\"'; exit 1': exit code 1: no newline"
    }


def test_a_command_that_ends_the_script_has_no_answer():
    failures = run_all(change("a", sh("exit 0"), sh("kill -9 $PPID")), change("b", sh("exit 0")))
    assert failures == {0: "sh -c 'kill -9 $PPID': no answer", 1: "sh -c 'exit 0': no answer"}


def test_a_script_that_says_nothing_is_an_error_of_the_device():
    with pytest.raises(DeviceError, match="exit code"):
        run_all(change("a", sh("kill -9 $PPID")))


def test_neighbours_of_one_level_of_rights_travel_together():
    plain, root, slow = sh("a"), sh("b", become=True), sh("c", become=True, patience_seconds=600)
    changes = [change("1", root, root), change("2", root), change("3", slow, root, plain), change("4", plain)]
    found = [(batch.become, [index for index, _ in batch.commands]) for batch in batches(changes)]
    assert found == [(True, [0, 0, 1]), (True, [2]), (True, [2]), (False, [2, 3])]


def test_a_batch_is_as_long_as_one_argument_may_be():
    large = Command(("cat",), data=b"x" * 40_000)
    assert len(list(batches([change("a", large, large, large)]))) == 3


def test_a_batch_is_as_patient_as_its_commands():
    assert Batch(False, ((0, sh("a", patience_seconds=5)), (0, sh("b", patience_seconds=7)))).patience_seconds == 12


def test_a_command_as_a_person_would_type_it():
    assert text_of(Command(("tee", "/a b"), become=True, data=b"x\n")) == "printf %s 'x\n' | sudo tee '/a b'"
