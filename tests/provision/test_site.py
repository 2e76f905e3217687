"""Contents by way of another device: which one, one at a time, and ended when the visit is."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from testbed.cli import main
from testbed.connection import LocalConnection
from testbed.devices._agent_node import PROVISION
from testbed.errors import DeviceError, LockedError
from testbed.inventory import Access, Budget, Device
from testbed.provision import site
from testbed.provision.site import Way, send, way_to
from testbed.provision.visit import InterruptedVisitError
from tests.provision.tables import BOX, facts_of

GATE = Device("gate", "generic", BOX, Budget(1 << 30), access=Access("gate.lab"))
FAR = replace(GATE, name="far", access=Access("far.lab", via="gate"))


class Thin(LocalConnection):
    """A link on which nothing arrives until somebody hangs up."""

    def __init__(self, name="thin"):
        super().__init__(name)
        self.began, self.closed = threading.Event(), threading.Event()

    def put(self, source, target):
        self.began.set()
        self.closed.wait()
        raise DeviceError(f"{self.name}: the connection was lost")

    def close(self):
        self.closed.set()


@pytest.fixture
def contents(tmp_path):
    path = tmp_path / "wheel"
    path.write_bytes(b"wheel")
    return {"a" * 64: path}


def until(event):
    """Says everything until then; the visit is to end from then on."""

    def say(words):
        if event.is_set():
            raise InterruptedVisitError("far")

    return say


def test_the_way_is_what_the_inventory_says():
    assert way_to(FAR, "python3", [GATE, FAR]) == Way(FAR, "python3", GATE)
    assert way_to(GATE, "python3", [GATE, FAR]) == Way(GATE, "python3", None)
    assert way_to(replace(GATE, access=None), "python3", []).through is None


def test_a_transfer_to_another_device_ends_when_the_visit_is_to_end(tmp_path, contents):
    connection = Thin()
    with pytest.raises(InterruptedVisitError):
        send(connection, str(tmp_path / "there"), contents, until(connection.began))
    assert connection.closed.is_set()


def test_who_waits_for_a_turn_ends_when_the_visit_is_to_end():
    ended = threading.Event()
    ended.set()
    with site._turn(GATE, print), pytest.raises(InterruptedVisitError), site._turn(GATE, until(ended)):
        pass
    with site._turn(GATE, print), site._turn(FAR, print):  # of another machine
        pass


def test_one_at_a_time_sends_to_a_machine(tmp_path, contents, monkeypatch):
    """Devices behind it and itself, all at once: what all want arrives once."""
    monkeypatch.setattr(site, "_folder", lambda device: str(tmp_path / device.access.host))
    sent = []

    class Busy(LocalConnection):
        """Refuses a file that is on its way, as SSH does."""

        def put(self, source, target):
            partial = target.with_name("partial")
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.open("x").close()
            sent.append(target)
            partial.unlink()
            return super().put(source, target)

    with ThreadPoolExecutor(8) as pool:
        ways = [Way(replace(GATE, name=f"guest-{number}"), "python3") for number in range(8)]
        list(pool.map(lambda way: way.bring(Busy(), contents, print), ways))
    assert sent == [tmp_path / "gate.lab" / ("a" * 64)]


@pytest.mark.parametrize(
    ("versions", "chosen"), [(["3.13.5"], "/usr/bin/python3.13.5"), (["3.8.10", "3.10.2"], "/usr/bin/python3.10.2")]
)
def test_some_python_is_enough_for_the_device_in_between(versions, chosen):
    assert site._interpreter(GATE, found(versions)) == chosen


@pytest.mark.parametrize(
    ("facts", "error", "told"),
    [
        ({"versions": ["3.8.10"]}, DeviceError, "gate has no Python of at least 3.10"),
        ({"versions": []}, DeviceError, "has no Python"),
        ({"lock": {"run": "lora-7"}}, LockedError, "held by run lora-7"),
        ({"board": {"machine": "x86_64"}}, DeviceError, "nothing was changed there"),
    ],
)
def test_a_device_that_is_not_to_be_touched_is_left_alone(facts, error, told):
    with pytest.raises(error, match=told):
        site._interpreter(GATE, found(**facts))


def test_a_device_in_between_may_be_made_ready_itself():
    assert site._interpreter(GATE, found(lock={"run": PROVISION})) == "/usr/bin/python3.12.1"


def found(versions=("3.12.1",), **differs):
    candidates = [{"path": f"/usr/bin/python{version}", "version": version} for version in versions]
    return {**facts_of("generic_v2", differs), "python": {"given": None, "candidates": candidates}}


def test_the_command_knows_the_devices_that_were_not_chosen(tmp_path, monkeypatch):
    """Any of them may be named by `via`."""
    (tmp_path / "lab.yaml").write_text(
        'defaults: {kind: generic, profile: raspberry_pi_5_4gb, budget: {memory: "1 GiB"}}\n'
        "devices: {far: {via: gate}, gate: {}}\n"
    )
    given = {}

    class Recording:
        def __init__(self, devices, options, *, environment, **_):
            given.update(chosen=[device.name for device in devices], others=[each.name for each in environment.others])

        def run(self):
            return []

    monkeypatch.setattr("testbed.provision.runner.Provisioning", Recording)
    assert main(["provision", "--inventory", str(tmp_path / "lab.yaml"), "--only", "far"]) == 0
    assert given == {"chosen": ["far"], "others": ["far", "gate"]}
