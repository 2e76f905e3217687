"""Facts in, exact commands out: every file of cases/ is a case."""

import shlex

import pytest

from testbed.inventory import Budget
from testbed.provision.board import Capacity
from testbed.provision.memory_cgroup import Delegation
from testbed.provision.meters import OverCurrent, Rails
from testbed.provision.step import Change, Note, Problem
from tests.provision.tables import HERE, device_of, facts_of, findings, laid_over, read

CASES = sorted(path.stem for path in (HERE / "cases").glob("*.yaml"))
AS_FOUND = [case for case in CASES if case.startswith("as_found_")]
FAMILIES = ("jetpack_4", "jetpack_5", "jetpack_6", "jetpack_7", "pi_bookworm", "pi_trixie", "ubuntu")


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    told = read(f"cases/{case}.yaml")
    device = device_of(told["board"], **told.get("device", {}))
    found = findings(told["board"], told.get("differs"), device)
    beside = set(told.get("beside", ()))
    looked_at = {name: finding for name, finding in found.items() if name in told["only"]} if "only" in told else found
    assert {name: finding for name, finding in looked_at.items() if name not in beside} == told["expect"]


def test_every_family_has_its_case():
    assert {f"as_found_{family}" for family in FAMILIES} <= set(AS_FOUND)


#: What the steps of a family want to find; with it they are content.
MADE = {
    "boot_hooks": ["systemd", "rc.local"],
    "boot_scripts": {"clocks": "jetson_clocks", "fan": "systemctl stop nvfancontrol 2>/dev/null\njetson_clocks --fan"},
    "board": {"desktop": False},
    "swap": {"devices": [], "bytes": 0, "sources": []},
    "clocks_locked": True,
    "clock": {"chrony": "running", "synchronised": True, "offset_seconds": 0.0},
    "fan": 255,
    "meters": {"vcgencmd": True, "jtop": True},
    "throttled": 0,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_board_that_is_ready_is_left_alone(family):
    facts = facts_of(family)
    cgroup = {"version": facts["memory_cgroup"]["version"] or "v2", "delegated": True, "linger": True, "bus": True}
    v1 = "".join(
        f"mkdir -p /sys/fs/cgroup/{name}/edge-testbed-ada && chown ada /sys/fs/cgroup/{name}/edge-testbed-ada\n"
        for name in ("memory", "cpu")
    )
    governor = "for file in /sys/devices/system/cpu/cpufreq/policy*/scaling_governor; do echo performance >$file; done"
    made = laid_over(MADE, {"memory_cgroup": {**cgroup, "manager_controllers": ["memory"]}, "governor": "performance"})
    made = laid_over(made, {"boot_scripts": {"cgroup-ada": v1.strip(), "governor": governor}})
    assert findings(family, made, device_of(family)) == {}


def test_a_guest_needs_memory_on_its_host():
    device = device_of("pi_bookworm")
    facts = facts_of("pi_bookworm")
    assert Capacity().check(facts, device) is None
    large = device.__class__(**{**vars(device), "budget": Budget(64 << 30)})
    problem = Capacity().check(facts, large)
    assert isinstance(problem, Problem)
    assert problem.fatal
    assert "the host has 3.7 GiB, the budget is 64 GiB" in problem.text


def test_rails_that_only_root_can_read_are_opened_at_every_boot():
    facts = facts_of("jetpack_6", {"meters": {"unreadable": ["/sys/class/hwmon/hwmon1/in1_input"]}})
    facts["meters"]["rails"] = {"VDD_SOC": "c"}
    finding = Rails().check(facts, device_of("jetpack_6"))
    assert isinstance(finding, Change)
    assert finding.found == "VDD_IN, VDD_CPU_GPU_CV cannot be read by ada"
    put, run = finding.commands
    assert b"chmod a+r" in put.data
    assert run.argv == ("sh", "/etc/edge-testbed/boot.d/rails.sh")


def test_a_user_of_a_domain_is_quoted():
    cgroup = {"version": "v1", "v1_cpu": False, "delegated": False, "own": []}
    facts = facts_of("pi_bookworm", {"login": {"user": "LAB\\ada b"}, "memory_cgroup": cgroup})
    finding = Delegation().check(facts, device_of("pi_bookworm"))
    assert isinstance(finding, Change)
    put = finding.commands[0]
    group = shlex.quote("/sys/fs/cgroup/memory/edge-testbed-LAB\\ada b")
    assert put.data.decode() == f"mkdir -p {group} && chown 'LAB\\ada b' {group}\n"
    assert "'/etc/edge-testbed/boot.d/cgroup-LAB\\ada b.sh'" in put.argv[-1]


def test_rails_that_are_not_there_are_told():
    facts = facts_of("jetpack_6")
    facts["meters"]["rails"] = {}
    finding = Rails().check(facts, device_of("jetpack_6"))
    assert isinstance(finding, Note)
    assert "VDD_IN" in finding.text


def test_over_current_is_told():
    finding = OverCurrent().check(
        facts_of("jetpack_6", {"over_current_events": {"a": 2, "b": 0}}), device_of("jetpack_6")
    )
    assert isinstance(finding, Note)
    assert finding.text.startswith("2 since its boot")
