"""jtop.service is read: the real one on a board of files, and a stand-in for what that one cannot be made to do."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from testbed.errors import MeterError
from testbed.meters import BOARD, jtop, make
from tests.drills import exists, wait_until
from tests.meters.jtop_server import AGX_ORIN, jtop_host


def reading(meter):
    """What it reads, or why it cannot, in words."""
    try:
        return meter.read()
    except MeterError as error:
        return str(error)


def is_reading(meter):
    return not isinstance(reading(meter), str)


@pytest.fixture
def opened():
    """Opens meters that are closed at the end."""
    meters = []

    def make_and_open(**settings):
        meter = make("jtop", settings)
        meters.append(meter)
        meter.open()
        return meter

    yield make_and_open
    for meter in meters:
        meter.close()


# ── the real service ─────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def host(tmp_path):
    """An Orin Nano with the service at work."""
    with jtop_host(tmp_path) as host:
        host.start()
        yield host


@pytest.mark.jtop
def test_the_rails_are_the_boards_with_its_total_first_and_nothing_but_what_it_draws(host, opened):
    meter = opened(python=host.python)
    assert meter.rails == ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")
    assert meter.total_rails == ("VDD_IN",)
    assert meter.read().watts == (6.028, 2.26, 1.504)  # in whole milliwatts, as the service cuts them off
    assert meter.read().joules is None
    assert (meter.where, meter.point, meter.has_counters) == (BOARD, "module_rail", False)


@pytest.mark.jtop
def test_a_change_shows_at_once_and_in_full_where_an_average_would_creep(host, opened):
    meter = opened(python=host.python)
    host.set("VDD_IN", 5000, 3000)
    before = meter.read().watts[0]
    assert before == 6.028
    wait_until(lambda: meter.read().watts[0] != before)
    assert meter.read().watts[0] == 15.0


@pytest.mark.jtop
def test_a_reading_has_the_time_of_its_sample_and_repeats_it_until_there_is_another(host, opened):
    meter = opened(python=host.python)
    begun = time.time()
    times = set()
    wait_until(lambda: times.add(meter.read().unix_seconds) or len(times) == 4)
    first, *_, last = sorted(times)
    assert begun - 6 < first < last <= time.time()
    # Four samples of the service; how many readings there were does not matter.
    assert last - first > 3 * 0.5 * 0.8


@pytest.mark.jtop
def test_when_the_service_dies_a_reading_says_so_and_when_it_is_back_it_reads_again(host, opened):
    meter = opened(python=host.python)
    host.stop()
    wait_until(lambda: "jtop.service has ended" in reading(meter))
    host.set("VDD_IN", 5000, 2000)
    host.start()
    wait_until(lambda: is_reading(meter))
    assert meter.read().watts[0] == 10.0


@pytest.mark.jtop
@pytest.mark.slow
def test_a_service_that_goes_silent_is_an_error_and_not_its_last_word(host, opened):
    meter = opened(python=host.python)
    host.signal_service(signal.SIGSTOP)
    wait_until(lambda: "it has gone silent" in reading(meter))
    wait_until(lambda: "it does not answer" in reading(meter))
    host.signal_service(signal.SIGCONT)
    wait_until(lambda: is_reading(meter))


@pytest.mark.jtop
def test_a_rail_whose_sensor_fails_is_missed(host, opened):
    meter = opened(python=host.python)
    host.lose("VDD_SOC")
    wait_until(lambda: reading(meter) == "jtop.service tells nothing of the rail VDD_SOC now")


@pytest.mark.jtop
def test_where_no_rail_is_the_total_the_sum_of_all_is_not_taken_for_it(tmp_path, opened):
    with jtop_host(tmp_path, AGX_ORIN) as host:
        host.start()
        meter = opened(python=host.python)
        assert meter.rails == ("VDD_CPU_CV", "VDD_GPU_SOC", "VIN_SYS_5V0")
        assert meter.total_rails == ()


@pytest.mark.jtop
def test_a_service_of_another_version_is_refused_with_both_and_the_way_out(tmp_path, opened):
    with jtop_host(tmp_path) as host:
        host.start(version="7.1.9")
        with pytest.raises(MeterError, match=r"version 7\.1\.9 and its client of .*\"jetson-stats==7\.1\.\*\""):
            opened(python=host.python)


@pytest.mark.jtop
def test_without_the_service_it_says_how_to_start_it(tmp_path, opened):
    with (
        jtop_host(tmp_path) as host,
        pytest.raises(MeterError, match="does not run on this machine: sudo systemctl start jtop"),
    ):
        opened(python=host.python)


@pytest.mark.jtop
def test_a_meter_that_is_closed_leaves_no_client_and_opens_again(host, opened):
    meter = opened(python=host.python)
    client = meter._process.pid
    meter.close()
    assert not exists(client)
    with pytest.raises(MeterError, match="is not open"):
        meter.read()
    meter.open()
    assert is_reading(meter)


# ── a stand-in for the client of jetson-stats ────────────────────────────────────────────────────────────────────────
STAND_IN = """
import datetime, json, pathlib, threading, time

