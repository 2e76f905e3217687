"""Several devices at a time, and what is told of them."""

import io
import json
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from rich.console import Console

from testbed.cli import main
from testbed.connection import LocalConnection
from testbed.errors import DeviceError, PlanError
from testbed.fact_sheets import facts_of, store, stored_facts
from testbed.inventory import Access, Budget, Device, HardwareProfile, Inventory
from testbed.prepare import known_facts
from testbed.provision.facts import FACTS_SCRIPT_PARTS
from testbed.provision.own_folder import PrivateFolder
from testbed.provision.runner import Provisioning, board_steps
from testbed.provision.step import Change, Command, Note, Problem
from testbed.provision.view import LiveTable, PlainLines, headline, outcome_data, told
from testbed.provision.visit import CHANGED, DIFFERS, FAILED, INTERRUPTED, READY, REBOOT, Options, Outcome

PROFILE = HardwareProfile("box", "A box", 1 << 40, 1 << 20, 1)


@pytest.fixture(autouse=True)
def data_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TESTBED_DATA", str(tmp_path / "data"))


class Finds:
    """A step that says what it is told to."""

    name = "it"

    def __init__(self, finding=None):
        self._finding = finding

    def check(self, facts, device):
        return self._finding(device) if callable(self._finding) else self._finding


def device(name, tmp_path, host=None):
    return Device(name, "generic", PROFILE, Budget(1), access=Access(host or name), folder=str(tmp_path / name))


def provisioning(devices, finding=None, **more):
    return Provisioning(
        devices,
        more.pop("options", Options()),
        steps=lambda _: (Finds(finding),),
        parts=FACTS_SCRIPT_PARTS,
        connect=more.pop("connect", lambda device: LocalConnection(device.name)),
        **more,
    )


def test_outcomes_come_in_the_order_of_the_devices(tmp_path):
    devices = [device(f"box-{number}", tmp_path) for number in range(6)]
    outcomes = provisioning(devices, jobs=3).run()
    assert [(outcome.device, outcome.status) for outcome in outcomes] == [(each.name, READY) for each in devices]


def test_one_that_cannot_be_reached_does_not_stop_the_others(tmp_path):
    def connect(device):
        if device.name == "box-1":
            raise DeviceError("box-1: no route to host")
        return LocalConnection(device.name)

    outcomes = provisioning([device(f"box-{number}", tmp_path) for number in range(3)], connect=connect).run()
    assert [outcome.status for outcome in outcomes] == [READY, FAILED, READY]
    assert stored_facts("box-1") is None


def test_a_fault_of_ours_costs_one_device_and_says_so(tmp_path):
    def broken(device):
        raise KeyError("compatible") if device.name == "box-0" else None

    def finding(device):
        return broken(device) if device.name == "box-0" else None

    outcomes = provisioning([device(f"box-{number}", tmp_path) for number in range(2)], finding).run()
    assert [outcome.status for outcome in outcomes] == [FAILED, READY]
    assert "KeyError: 'compatible'; that is a fault of the testbed" in outcomes[0].problems[0].text


def test_two_devices_of_one_machine_are_visited_one_after_the_other(tmp_path):
    at_work, most, lock = set(), [], threading.Lock()

    class Counts:
        def doing(self, device, words):
            with lock:
                at_work.add(device)
                most.append(len(at_work))

        def ended(self, outcome):
            with lock:
                at_work.discard(outcome.device)

    guests = [device(f"guest-{number}", tmp_path, host="server") for number in range(4)]
    provisioning(guests, watcher=Counts()).run()
    assert max(most) == 1


def test_facts_are_kept_here_and_there(tmp_path):
    box = device("box", tmp_path)
    provisioning([box], Note("it", "told")).run()
    here = facts_of(box)
    there = json.loads((tmp_path / "box" / "facts-box.json").read_text())
    assert here == there
    assert (here["status"], here["notes"], here["host"]) == (READY, ["it: told"], "box")


def test_check_keeps_nothing(tmp_path):
    box = device("box", tmp_path)
    provisioning([box], options=Options(check=True)).run()
    assert facts_of(box) is None
    assert not (tmp_path / "box").exists()


