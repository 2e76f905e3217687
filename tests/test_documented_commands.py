"""Every command that a page tells to type in a block of its own is typed here, in the page's order.

Each is typed in one of two places: on this machine alone, or where there are boards, which are the virtual lab's.  What
can be typed in neither stands in NOT_HERE, with the reason and with the test that does it instead.  `tests.page_desk`
says in which form they are typed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.lab_runs import Desk
from tests.page_desk import SOME_LAB, PageDesk, on_the_lab
from tests.pages import PAGES, ROOT, ShownFile, Typed, commands_of, steps_of

#: Beginning of a command, or an option of it → why it is not typed here.
NOT_HERE = {
    "--confirm": "real jobs that look for a limit: tests/test_frontier.py",
    "--python-archive": "needs a board with an old Python: tests/test_python_archive.py",
    "--rootfs-archive": "needs a board with an old glibc: tests/provision/test_environment.py",
    "calibrate": "needs two live meters and half a minute: tests/test_meter_commands.py",
    "dashboards": "starts Prometheus: tests/test_dashboards.py",
    "evaluate": "needs a language model and questions: tests/evaluation",
    "exporter": "serves until Ctrl-C: tests/test_exporter.py",
    "image build": "needs a publisher's image: tests/device_images/test_build.py",
    "image check": "needs the folder that is rendered: tests/device_images/test_image_command.py",
    "image render": "needs a public key of the reader's: tests/device_images/test_image_command.py",
    "lab down": "the tests share one lab, which ends with them",
    "lab up": "the tests share one lab, which was brought up by this command (tests.lab_runs.open_study)",
    "power": "needs a plug that switches: tests/test_meter_commands.py",
    "provision --inventory vm/inventory.yaml": "needs a virtual machine: tests/machines",
    "report claim.yaml": "needs the runs of an experiment that is only planned here: tests/reports",
    "report quickstart": "needs forty minutes of runs: tests/reports",
    "run-method fedpruner --inventory old.yaml": "needs boards of JetPack 4 and 5, which the lab's are not",
    "run-method lora --inventory vm/inventory.yaml": "needs a virtual machine: tests/machines",
    "run-method mymethod": "the method is the reader's own",
}
#: Commands that ask boards, whatever their options are.
AT_BOARDS = ("clean", "lab", "logs", "meter", "power", "provision", "record", "status", "trust", "unlock")
#: Commands that ask the devices of the file that they are given, and such files with boards, by any page.
AT_DEVICES = ("run-method", "deploy", "experiment", "frontier")
FILES_WITH_BOARDS = {"lab.yaml", "lab/inventory.yaml", "servers.yaml", "fleet.yaml"}


def is_of(entry: str, command: Typed) -> bool:
    """Whether an entry of NOT_HERE is about the command."""
    words = tuple(entry.split())
    return command.words[: len(words)] == words or (entry.startswith("--") and entry in command.words)


def left_out(command: Typed) -> bool:
    return any(is_of(entry, command) for entry in NOT_HERE)


def test_what_is_left_out_is_on_a_page():
    typed = [command for page in PAGES for command in commands_of(page)]
    assert [entry for entry in NOT_HERE if not any(is_of(entry, command) for command in typed)] == []


def needs_boards(command: Typed) -> bool:
    words = command.words
    asks_them = words[0] in AT_DEVICES and not FILES_WITH_BOARDS.isdisjoint(words)
    return words[0] in AT_BOARDS or "--facts" in words or "lab/inventory.yaml" in words or asks_them


def pages(boards: bool) -> list[Path]:
    """Those with a command that is typed in that place."""
    typed = {page: [each for each in commands_of(page) if not left_out(each)] for page in PAGES}
    return [page for page, commands in typed.items() if any(needs_boards(each) is boards for each in commands)]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small model and data, and `runs` with a real run on an emulated device."""
    from tests.tiny_lab import arguments, make_lab

    lab = make_lab(tmp_path_factory.mktemp("tiny"))
    desk = Desk(lab)
    desk.testbed("run-method", "lora", *arguments(lab, "--rounds", "2", "--steps", "1"), "--only", "large")
    return lab


@pytest.mark.slow
@pytest.mark.cgroup
@pytest.mark.parametrize("page", pages(boards=False), ids=named)
def test_a_page_without_boards(page, tiny, tmp_path):
    desk = PageDesk(tmp_path, tiny, tiny / "runs")
    for step in steps_of(page):
        if isinstance(step, ShownFile):
            desk.write(step)
        elif step.program == "testbed" and not left_out(step) and not needs_boards(step):
            desk.type(step)


@pytest.fixture
def lab_desk(study, undisturbed, tmp_path):
    """A desk in the lab that the tests share, with its fact sheets, and a run on its boards."""
    desk = PageDesk(tmp_path, study.desk.folder, undisturbed.parent)
    desk.variables["TESTBED_DATA"] = study.desk.variables["TESTBED_DATA"]
    (tmp_path / "lab").symlink_to(study.lab.folder)
    desk.write(ShownFile("lab.yaml", on_the_lab(SOME_LAB, study.lab.ssh_config, sys.executable)))
    return desk


@pytest.mark.slow
@pytest.mark.lab
@pytest.mark.usefixtures("boards_put_right")
@pytest.mark.parametrize("page", pages(boards=True), ids=named)
def test_a_page_with_boards(page, lab_desk, study):
    files = [step for step in steps_of(page) if isinstance(step, ShownFile)]
    for file in files:
        shown = "devices:" in file.text and file.name.endswith(".yaml")
        text = on_the_lab(file.text, study.lab.ssh_config, sys.executable) if shown else file.text
        lab_desk.write(ShownFile(file.name, text))
    for command in commands_of(page):
        if needs_boards(command) and not left_out(command):
            lab_desk.type(command)
