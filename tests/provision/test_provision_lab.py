"""The whole of provisioning, board by board, on hosts of a virtual lab that wear boards' faces."""

import json
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from testbed.cli import main
from testbed.config import load_inventory
from testbed.devices import NodeSettings, make_node
from testbed.errors import LockedError
from testbed.fact_sheets import facts_of, store
from testbed.inventory import Inventory
from testbed.provision.environment_build import _ask
from testbed.provision.facts import FACTS_SCRIPT_PARTS
from testbed.provision.hold import Hold
from testbed.provision.runner import Provisioning, board_steps
from testbed.provision.step import Change
from testbed.provision.visit import CHANGED, DIFFERS, FAILED, INTERRUPTED, READY, REBOOT, Options
from testbed.ssh import connect
from tests.drills import wait_until
from tests.virtual_lab import as_new, ssh, virtual_lab, wait_rebooted

pytestmark = pytest.mark.lab

JETSON, PI = "jetson-orin-nano", "raspberry-pi-5"


@pytest.fixture(autouse=True)
def data_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TESTBED_DATA", str(tmp_path / "data"))


def provision(devices, **options):
    """Make the boards ready, all but Python and packages; outcomes by name."""
    chosen = Options(**options)
    provisioning = Provisioning(
        devices, chosen, steps=lambda device: board_steps(device, chosen), parts=FACTS_SCRIPT_PARTS
    )
    return {outcome.device: outcome for outcome in provisioning.run()}


def statuses(outcomes):
    return {name: outcome.status for name, outcome in outcomes.items()}


def problems(outcome):
    return {problem.step: problem.text for problem in outcome.problems}


@pytest.fixture
def lab(tmp_path):
    """A Jetson Orin Nano and a Raspberry Pi 5, as they come from the box."""
    personas = ("jetson_orin_nano_8gb", "raspberry_pi_5_8gb")
    with virtual_lab(tmp_path / "lab", devices=2, personas=personas) as lab:
        yield lab


def test_boards_are_made_ready_rebooted_where_needed_and_then_left_alone(lab):
    boards = load_inventory(lab.inventory)
    would = provision(boards, check=True)
    assert statuses(would) == {JETSON: DIFFERS, PI: DIFFERS}
    assert statuses(provision(boards, check=True)) == {JETSON: DIFFERS, PI: DIFFERS}  # it has changed nothing

    first = provision(boards)
    assert statuses(first) == {JETSON: CHANGED, PI: REBOOT}
    assert first[PI].waiting == ("memory cgroup",)
    assert {change.step for change in first[JETSON].changes} == {change.step for change in would[JETSON].changes}

    boots = lab.host(PI).state().boots
    second = provision(boards, reboot=True)
    assert statuses(second) == {JETSON: READY, PI: CHANGED}
    assert lab.host(PI).state().boots == boots + 1

    third = provision(boards)
    assert statuses(third) == {JETSON: READY, PI: READY}
    assert all(outcome.changes == () for outcome in third.values())
    check_jetson(lab, third[JETSON].facts)
    check_pi(lab, third[PI].facts)