def test_a_sheet_that_says_nothing_new_is_not_sent_again(tmp_path):
    box = device("box", tmp_path)
    provisioning([box]).run()
    sheet = tmp_path / "box" / "facts-box.json"
    before = sheet.stat().st_ino
    provisioning([box]).run()
    assert sheet.stat().st_ino == before
    provisioning([box], Note("it", "something new")).run()
    assert sheet.stat().st_ino != before


def test_guests_that_share_a_folder_keep_a_sheet_each(tmp_path):
    guests = [replace(device(name, tmp_path, host="server"), folder=str(tmp_path / "shared")) for name in "ab"]
    provisioning(guests).run()
    sheets = sorted((tmp_path / "shared").iterdir())
    before = [path.stat().st_ino for path in sheets]
    provisioning(guests).run()
    assert [path.name for path in sheets] == ["facts-a.json", "facts-b.json"]
    assert [path.stat().st_ino for path in sheets] == before


def test_what_is_found_on_another_board_is_nobodys_sheet(tmp_path):
    box = device("box", tmp_path)
    store("box", {"host": "box", "baseline": {"bytes": 7}})
    provisioning([box], Problem("identity", "another board", fatal=True)).run()
    assert facts_of(box) == {"host": "box", "baseline": {"bytes": 7}}
    assert not (tmp_path / "box").exists()


def test_a_sheet_of_a_visit_that_failed_over_python_does_not_count(tmp_path):
    box = device("box", tmp_path)
    of_box = {"host": "box", "baseline": {"bytes": 7}, "status": "failed"}
    store("box", {**of_box, "problems": ["power rails: VDD_IN cannot be read"]})
    assert set(known_facts(Inventory((box,)))) == {"box"}
    store("box", {**of_box, "problems": ["proof: torch does not work"]})
    with pytest.raises(PlanError, match=r"box \(proof: torch does not work\) failed.*testbed provision --only box"):
        known_facts(Inventory((box,)))


def test_the_folder_is_closed_to_others(tmp_path):
    box = device("box", tmp_path)
    visits = Provisioning([box], Options(), connect=lambda _: LocalConnection("box"), steps=lambda _: [PrivateFolder()])
    assert visits.run()[0].status == READY
    folder = tmp_path / "box"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    visits = Provisioning([box], Options(), connect=lambda _: LocalConnection("box"), steps=lambda _: [PrivateFolder()])
    assert visits.run()[0].status == CHANGED
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_device_that_cannot_keep_its_sheet_is_no_failure(tmp_path):
    box = device("box", tmp_path)
    (tmp_path / "box").write_text("a file in its place")
    outcome = provisioning([box]).run()[0]
    assert outcome.status == READY
    assert [note.step for note in outcome.notes] == ["fact sheet"]


def test_the_sheet_of_another_machine_of_the_same_name_does_not_count(tmp_path):
    store("box", {"host": "elsewhere"})
    assert facts_of(device("box", tmp_path)) is None


def test_an_emulated_device_changes_little_on_its_host():
    guest = Device("guest", "emulated", PROFILE, Budget(1), access=Access("server"))
    names = [step.name for step in board_steps(guest, Options())]
    assert names == ["capacity", "disk", "boot hook", "memory cgroup", "delegation", "folder"]


@pytest.mark.parametrize("kind", ["jetson", "raspberry_pi", "generic"])
def test_keep_swap_leaves_the_step_out(kind):
    board = Device("board", kind, PROFILE, Budget(1), access=Access("board"))
    assert "swap" in {step.name for step in board_steps(board, Options())}
    assert "swap" not in {step.name for step in board_steps(board, Options(keep_swap=True))}


