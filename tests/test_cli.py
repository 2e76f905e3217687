import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import testbed.cli
from testbed.cli import main
from testbed.commands._options import typable
from testbed.errors import ConfigError, UsageError
from testbed.method import FAMILIES
from testbed.plugins import all_methods

COMMANDS = testbed.cli.testbed_command.list_commands(None)


def without_torch(*args):
    """Run the command in a process in which nothing heavy can be imported; gives the process."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'transformers', 'peft', 'numpy', 'datasets', 'sklearn']))\n"
        "from testbed.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["inventory"], ["inventory", "--json"], ["methods"]])
def test_what_must_answer_at_once_needs_nothing_heavy(args):
    done = without_torch(*args)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_needs_nothing_heavy_for_it(command):
    done = without_torch(command, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: testbed" in done.stdout
    assert len(done.stdout.splitlines()) > 4


def test_inventory_lists_the_default_devices(capsys):
    assert main(["inventory"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["device", "kind", "profile", "memory", "budget", "clients", "tags"]
    assert len(lines) == 5
    assert "jetson_orin_nano_8gb" in lines[1]


def test_inventory_as_json_has_base_units(capsys):
    assert main(["inventory", "--json", "--only", "raspberry-pi"]) == 0
    devices = json.loads(capsys.readouterr().out)
    assert [device["name"] for device in devices] == ["raspberry-pi-5", "raspberry-pi-4"]
    assert devices[0]["budget"] == {"memory_bytes": 640 << 20, "cores": None}


def test_only_may_be_repeated(capsys):
    assert main(["inventory", "--json", "--only", "small", "--only", "jetson-orin-nano"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


def test_methods_tell_their_settings(capsys):
    assert main(["methods", "--json"]) == 0
    methods = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert methods["lora"]["settings"]["rank"]["type"] == "a whole number"
    assert methods["lora"]["family"] == "LoRA, homogeneous"


def test_methods_are_grouped_as_the_field_groups_them(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line.strip() for line in lines if line.strip() in FAMILIES]
    assert headings == list(FAMILIES)
    first = next(index for index, line in enumerate(lines) if line.startswith("zeroth order"))
    assert lines[first + 1].startswith("  fedkseed")


def test_one_method_is_told_in_full(capsys):
    assert main(["methods", "fedkseed"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "arXiv:2312.06353" in said
    assert "memory: whole model, forward only" in said
    assert "epsilon" in said


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_method_tells_what_it_needs_and_what_each_setting_means(name, capsys):
    assert main(["methods", name, "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    assert told["family"] in FAMILIES
    assert all(told[need] for need in ("memory", "traffic", "data", "summary"))
    assert [setting for setting, about in told["settings"].items() if not about["about"]] == []


WRONG_USE = {
    "no such method": (["methods", "lroa"], 'there is no method "lroa"; did you mean "lora"'),
    "no such command": (["inventry"], 'there is no command "inventry"; did you mean "inventory"?'),
    "no such option": (["inventory", "--jsn"], "No such option"),
    "no such word": (["inventory", "--only", "pi"], "no device has the name, tag or profile 'pi'"),
}


@pytest.mark.parametrize("case", WRONG_USE)
def test_wrong_use_is_told_and_exits_2(case, capsys):
    args, message = WRONG_USE[case]
    assert main(args) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert not said.out


def test_a_wrong_file_is_told_and_exits_1(tmp_path, capsys):
    assert main(["inventory", "--inventory", str(tmp_path / "lab.yaml")]) == 1
    assert capsys.readouterr().err == (
        f"testbed: {tmp_path}/lab.yaml: expected an inventory file, got nothing: there is no such file\n"
    )


@pytest.fixture
def outcome(monkeypatch):
    """Let the command `inventory` raise, or return, what the test says."""

    def let(raised=None, returned=None):
        def read_inventory(*_):
            if raised is not None:
                raise raised
            return returned

        monkeypatch.setattr(testbed.cli.inventory_command, "callback", lambda **_: read_inventory())

    return let


@pytest.mark.parametrize(
    ("raised", "code"), [(ConfigError("no"), 1), (UsageError("no"), 2), (KeyboardInterrupt(), 130), (EOFError(), 130)]
)
def test_exit_codes_of_errors(raised, code, outcome, capsys):
    outcome(raised=raised)
    assert main(["inventory"]) == code
    assert capsys.readouterr().err.strip().startswith("testbed: ")


def test_what_the_system_refuses_is_told_in_one_line(outcome, capsys):
    outcome(raised=PermissionError(errno.EACCES, "Permission denied", "/root/runs"))
    assert main(["inventory"]) == 1
    assert capsys.readouterr().err == "testbed: /root/runs: Permission denied\n"


@pytest.mark.parametrize("command", ["unlock", "record"])
def test_a_word_of_several_devices_is_no_device(command, tmp_path, capsys):
    pi = "{kind: generic, profile: raspberry_pi_5_8gb, host: nowhere.invalid, tags: [pis], budget: {memory: 5 GiB}}"
    (tmp_path / "lab.yaml").write_text(f"devices: {{pi-1: {pi}, pi-2: {pi}}}\n")
    assert main([command, "pis", "--inventory", str(tmp_path / "lab.yaml")]) == 2
    assert '"pis" is no device; it selects pi-1, pi-2' in capsys.readouterr().err


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_number_that_a_command_returns_is_the_exit_code(returned, code, outcome):
    outcome(returned=returned)
    assert main(["inventory"]) == code


def test_ctrl_c_ends_without_a_traceback():
    code = (
        "import signal, sys\n"
        "from testbed import cli\n"
        "def wait(**_):\n"
        "    print('waiting', flush=True)\n"
        "    signal.pause()\n"
        "cli.inventory_command.callback = wait\n"
        "sys.exit(cli.main(['inventory']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    assert (process.returncode, told.decode().strip()) == (130, "testbed: interrupted")


def test_a_reader_that_goes_away_is_no_error_message():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", "from testbed.cli import main; raise SystemExit(main(['inventory']))"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("given", [["--inventory", "{file}"], ["--inventory={file}"]])
def test_a_command_in_a_message_can_be_typed_as_it_stands(tmp_path, capsys, monkeypatch, given):
    monkeypatch.setenv("TESTBED_DATA", str(tmp_path / "data"))
    file = tmp_path / "lab.yaml"
    device = "{kind: generic, profile: raspberry_pi_5_8gb, host: 127.0.0.1, port: 1, budget: {memory: 5 GiB}}"
    file.write_text(f"devices: {{pi-1: {device}}}\n")
    assert main(["run-method", "lora", "--dry-run", *(word.format(file=file) for word in given)]) == 1
    assert f"testbed provision --inventory {file} --only pi-1" in capsys.readouterr().err


def test_an_inventory_with_a_space_in_its_name_can_be_typed_too():
    assert typable("see testbed status", Path("my lab.yaml")) == "see testbed status --inventory 'my lab.yaml'"


@pytest.mark.parametrize("given", [["--folder", "my lab"], ["--folder=my lab"]])
def test_a_command_for_a_lab_in_a_message_has_its_folder(tmp_path, capsys, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my lab").mkdir()
    (tmp_path / "my lab" / "lab.json").touch()
    assert main(["lab", "up", *given]) == 1
    told = capsys.readouterr().err
    assert "see `testbed lab status --folder 'my lab'`, and `testbed lab down --folder 'my lab'` to remove it" in told
    assert main(["lab", "status", *given]) == 1
    assert "`testbed lab down --folder 'my lab'` removes the lab" in capsys.readouterr().err


def test_the_labs_own_folder_need_not_be_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    assert main(["lab", "status"]) == 1
    assert f"there is no lab in {tmp_path}/lab; `testbed lab up` makes one" in capsys.readouterr().err
