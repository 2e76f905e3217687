"""`testbed meter`, `testbed power` and `testbed calibrate`: on this machine, and on another one over real SSH."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
import yaml

from testbed import calibrations, switching
from testbed.calibrations import calibration_of
from testbed.cli import main
from testbed.config import load_inventory
from testbed.errors import MeterError
from testbed.node import landing
from tests.drills import processes_below, wait_until
from tests.meters.plugs import ShellySecond, Tasmota
from tests.ssh_server import SshServer
from tests.virtual_lab import virtual_lab

PROFILE = {"profile": "jetson_orin_nano_8gb", "budget": {"memory": "1 GiB"}}


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    """The user's own folders."""
    monkeypatch.setenv("TESTBED_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def inventory(desk):
    """Writes an inventory of one device, `board`; gives its path."""

    def write(meter, **more):
        content = {"devices": {"board": {"kind": "emulated", **PROFILE, "meter": meter, **more}}}
        (desk / "lab.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return desk / "lab.yaml"

    return write


@pytest.fixture
def plug():
    with ShellySecond() as plug:
        yield plug


def trace(path, watts, total="VDD_IN"):
    """A recording of two rails, the second half the first; `watts(second)` from 0 to 60, every tenth."""
    rows = (f"{step / 10},{watts(step / 10)},{watts(step / 10) / 2}\n" for step in range(601))
    head = f"# point: module_rail\n# gain: 0.02\n# total_rails: {total}\nseconds,VDD_IN,VDD_SOC\n"
    path.write_text(head + "".join(rows))
    return {"file": str(path), "repeat": True}


def said(capsys, *words, code=0):
    assert main([str(word) for word in words]) == code
    return capsys.readouterr()


# ── meter ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_meter_and_rail_is_told_as_json(inventory, desk, plug, capsys):
    path = inventory({"replay": trace(desk / "t.csv", lambda _: 5.0), "shelly": {"host": plug.host}})
    told = json.loads(said(capsys, "meter", "board", "--inventory", path, "--seconds", "1.5", "--json").out)
    replay, shelly = told["meters"]
    assert [(rail["rail"], rail["mean_watts"]) for rail in replay["rails"]] == [("VDD_IN", 5.0), ("VDD_SOC", 2.5)]
    assert (replay["point"], replay["replayed"], replay["total_rails"]) == ("module_rail", True, ["VDD_IN"])
    assert replay["samples"] > shelly["samples"] >= 1
    assert [rail["mean_watts"] for rail in shelly["rails"]] == [4.2]
    assert (shelly["point"], shelly["failures"], shelly["error"]) == ("wall_ac", 0, None)


def test_a_sum_of_rails_is_told_beside_them_and_the_point_is_the_inventorys(inventory, desk, capsys):
    settings = {**trace(desk / "t.csv", lambda _: 5.0, total="VDD_IN VDD_SOC"), "point": "dc_input"}
    path = inventory({"replay": settings}, profile="raspberry_pi_4b_4gb")
    [meter] = json.loads(said(capsys, "meter", "board", "--inventory", path, "--seconds", "0.5", "--json").out)[
        "meters"
    ]
    assert {rail["rail"]: rail["mean_watts"] for rail in meter["rails"]} == {"VDD_IN": 5, "VDD_SOC": 2.5, "total": 7.5}
    assert meter["point"] == "dc_input"


def test_lines_come_as_time_goes_by_and_a_table_at_the_end(inventory, desk, plug, capsys):
    path = inventory({"replay": trace(desk / "t.csv", lambda _: 5.0), "shelly": {"host": plug.host}})
    out = said(capsys, "meter", "board", "--inventory", path, "--seconds", "1.2").out
    first, *rest = out.splitlines()
    assert first.endswith("s  replay: VDD_IN 5.000 W, VDD_SOC 2.500 W; shelly: switch:0 4.200 W")
    assert rest[0].split() == [
        "meter",
        "rail",
        "measured",
        "at",
        "mean",
        "W",
        "least",
        "W",
        "most",
        "W",
        "samples",
        "longest",
        "gap",
    ]
    assert "module_rail (replayed)" in out


def test_a_meter_that_cannot_be_read_costs_only_itself(inventory, desk, plug, capsys):
    path = inventory({"replay": trace(desk / "t.csv", lambda _: 5.0), "shelly": {"host": plug.host, "channel": 3}})
    told = said(capsys, "meter", "board", "--inventory", path, "--seconds", "0.3", code=1)
    assert "VDD_IN" in told.out
    assert "answers 404" in told.err


def test_none_that_can_be_read(inventory, desk, plug, capsys):
    (desk / "x.csv").write_text("time,W\n1,2\n2,3\n")
    path = inventory({"shelly": {"host": plug.host, "channel": 3}, "csv": {"file": "x.csv", "watts": "W"}})
    err = said(capsys, "meter", "board", "--inventory", path, code=1).err
    assert "answers 404" in err
    assert "meter csv: it is read after a run, not live" in err


def test_readings_that_fail_are_counted_and_the_last_reason_told(inventory, plug, capsys, monkeypatch):
    monkeypatch.setattr(ShellySecond, "answer", _answers_once(ShellySecond.answer))
    path = inventory({"shelly": {"host": plug.host}})
    told = said(capsys, "meter", "board", "--inventory", path, "--seconds", "1.6", "--json", code=1)
    [meter] = json.loads(told.out)["meters"]
    assert meter["samples"] == 0
    assert meter["failures"] >= 1
    assert "answers 503" in meter["error"]


def _answers_once(answer):
    """Until the meter is open: /shelly, and twice the status."""
    count = 0

    def answered(plug, path, query):
        nonlocal count
        count += 1
        return answer(plug, path, query) if count <= 3 else (503, b"busy")

    return answered


def test_a_device_without_a_meter(inventory, capsys):
    err = said(capsys, "meter", "board", "--inventory", inventory("none"), code=2).err
    assert "device board has no meter: name one in the inventory" in err


@contextlib.contextmanager
def started(*words, stdout=subprocess.PIPE):
    command = [sys.executable, "-m", "testbed", *map(str, words)]
    with subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_ends_the_looking_with_the_figures(inventory, desk):
    path = inventory({"replay": trace(desk / "t.csv", lambda _: 5.0)})
    with started("meter", "board", "--inventory", path) as process:
        assert "VDD_IN 5.000 W" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (0, "")
    assert "longest gap" in out


def test_on_a_terminal_it_is_a_table_that_is_redrawn(inventory, desk):
    path = inventory({"replay": trace(desk / "t.csv", lambda _: 5.0)})
    near, far = pty.openpty()
    with (
        os.fdopen(near, "rb", buffering=0) as screen,
        started("meter", "board", "--inventory", path, "--seconds", "2.3", stdout=far) as process,
    ):
        os.close(far)
        seen = b""
        with contextlib.suppress(OSError):  # the terminal ends with the process
            while piece := screen.read(1 << 16):
                seen += piece
        assert process.wait(30) == 0
    assert seen.count(b"\x1b[1A") >= 4  # the cursor went up over the table, again and again
    assert b"longest gap" in seen


# ── power ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_first_meter_that_can_switches(inventory, desk, plug, capsys):
    path = inventory({"replay": trace(desk / "t.csv", lambda _: 5.0), "shelly": {"host": plug.host}})
    assert said(capsys, "power", "off", "board", "--inventory", path).out == "device board is off (shelly)\n"
    assert plug.on is False
    assert said(capsys, "power", "on", "board", "--inventory", path).out == "device board is on (shelly)\n"
    assert plug.on is True


def test_a_cycle_is_off_and_on(inventory, capsys):
    with Tasmota() as plug:
        path = inventory({"tasmota": {"host": plug.host}})
        out = said(capsys, "power", "cycle", "board", "--inventory", path, "--seconds", "0").out
        assert out == "device board was off for 0 s, and is on\n"
        assert plug.asked == ["/cm?cmnd=Power+OFF", "/cm?cmnd=Power+ON"]


def test_no_meter_can_switch(inventory, desk, capsys):
    path = inventory({"replay": trace(desk / "t.csv", lambda _: 5.0)})
    err = said(capsys, "power", "off", "board", "--inventory", path, code=2).err
    assert "device board: its meters (replay) cannot switch; plug it into one that can" in err
    assert "shelly" in err
    assert "it has no meter" in said(capsys, "power", "on", "board", "--inventory", inventory("none"), code=2).err


def test_a_plug_that_goes_away_while_it_is_off_is_told(inventory, plug, monkeypatch):
    device = load_inventory(inventory({"shelly": {"host": plug.host}})).devices[0]
    monkeypatch.setattr(switching.time, "sleep", lambda _: setattr(plug, "mood", "broken"))
    with pytest.raises(MeterError, match="the device is off: switch it on with: testbed power on board"):
        switching.power_cycle(device)


# ── calibrate ────────────────────────────────────────────────────────────────────────────────────────────────────────
def triangle(at):
    """Up and down between 4 and 8 W in ten seconds: the same for all who begin together."""
    return 4 + 4 * abs(at % 10 - 5) / 5


def test_one_meter_is_set_against_another_and_that_is_kept(inventory, desk, monkeypatch, capsys):
    monkeypatch.setattr(calibrations, "LEAST_PAIRS", 4)
    settings = trace(desk / "t.csv", triangle)
    other = trace(desk / "other.csv", lambda at: 1.2 * triangle(at) + 0.5)["file"]
    path = inventory({"replay": settings})
    against = f"replay:file={other},repeat=true,point=wall_ac"
    told = said(capsys, "calibrate", "board", "--inventory", path, "--against", against, "--seconds", "7")
    device = load_inventory(path).devices[0]
    found = calibration_of(device, "replay")
    assert found.gain == pytest.approx(1.2, abs=0.1)
    assert found.offset_watts == pytest.approx(0.5, abs=0.5)
    assert (found.reference, found.point) == ("replay", "wall_ac")
    assert found.reference_gain == pytest.approx(0.02)
    assert f"replay = {found.gain:.4f} × replay {found.offset_watts:+.3f} W" in told.out
    assert "stands for wall_ac" in said(capsys, "calibrate", "board", "--inventory", path, "--show").out
    assert "forgotten" in said(capsys, "calibrate", "board", "--inventory", path, "--forget").out
    assert "no calibration of this board" in said(capsys, "calibrate", "board", "--inventory", path, "--show").out


def test_against_the_file_that_an_instrument_writes(inventory, desk, monkeypatch, capsys):
    monkeypatch.setattr(calibrations, "LEAST_PAIRS", 2)
    now = time.time()
    (desk / "bench.csv").write_text("time,W\n" + "".join(f"{now + step / 10},6.5\n" for step in range(-50, 600)))
    meters = {"replay": trace(desk / "t.csv", lambda _: 5.0), "csv": {"file": "bench.csv", "watts": "W", "gain": 0.001}}
    path = inventory(meters)
    told = said(capsys, "calibrate", "board", "--inventory", path, "--against", "csv", "--seconds", "4.5")
    found = calibration_of(load_inventory(path).devices[0], "replay")
    assert (found.gain, found.offset_watts, found.point) == (1.0, pytest.approx(1.5), "dc_input")
    assert "only an offset was fitted" in told.err


WRONG_USE = {
    "against nothing": ((), "against which meter? --against METER"),
    "no such meter": (("--against", "shely:host=x"), 'there is no meter "shely"; did you mean "shelly"'),
    "no such setting": (("--against", "shelly:hots=x"), 'no setting "hots"; did you mean "host"'),
    "no setting": (("--against", "shelly:plug-1"), 'expected NAME or NAME:KEY=VALUE,KEY=VALUE, got "plug-1"'),
    "no such point": (("--against", "shelly:host=x,point=desk"), "point: expected one of wall_ac"),
    "itself": (("--against", "replay"), "has no meter beside replay: there is nothing to set against it"),
    "another one's": (
        ("--against", "shelly:host=x", "--meter", "jtop"),
        "has no meter jtop beside the reference; it has replay",
    ),
}


@pytest.mark.parametrize("case", WRONG_USE)
def test_what_cannot_be_compared(case, inventory, desk, capsys):
    words, message = WRONG_USE[case]
    path = inventory({"replay": trace(desk / "t.csv", triangle)})
    assert message in said(capsys, "calibrate", "board", "--inventory", path, *words, code=2).err


def test_too_short_a_time_is_no_calibration(inventory, desk, plug, capsys):
    path = inventory({"replay": trace(desk / "t.csv", triangle), "shelly": {"host": plug.host}})
    words = ("calibrate", "board", "--inventory", path, "--against", "shelly", "--seconds", "1")
    assert "a calibration needs 30" in said(capsys, *words, code=1).err


def test_rails_that_are_not_the_whole_cannot_be_compared(inventory, desk, plug, capsys):
    meters = {"replay": trace(desk / "t.csv", triangle, total=""), "shelly": {"host": plug.host}}
    path = inventory(meters, profile="raspberry_pi_4b_4gb")
    words = ("calibrate", "board", "--inventory", path, "--against", "shelly", "--seconds", "1")
    assert "is the whole of the board (VDD_IN, VDD_SOC)" in said(capsys, *words, code=1).err


# ── another machine ──────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def server(desk):
    with SshServer(desk / "board", sftp=True) as server:
        yield server


@pytest.fixture
def remote(inventory, server, desk):
    """The inventory of a board behind that server, with a meter of its own and a plug's."""

    def write(plug):
        meters = {"shelly": {"host": plug.host}, "replay": trace(desk / "t.csv", lambda _: 5.0)}
        return inventory(meters, kind="generic", host="board", ssh_config=str(server.ssh_config), python=sys.executable)

    return write


def held(server, run="study-7"):
    """Another run's lock on the board."""
    lock = server.home / ".local/share/edge-testbed/lock.json"
    claim = {
        "run": run, "device": "board", "owner": "somebody@desk:1", "since": 0.0, "orphan_seconds": 1800.0,
        "spool": str(lock.parent / "runs" / run / "spool"),
    }  # fmt: skip
    assert landing.hold(str(lock), claim) is None


@pytest.mark.sshd
def test_a_boards_own_meter_is_read_there_by_our_code(remote, server, plug, capsys):
    path = remote(plug)
    words = ("meter", "board", "--inventory", path, "--seconds", "1.5", "--json")
    shelly, replay = json.loads(said(capsys, *words).out)["meters"]
    assert [(rail["rail"], rail["mean_watts"]) for rail in replay["rails"]] == [("VDD_IN", 5.0), ("VDD_SOC", 2.5)]
    assert [rail["mean_watts"] for rail in shelly["rails"]] == [4.2]
    code = server.home / ".local/share/edge-testbed/code"
    [there] = code.iterdir()
    wait_until(lambda: not processes_below(server.home))  # what read the meter there has ended
    before = there.stat().st_mtime_ns
    held(server)  # a run that has our code there may go on while somebody looks
    assert json.loads(said(capsys, *words).out)["meters"][1]["samples"] > 5
    assert [each.stat().st_mtime_ns for each in code.iterdir()] == [before]


@pytest.mark.sshd
def test_a_board_that_a_run_holds_is_sent_no_code(remote, server, plug, capsys):
    held(server)
    err = said(capsys, "meter", "board", "--inventory", remote(plug), "--seconds", "1", code=1).err
    assert "device board is held by run study-7 of somebody@desk:1" in err


@pytest.mark.sshd
def test_a_board_that_is_lost_ends_the_looking(remote, server, plug):
    with started("meter", "board", "--inventory", remote(plug)) as process:
        assert "VDD_IN 5.000 W" in process.stdout.readline()
        server.stop()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "device board: its meters tell nothing any more" in err
    assert "Traceback" not in err


@pytest.mark.sshd
def test_a_meter_that_the_board_has_not(remote, server, plug, desk, capsys):
    path = remote(plug)
    (desk / "t.csv").unlink()
    told = said(capsys, "meter", "board", "--inventory", path, "--seconds", "1.5", code=1)
    assert "is not on this machine" in told.err
    assert "switch:0" in told.out


@pytest.mark.sshd
def test_a_board_that_a_run_holds_is_not_switched_off_by_chance(remote, server, plug, capsys):
    path = remote(plug)
    held(server)
    err = said(capsys, "power", "off", "board", "--inventory", path, code=2).err
    assert "device board is held by run study-7 of somebody@desk:1; switch it off all the same with --yes" in err
    assert plug.on is True
    said(capsys, "power", "on", "board", "--inventory", path)
    said(capsys, "power", "off", "board", "--inventory", path, "--yes")
    assert plug.on is False


@pytest.mark.sshd
def test_a_board_that_does_not_answer_can_be_switched_off(remote, server, plug, capsys):
    path = remote(plug)
    server.stop()
    told = said(capsys, "power", "off", "board", "--inventory", path)
    assert "whether a run holds it cannot be asked" in told.err
    assert plug.on is False


@pytest.mark.sshd
def test_a_boards_meter_is_calibrated_against_a_plug(remote, plug, monkeypatch, capsys):
    monkeypatch.setattr(calibrations, "LEAST_PAIRS", 2)
    path = remote(plug)
    words = ("calibrate", "board", "--inventory", path, "--against", "shelly", "--seconds", "6")
    told = said(capsys, *words)
    found = calibration_of(load_inventory(path).devices[0], "replay")
    assert (found.gain, found.offset_watts) == (1.0, pytest.approx(-0.8))
    assert (found.reference, found.point) == ("shelly", "wall_ac")
    assert "only an offset" in told.err


@pytest.mark.lab
@pytest.mark.slow
def test_the_sensors_of_the_virtual_labs_boards(desk, capsys):
    with virtual_lab(desk / "lab", devices=2, personas=("jetson_orin_nano_8gb", "raspberry_pi_5_8gb")) as lab:
        content = yaml.safe_load(lab.inventory.read_text())
        content["defaults"]["python"] = "/usr/bin/python3"  # nothing was provisioned
        path = lab.folder / "meters.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        for name, meter, rail, watts in (
            ("jetson-orin-nano", "ina3221", "VDD_IN", 4.541),
            ("raspberry-pi-5", "rpi_pmic", "VDD_CORE", 0.75012 * 0.72),
        ):
            told = json.loads(said(capsys, "meter", name, "--inventory", path, "--seconds", "2", "--json").out)
            [found] = told["meters"]
            rails = {each["rail"]: each["mean_watts"] for each in found["rails"]}
            assert found["meter"] == meter
            assert rails[rail] == pytest.approx(watts, rel=0.05)
            assert found["samples"] >= 2