def check_jetson(lab, facts):
    assert facts["board"]["l4t"] == "36.4.3"
    assert (facts["swap"]["devices"], facts["clocks_locked"], facts["fan"]) == ([], True, 255)
    assert facts["clock"]["synchronised"]
    assert set(facts["meters"]["rails"]) >= {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    assert "enabled" not in ssh(lab, JETSON, "systemctl is-enabled nvzramconfig", code=None)


def check_pi(lab, facts):
    assert facts["boot"]["command_line"].endswith("rootwait cgroup_enable=memory")
    assert len(ssh(lab, PI, "cat /boot/firmware/cmdline.txt").splitlines()) == 1
    assert facts["memory_cgroup"]["delegated"]
    assert facts["governor"] == "performance"


def test_what_a_boot_forgets_is_there_after_the_next(lab):
    boards = load_inventory(lab.inventory)
    provision(boards, reboot=True)
    for name in (JETSON, PI):
        boots = lab.host(name).state().boots
        ssh(lab, name, "sudo reboot", code=None)
        wait_rebooted(lab.host(name), boots)
    for outcome in provision(boards).values():
        assert {change.step for change in outcome.changes} <= {"clock"}  # which chrony may not have set again yet


def test_the_login_user_may_cap_memory_and_nobody_else_needs_to(lab):
    boards = load_inventory(lab.inventory)
    facts = provision(boards, reboot=True)[PI].facts
    group = f"{facts['memory_cgroup']['parent']}/testbed-try"
    script = (
        f"mkdir {group} && echo {64 << 20} >{group}/memory.limit_in_bytes && "
        f"(echo 0 >{group}/cgroup.procs; head -c 200000000 /dev/zero | tail | wc -c); cat {group}/memory.oom_control; "
        f"rmdir {group}"
    )
    told = ssh(lab, PI, script, code=None)
    assert int(re.search(r"oom_kill (\d+)", told)[1]) >= 1
    assert "admin" in ssh(lab, PI, f"stat -c %U {facts['memory_cgroup']['parent']}")


def test_a_power_mode_is_set_by_name_and_by_a_reboot_where_it_needs_one(lab):
    jetson = next(iter(load_inventory(lab.inventory).select([JETSON])))
    provision([jetson])
    quick = provision([replace(jetson, power_mode="MAXN_SUPER")])[JETSON]
    assert (quick.status, quick.facts["power_mode"], quick.facts["clocks_locked"]) == (CHANGED, "MAXN_SUPER", True)
    slow = replace(jetson, power_mode="7W")
    assert provision([slow])[JETSON].status == REBOOT
    assert provision([slow])[JETSON].status == REBOOT  # it is chosen, and not in effect
    assert provision([slow], reboot=True)[JETSON].status == CHANGED
    after = provision([slow])[JETSON]
    assert (after.status, after.facts["power_mode"]) == (READY, "7W")
    wrong = provision([replace(jetson, power_mode="MAXN")])[JETSON]
    assert 'did you mean "MAXN_SUPER"?' in problems(wrong)["power mode"]


def test_swap_may_be_kept_and_is_recorded(lab):
    jetson = load_inventory(lab.inventory).select([JETSON])
    outcome = provision(jetson, keep_swap=True)[JETSON]
    assert "swap" not in {change.step for change in outcome.changes}
    assert outcome.facts["swap"]["bytes"] > 0


@pytest.mark.slow
def test_one_dead_board_does_not_stop_the_others(lab):
    boards = load_inventory(lab.inventory)
    lab.host(PI).stop()
    try:
        outcomes = provision(boards)
    finally:
        as_new(lab.host(PI))
    assert statuses(outcomes) == {JETSON: CHANGED, PI: FAILED}
    assert list(problems(outcomes[PI])) == ["connection"]


@pytest.mark.slow
def test_a_board_that_is_cut_off_is_made_ready_by_the_next_visit(lab):
    pi = load_inventory(lab.inventory).select([PI])

    class CutOff:
        def doing(self, device, words):
            if "governor" in words:
                lab.host(PI).cut()

        def ended(self, outcome): ...

    options = Options()
    steps = {"steps": lambda device: board_steps(device, options), "parts": FACTS_SCRIPT_PARTS}
    try:
        cut = Provisioning(pi, options, watcher=CutOff(), **steps).run()[0]
    finally:
        lab.host(PI).mend()
    assert cut.status == FAILED
    assert provision(pi, reboot=True)[PI].status == CHANGED
    assert provision(pi)[PI].status == READY


#: In the place of pip: the first hangs, the second has nothing to do.
PIP = """
import os, pathlib, signal
if not pathlib.Path("pip.pid").exists():
    pathlib.Path("new").write_text(str(os.getpid()))
    pathlib.Path("new").rename("pip.pid")
    signal.pause()
"""


class Environment:
    """Of the steps, the one that builds for long."""

    name = "environment"

    def __init__(self):
        self.built = False

    def check(self, facts, device):
        return None if self.built else Change(self.name, "none", "there", action=self._build)

    def _build(self, connection, say):
        folder = "~/.local/share/edge-testbed"
        install = {"stage": "torch", "pip": "pip", "requirements": [], "wheels": {}, "index": None}
        _ask(connection, sys.executable, "begin", {"folder": folder, "wanted": {"torch": "2"}})
        _ask(connection, sys.executable, "install", {"folder": folder, **install}, 300.0)
        self.built = True


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "ctrl-c"])
def test_a_build_that_is_interrupted_is_ended_and_goes_on(lab, how):
    """The link is gone, or the user has had enough: pip on the board knows nothing of it."""
    pi = load_inventory(lab.inventory).select([PI])
    pip = ".local/share/edge-testbed/content/pip/pip"
    ssh(lab, PI, f"mkdir -p {pip} && echo {shlex.quote(PIP)} >{pip}/__main__.py")
    visits = Provisioning(pi, Options(), steps=lambda _: (Environment(),), parts=FACTS_SCRIPT_PARTS)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(visits.run)
        pid = int(wait_until(lambda: ssh(lab, PI, "cat pip.pid", code=None)))
        lab.host(PI).cut() if how == "cut" else visits.stop()
        try:
            [interrupted] = first.result()
        finally:
            lab.host(PI).mend()
    assert interrupted.status == (FAILED if how == "cut" else INTERRUPTED)
    wait_until(lambda: left_there(lab, pid) == (["lock", "pip"] if how == "cut" else []))
    [outcome] = Provisioning(pi, Options(), steps=lambda _: (Environment(),), parts=FACTS_SCRIPT_PARTS).run()
    assert (outcome.status, outcome.problems) == (CHANGED, ())
    wait_until(lambda: left_there(lab, pid) == [])


