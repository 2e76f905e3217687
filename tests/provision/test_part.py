"""The facts script runs for real, on this machine's sh; what it prints becomes facts."""

import pytest

from testbed.connection import LocalConnection
from testbed.errors import DeviceError
from testbed.inventory import Budget, Device, HardwareProfile
from testbed.provision import clock, facts
from testbed.provision.part import Answer, Part, facts_of, script_of, sections_of, stamps_of

BOX = Device("box", "generic", HardwareProfile("box", "A box", 1 << 40, 1 << 20, 1), Budget(1 << 20))


def answer_of(parts, folder="testbed", python=None):
    return LocalConnection().run(["sh", "-c", script_of(parts, folder, python)])


def kept(name, **fields):
    """A part that gives back its whole answer, under its own name."""
    return Part(name, lambda answer: {name: answer}, **fields)


def test_files_are_read_by_their_globs(tmp_path):
    rail = tmp_path / "iio:device0" / "rail_name_0"
    rail.parent.mkdir()
    rail.write_text("VDD_IN\n")
    (tmp_path / "two lines").write_text("a: b\n\nc=d\n")
    (tmp_path / "no newline").write_text("7")
    part = kept("it", files=(f"{tmp_path}/iio*/rail_name_?", f"{tmp_path}/two lines", f"{tmp_path}/no *", "/nowhere"))
    found = facts_of([part], answer_of([part]))["it"]
    assert found.files == {str(rail): "VDD_IN", f"{tmp_path}/two lines": "a: b\n\nc=d", f"{tmp_path}/no newline": "7"}
    assert found.text("/nowhere") is None


def test_a_part_sees_only_the_files_that_it_asked_for(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    parts = [kept(name, files=(f"{tmp_path}/{name}",)) for name in "ab"]
    found = facts_of(parts, answer_of(parts))
    assert {name: list(answer.files) for name, answer in found.items()} == {
        "a": [f"{tmp_path}/a"],
        "b": [f"{tmp_path}/b"],
    }


def test_a_script_cannot_disturb_the_next_one():
    parts = [
        kept("rude", script="cd /; exec 2>&1; nosuchcommand; echo said=this; exit 7"),
        kept("next", script='pwd; cat; echo "$FOLDER"'),
    ]
    found = facts_of(parts, answer_of(parts, folder="/a folder"))
    assert found["rude"].values == {"said": "this"}
    assert found["next"].output.splitlines()[-1] == "/a folder"


@pytest.mark.parametrize(("folder", "expected"), [("x/y", "$HOME/x/y"), ("~/x", "$HOME/x"), ("/x", "/x")])
def test_the_folder_is_below_the_home_or_absolute(folder, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    part = kept("it", script='echo "$FOLDER,$DEVICE_PYTHON"')
    found = facts_of([part], answer_of([part], folder, "/opt/my python"))["it"]
    assert found.output.strip() == expected.replace("$HOME", "/home/ada") + ",/opt/my python"


def test_what_a_login_shell_says_before_is_dropped():
    assert sections_of("Welcome!\nbegun=1\n\n\x1ebegun\n1.5\n\n\x1eended\n2.5\n") == {"begun": "1.5\n", "ended": "2.5"}


def test_the_clock_is_read_at_both_ends():
    begun, ended = stamps_of(answer_of([]))
    assert begun <= ended
    assert stamps_of("\x1ebegun\n17.%N\n\x1eended\n17.%N\n") is None  # busybox


def test_the_offset_is_the_middle_of_what_travelled():
    # Sent at 10 s, answered at 10.5 s, of which the script took 0.3 s by a clock that is 100 s ahead.
    found = clock.offset(10.0, 10.5, (110.1, 110.4))
    assert found["offset_seconds"] == pytest.approx(100.0)
    assert found["uncertainty_seconds"] == pytest.approx(0.1)
    assert clock.offset(10.0, 10.5, None) == {"offset_seconds": None, "uncertainty_seconds": None}


def test_facts_of_this_machine():
    found = facts.gather(LocalConnection(), BOX)
    assert found["board"]["memory_bytes"] > 0
    assert found["login"]["uid"] is not None
    assert found["disk_free_bytes"] > 0
    offset, uncertainty = found["clock"]["offset_seconds"], found["clock"]["uncertainty_seconds"]
    assert abs(offset) <= uncertainty + 0.001  # it is the same clock


def test_a_device_that_answers_nothing_is_an_error():
    class Mute(LocalConnection):
        def attempt(self, command, *args, **kwargs):
            return super().attempt(["sh", "-c", "echo oops >&2; exit 1"])

    with pytest.raises(DeviceError, match="box: its facts cannot be gathered: oops"):
        facts.gather(Mute(), BOX)


@pytest.mark.parametrize("part", facts.FACTS_SCRIPT_PARTS, ids=lambda part: part.name)
def test_every_part_bears_that_nothing_is_there(part):
    assert part.parse(Answer())