class JtopException(Exception):
    pass

class jtop(threading.Thread):
    def __init__(self, interval):
        super().__init__(daemon=True)
        self.said = json.loads(pathlib.Path(__file__).with_name("board.json").read_text())
        self.interval = self.said.get("interval", interval)
    def attach(self, observer):
        self.observer = observer
    def start(self):
        if "error" in self.said:
            raise JtopException(self.said["error"])
        super().start()
    def run(self):
        while True:
            self.uptime = datetime.timedelta(seconds=float(open("/proc/uptime").read().split()[0]))
            self.power = self.said["power"]
            self.observer(self)
            time.sleep(0.1)
    def ok(self, spin):
        return True
"""
IN = {"power": 6028, "avg": 5000, "online": True}


@pytest.fixture
def python(tmp_path):
    """A Python that has this in jetson-stats' place; what its service says, or None for one that lacks it."""

    def with_client(said):
        venv.create(tmp_path / "venv", symlinks=True)
        if said is not None:
            (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
            (packages / "jtop.py").write_text(STAND_IN)
            (packages / "board.json").write_text(json.dumps(said))
        return str(tmp_path / "venv/bin/python")

    return with_client


def test_only_what_is_online_and_measured_becomes_a_rail(python, opened):
    usb = {"power": 0, "avg": 0, "online": False}
    meter = opened(python=python({"power": {"rail": {"ucsi": usb, "GPU": IN}, "tot": {**IN, "name": "VDD_IN"}}}))
    assert meter.rails == ("VDD_IN", "GPU")
    assert meter.read().watts == (6.028, 6.028)


@pytest.mark.parametrize("power", [{}, {"rail": {}, "tot": {"power": 0, "avg": 0}}])
def test_a_board_without_a_sensor_has_nothing_to_read(python, opened, power):
    with pytest.raises(MeterError, match="knows no power sensor on this board"):
        opened(python=python({"power": power}))


def test_an_interval_that_another_client_has_made_too_long_is_refused(python, opened):
    said = {"interval": 1.0, "power": {"rail": {}, "tot": {**IN, "name": "VDD_IN"}}}
    with pytest.raises(MeterError, match=r"samples every 1 s, as another client of it wishes"):
        opened(python=python(said))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("I can't access jtop.service.\nPlease logout or reboot this board.", "usermod -aG jtop USER"),
        ("Authentication with jetson-stats server failed", "jtop.service: Authentication with jetson-stats server fa"),
    ],
)
def test_what_the_client_cannot_do_is_said_with_the_way_out(python, opened, error, said):
    with pytest.raises(MeterError, match=said):
        opened(python=python({"error": error}))


def test_a_python_without_jetson_stats_is_told_what_to_install(python, opened):
    with pytest.raises(
        MeterError, match=r"not installed for .*python \(No module named 'jtop'\); pip install jetson-stats"
    ):
        opened(python=python(None))


def test_a_python_that_is_not_there_is_named(opened):
    with pytest.raises(MeterError, match="cannot be started by /no/python: No such file"):
        opened(python="/no/python")


def test_a_client_that_was_killed_is_started_again(python, opened):
    meter = opened(python=python({"power": {"rail": {}, "tot": {**IN, "name": "VDD_IN"}}}))
    os.kill(meter._process.pid, signal.SIGKILL)
    wait_until(lambda: "it was started again" in reading(meter))
    wait_until(lambda: is_reading(meter))


def test_the_client_is_a_program_for_the_python_of_old_boards_too():
    ast.parse((Path(jtop.__file__).with_name("_jtop_client.py")).read_text(), feature_version=(3, 6))


def test_the_client_ends_with_whoever_asked(python):
    said = {"power": {"rail": {}, "tot": {**IN, "name": "VDD_IN"}}}
    asking = (
        "import os, sys; from testbed.meters import make; meter = make('jtop', {'python': sys.argv[1]}); meter.open();"
        "print(meter._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", asking, python(said)], check=False, capture_output=True, text=True)
    client = int(done.stdout)
    wait_until(lambda: not exists(client))


def test_the_meter_itself_stays_small_for_those_who_do_not_choose_it():
    heavy = ["jtop", "subprocess", "multiprocessing", "logging", "dataclasses"]
    code = f"import sys, testbed.meters.jtop; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {code}"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "[]"