def left_there(lab, pid):
    script = f"cd .local/share/edge-testbed; [ -e lock.json ] && echo lock; [ -d /proc/{pid} ] && echo pip"
    return ssh(lab, PI, script, code=None).split()


def as_user(inventory, user, **access):
    devices = tuple(replace(device, access=replace(device.access, user=user, **access)) for device in inventory.devices)
    return Inventory(devices)


def test_sudo_refused_names_the_command_for_an_administrator(lab):
    pi = as_user(load_inventory(lab.inventory).select([PI]), "tester")
    before = ssh(lab, PI, "cat /boot/firmware/cmdline.txt")
    outcome = provision(pi)[PI]
    assert outcome.status == FAILED
    told = problems(outcome)["memory cgroup"]
    assert "needs root" in told
    assert "sudo sync" in told
    assert ssh(lab, PI, "cat /boot/firmware/cmdline.txt") == before
    assert outcome.changes == ()


def test_a_closed_umask_of_the_user_is_in_nobodys_way(lab):
    """Root's files stay readable for the user, who looks for them at the next visit; the user's own stay private."""
    ssh(lab, PI, "echo umask 077 >.bashrc.new; cat .bashrc >>.bashrc.new; mv .bashrc.new .bashrc")
    pi = load_inventory(lab.inventory).select([PI])
    assert provision(pi, reboot=True)[PI].status == CHANGED
    assert ssh(lab, PI, "umask") == "0077\n"
    assert ssh(lab, PI, "stat -c %a /etc/edge-testbed .local/share/edge-testbed") == "755\n700\n"
    assert statuses(provision(pi)) == {PI: READY}


def test_become_false_never_asks_for_sudo(lab):
    pi = as_user(load_inventory(lab.inventory).select([PI]), "admin", become=False)
    outcome = provision(pi)[PI]
    assert "`become: false`" in problems(outcome)["memory cgroup"]
    assert outcome.changes == ()
    assert "sudo" not in ssh(lab, PI, "cat /var/log/auth.log", code=None)


def test_a_wrong_board_behind_an_address_is_left_alone(lab):
    jetson, pi = load_inventory(lab.inventory)
    swapped = replace(pi, access=replace(pi.access, host=jetson.access.host))
    good = {"device": PI, "host": swapped.access.host, "status": READY}
    store(PI, good)
    outcome = provision([swapped])[PI]
    assert (outcome.status, list(problems(outcome))) == (FAILED, ["identity"])
    assert "NVIDIA Jetson" in problems(outcome)["identity"]
    assert ssh(lab, JETSON, "ls /etc/edge-testbed .local/share/edge-testbed", code=None) == ""
    assert facts_of(swapped) == good


