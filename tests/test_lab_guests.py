"""What a run takes of its hosts, on a virtual lab: one login each, and a cap of its own for every guest."""

from __future__ import annotations

import pytest
import yaml

from testbed import code_wheel
from testbed.config import load_inventory
from testbed.job import FINISHED
from tests.drills import MIB, job, wait_until
from tests.lab_runs import (
    console,
    counted,
    furnish_for_drills,
    idle_devices,
    idle_engine,
    lasting,
    logins,
    ours,
    release,
    times_begun,
)

pytestmark = pytest.mark.lab
ONE, TWO = "board-1", "board-2"
ROUNDS = 3


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return code_wheel.build(tmp_path_factory.mktemp("wheels"))


def test_a_run_logs_in_once_at_each_device(plain_lab, tmp_path, wheel):
    devices = idle_devices(plain_lab)
    facts = furnish_for_drills(devices)
    payload = tmp_path / "payload"
    payload.write_bytes(bytes(5000))
    before, ended = [logins(host) for host in plain_lab.hosts], []
    with idle_engine(tmp_path, devices, facts, wheel=wheel) as running:
        for number in range(ROUNDS):
            jobs = [
                (name, job(f"job-{number}-{name}", client=client, steps=counted(name), update={"x": [5000]}), payload)
                for client, name in enumerate(device.name for device in devices)
            ]
            ended += running.run(jobs)
    assert [(result.outcome, update.exists()) for result, update in ended] == [(FINISHED, True)] * 3 * ROUNDS
    assert [times_begun(host, host.name) for host in plain_lab.hosts] == [ROUNDS] * 3
    assert [logins(host) - then for host, then in zip(plain_lab.hosts, before, strict=True)] == [1, 1, 1]


#: Device → its host, and its budget in MiB.
GUESTS = {"small": (ONE, 48), "large": (ONE, 96), "small-too": (TWO, 56), "large-too": (TWO, 80)}


@pytest.fixture
def guests(plain_lab):
    """Emulated devices on two hosts, two on each, as an inventory says it."""
    content = yaml.safe_load(plain_lab.inventory.read_text())
    content["devices"] = {
        name: {"kind": "emulated", "profile": "virtual_board", "host": host, "budget": {"memory": f"{mib} MiB"}}
        for name, (host, mib) in GUESTS.items()
    }
    inventory = plain_lab.folder / "guests.yaml"
    inventory.write_text(yaml.safe_dump(content))
    return load_inventory(inventory)


def caps_on(host):
    """Bytes of the run's memory cgroups there."""
    files = "-name memory.limit_in_bytes -o -name memory.max"
    told = console(host, f"find /sys/fs/cgroup -path '*/testbed-run-*' '(' {files} ')' -exec cat '{{}}' +")
    return sorted(map(int, told.split()))


def test_emulated_devices_of_several_hosts_work_side_by_side_each_under_its_own_cap(plain_lab, tmp_path, guests, wheel):
    hosts = [plain_lab.host(name) for name in (ONE, TWO)]
    facts = furnish_for_drills(guests)
    at_work, caps = set(), {}

    def listener(name, client, phase, progress):
        if progress is not None:
            at_work.add(name)
        if at_work == set(GUESTS) and not caps:
            caps.update({host.name: caps_on(host) for host in hosts})
            for device, (host, _) in GUESTS.items():
                release(plain_lab.host(host), f"job-{device}")

    options = {"on_event": listener, "parallel": 2}
    with idle_engine(tmp_path, guests, facts, options=options, wheel=wheel) as running:
        jobs = [
            (name, job(f"job-{name}", client=client, steps=lasting(f"job-{name}"), update={"x": [5000]}), None)
            for client, name in enumerate(GUESTS)
        ]
        ended = {result.device: result for result, _ in running.run(jobs)}
    assert running.problems == ()
    assert {name: result.outcome for name, result in ended.items()} == dict.fromkeys(GUESTS, FINISHED)
    assert {name: result.measurement.limit_bytes for name, result in ended.items()} == {
        name: mib * MIB for name, (_, mib) in GUESTS.items()
    }
    assert caps == {ONE: [48 * MIB, 96 * MIB], TWO: [56 * MIB, 80 * MIB]}
    for name, (host, _) in GUESTS.items():
        assert times_begun(plain_lab.host(host), f"job-{name}") == 1
    for host in hosts:
        wait_until(lambda host=host: ours(host) == [])
        assert caps_on(host) == []