INTERRUPTED_RUN = """
import sys, threading
from testbed.connection import LocalConnection
from testbed.provision.facts import FACTS_SCRIPT_PARTS
from testbed.provision.runner import Provisioning
from testbed.provision.step import Change
from testbed.provision.visit import Options
from testbed.inventory import Access, Budget, Device, HardwareProfile

hung_up = threading.Event()

class Hangs(LocalConnection):
    def close(self):
        hung_up.set()

class Step:
    name = "long"
    def check(self, facts, device):
        def act(connection, say):
            print("waiting", flush=True)
            hung_up.wait()
            say("never")
        return Change("long", "a", "b", action=act)

profile = HardwareProfile("box", "A box", 1 << 40, 1, 1)
box = Device("box", "generic", profile, Budget(1), access=Access("box"), folder=sys.argv[1])
steps = {"steps": lambda _: (Step(),), "parts": FACTS_SCRIPT_PARTS}
make = Provisioning([box], Options(), connect=lambda _: Hangs("box"), **steps)
try:
    make.run()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_hangs_up_and_ends(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED_RUN, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        told, errors = process.communicate(timeout=20)
    assert (process.returncode, told, errors) == (0, "interrupted\n", "")
    assert not (tmp_path / "lock.json").exists()


# ── what is told ─────────────────────────────────────────────────────────────────────────────────────────────────────
SWAP = Change("swap", "/dev/zram0 (2 GiB)", "no swap", (Command(("swapoff", "-a"), become=True),))
KERNEL = Change("memory cgroup", "none", "can be capped", needs_reboot=True)
OUTCOMES = {
    READY: Outcome("a", READY),
    CHANGED: Outcome("b", CHANGED, (SWAP,)),
    DIFFERS: Outcome("c", DIFFERS, (SWAP,)),
    REBOOT: Outcome("d", REBOOT, (SWAP, KERNEL), waiting=("memory cgroup",)),
    FAILED: Outcome("e", FAILED, (), (Problem("disk", "full"), Problem("clock", "no chrony"))),
    INTERRUPTED: Outcome("f", INTERRUPTED),
}
HEADLINES = {
    READY: "ready",
    CHANGED: "changed: swap",
    DIFFERS: "would change: swap",
    REBOOT: "needs a reboot for memory cgroup",
    FAILED: "failed: disk, clock",
    INTERRUPTED: "interrupted",
}


@pytest.mark.parametrize("status", OUTCOMES)
def test_a_device_in_one_line(status):
    assert headline(OUTCOMES[status]) == HEADLINES[status]


def test_all_of_it_line_by_line():
    assert told([OUTCOMES[REBOOT], OUTCOMES[FAILED]], verbose=True) == [
        "d: needs a reboot for memory cgroup",
        "  swap: /dev/zram0 (2 GiB) → no swap",
        "      sudo swapoff -a",
        "  memory cgroup: none → can be capped (from the next boot on)",
        "  reboot it, and look again: testbed provision --only d --reboot",
        "e: failed: disk, clock",
        "  disk: full",
        "  clock: no chrony",
        "2 devices: 1 to be rebooted, 1 failed",
    ]


def test_nothing_changed_is_said_so():
    assert told([OUTCOMES[READY]], verbose=False) == ["a: ready", "1 device ready; nothing was changed"]


def test_as_json_with_exact_commands():
    found = json.loads(json.dumps(outcome_data(OUTCOMES[DIFFERS])))
    assert found["changes"] == [
        {
            "step": "swap",
            "found": "/dev/zram0 (2 GiB)",
            "wanted": "no swap",
            "commands": ["sudo swapoff -a"],
            "needs_reboot": False,
        }
    ]


def test_the_live_table_shows_every_device_and_its_end():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=20, color_system=None)
    with LiveTable(console, ["a", "waits"]) as live:
        live.doing("a", "environment: sending torch")
        live.ended(OUTCOMES[READY])
    shown = console.file.getvalue()
    assert "waits" in shown
    assert "waiting" in shown
    assert "ready" in shown


def test_plain_lines_tell_each_step_once():
    lines = []
    with PlainLines(lines.append) as plain:
        for words in ("connecting", "environment: torch, 1 of 3", "environment: torch, 2 of 3", "proof"):
            plain.doing("a", words)
        plain.ended(OUTCOMES[READY])
    assert lines == ["a: connecting …", "a: environment …", "a: proof …", "a: ready, 0.00 s"]


def test_emulated_devices_of_this_machine_need_nothing(capsys):
    assert main(["provision"]) == 0
    assert capsys.readouterr().err == "nothing to make ready: these devices are emulated on this machine\n"


def test_facts_of_devices_that_were_never_visited(capsys):
    assert main(["inventory", "--facts"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "jetson-orin-nano: no facts (emulated on this machine)"
    assert main(["inventory", "--facts", "--json", "--only", "small"]) == 0
    assert set(json.loads(capsys.readouterr().out).values()) == {None}