def test_a_device_that_a_run_holds_is_left_alone(lab, tmp_path):
    pi = load_inventory(lab.inventory).select([PI])
    run = make_node(pi.devices[0], NodeSettings("lora-7", tmp_path))
    run.hold()
    outcome = provision(pi, reboot=True)[PI]
    assert list(problems(outcome)) == ["lock"]
    assert f"device {PI} is held by run lora-7 of " in problems(outcome)["lock"]
    assert ssh(lab, PI, "ls /etc/edge-testbed", code=None) == ""
    run.leave(0.0)
    assert provision(pi, reboot=True)[PI].status == CHANGED


def test_no_run_gets_a_device_that_is_being_made_ready(lab, tmp_path):
    """Not even when it has just been rebooted."""
    pi = load_inventory(lab.inventory).select([PI])
    run = make_node(pi.devices[0], NodeSettings("lora-7", tmp_path))
    told = {}

    class Tries:
        def doing(self, device, words):
            if "governor" in words or (words == "facts" and "reboot" in told):
                with pytest.raises(LockedError) as refused:
                    run.hold()
                told[words] = str(refused.value)
            elif words == "reboot":
                told[words] = ""

        def ended(self, outcome): ...

    options = Options(reboot=True)
    steps = {"steps": lambda device: board_steps(device, options), "parts": FACTS_SCRIPT_PARTS}
    outcome = Provisioning(pi, options, watcher=Tries(), **steps).run()[0]
    assert (outcome.status, outcome.problems) == (CHANGED, ())
    assert len(told) == 3
    assert all("is being made ready by" in text for words, text in told.items() if words != "reboot")
    run.hold()
    run.leave(0.0)


def test_a_device_that_a_visit_left_held_is_let_go_of_by_hand(lab, capsys):
    pi = load_inventory(lab.inventory).select([PI])
    arguments = ["--inventory", str(lab.inventory)]
    connection = connect(PI, pi.devices[0].access)
    Hold(pi.devices[0]).take(connection, None)
    connection.close()
    main(["status", *arguments])
    assert "held by provision of " in capsys.readouterr().out
    assert list(problems(provision(pi)[PI])) == ["lock"]
    assert main(["unlock", PI, *arguments]) == 0
    assert f"device {PI} is free" in capsys.readouterr().out
    assert provision(pi)[PI].status == REBOOT


def test_the_command_tells_and_keeps_what_it_found(lab, capsys):
    arguments = ["--inventory", str(lab.inventory), "--only", PI]
    assert main(["provision", *arguments, "--no-environment", "--check", "-v"]) == 0
    told = capsys.readouterr().out
    assert "governor: ondemand → performance" in told
    assert "      sudo sh /etc/edge-testbed/boot.d/governor.sh" in told
    assert facts_of(load_inventory(lab.inventory).select([PI]).devices[0]) is None

    assert main(["provision", *arguments, "--no-environment"]) == 1
    assert f"{PI}: needs a reboot for memory cgroup" in capsys.readouterr().out
    assert main(["provision", *arguments, "--no-environment", "--reboot", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(each["device"], each["status"]) for each in told] == [(PI, "changed")]
    baseline = {"bytes": 7, "first_step_bytes": 1, "library_bytes": 2}
    proof = json.dumps({"key": 1, "found": {"torch": "2"}, "baseline": baseline})
    ssh(lab, PI, f"echo {shlex.quote(proof)} >.local/share/edge-testbed/proof-{PI}.json")
    assert main(["provision", *arguments, "--no-environment"]) == 0
    assert "1 device ready; nothing was changed" in capsys.readouterr().out

    there = json.loads(ssh(lab, PI, f"cat .local/share/edge-testbed/facts-{PI}.json"))
    here = facts_of(load_inventory(lab.inventory).select([PI]).devices[0])
    assert (there["device"], there["digest"]) == (here["device"], here["digest"])
    assert here["baseline"] == baseline  # the environment is left alone, and known
    assert main(["inventory", *arguments, "--facts"]) == 0
    told = capsys.readouterr().out
    assert "Raspberry Pi 5 Model B" in told
    assert "v1, delegated to the user" in told or "v2, delegated to the user" in told
