"""A real Prometheus, started as a user starts it, finds what is served, and every expression of ours returns data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.energy import Energy
from testbed.energy_summary import EnergySummary
from testbed.errors import DeviceError
from testbed.exporter.background import Refreshed
from testbed.exporter.figures import registry_of
from testbed.exporter.fleet_figures import fleet_figures
from testbed.exporter.run_metrics import RunMetrics
from testbed.exporter.serving import serve
from testbed.exporter.store_figures import result_figures
from testbed.fleet import Told
from testbed.inventory import Budget, Device, HardwareProfile, Inventory
from testbed.report import summarise
from testbed.store import FINISHED, RunFolder
from tests.dashboards.server import PATIENCE_SECONDS, Asked, committed, rules, targets_of
from tests.run_records import MIB, add_rounds, finished, out_of_memory, planned, quality, record
from tests.tiny_lab import INVENTORY, arguments, make_lab

pytestmark = [pytest.mark.prometheus, pytest.mark.slow]

RUN = "lora-20260314-150926-5f3a"
PLAN = record(clients=[planned(0, "orin-1", 800, 740, 12), planned(1, "pi-1", 500, 470, 3)]).plan
LONG_AGO = 1000.0  # seconds; a run in which nothing has happened since has stalled


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """As `testbed dashboards up` starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_CACHE", str(tmp_path_factory.mktemp("watching")))
        command = [sys.executable, "-m", "testbed", "dashboards"]
        up = [*command, "up", "--port", "0", "--grafana-port", "0", "--json"]
        done = subprocess.run(up, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        try:
            yield Asked(json.loads(done.stdout)[0]["url"])
        finally:
            subprocess.run([*command, "down"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def watched(prometheus, tmp_path_factory):
    """Served and scraped: a run in which everything happens at once, and what the exporter serves."""
    metrics = RunMetrics(wall_clock=lambda: time.time() - LONG_AGO)
    eventful(metrics)
    runs, devices = store(tmp_path_factory.mktemp("runs")), fleet()
    with serve(metrics.registry(), 0), serve(registry_of(runs.figures, devices.figures), 0, serves="store"):
        yield prometheus


def eventful(metrics):
    metrics.about(record().config)
    metrics.run_started(RUN, PLAN, 3)
    metrics.evaluated(-1, quality(0.125, 2.0))
    metrics.round_started(0, 2, 0.002)
    metrics.job_ended(finished(0, 0, "orin-1", 720))
    metrics.round_started(1, 2, 0.001)
    metrics.event("orin-1", 0, "train", {"step": 1, "steps": 8, "loss": 1.7, "peak_bytes": 700 * MIB})
    metrics.job_ended(out_of_memory(1, 1, "pi-1", 500))
    metrics.telemetry(
        "orin-1",
        {
            "meters": [
                {
                    "meter": "ina3221", "point": "module_rail", "replayed": False,
                    "watts": {"VDD_IN": 5.1, "VDD_SOC": 1.2}, "joules": {"VDD_IN": 123.4, "VDD_SOC": 30.0},
                }
            ],
            "memory_bytes": 799 * MIB, "accelerator_bytes": 300 * MIB, "celsius": 61.0, "throttled": ["heat"],
        },
    )  # fmt: skip
    metrics.event("pi-1", 1, "link lost")


def store(folder: Path) -> Refreshed:
    run = RunFolder.create(folder, RUN, record())
    run.record_result(finished(0, 0, "orin-1", 720))
    add_rounds(run, [0.4])
    run.set_status(FINISHED)
    summary = replace(summarise(run), energy=EnergySummary(Energy(410.0, 30.0)))
    seen = Refreshed("runs", lambda: result_figures([summary]), 1.0)
    seen.refresh()
    return seen


def fleet() -> Refreshed:
    profile = HardwareProfile("pi-4", "Raspberry Pi 4", 4096 * MIB, 3800 * MIB, 4)
    orin, pi = (Device(name, "generic", profile, Budget(800 * MIB)) for name in ("orin-1", "pi-1"))
    told = [Told(orin, {"holder": None, "free_bytes": 5 << 30}), Told(pi, error=DeviceError("no route"))]
    seen = Refreshed("devices", lambda: fleet_figures(Inventory((orin, pi)), told), 1.0)
    seen.refresh()
    return seen


@pytest.mark.parametrize("name", sorted(committed()))
def test_every_expression_of_a_dashboard_returns_data(watched, name):
    expressions = [expr for _, expr in targets_of(committed()[name])]
    assert watched.silent(expressions) == []


def test_every_rule_returns_data(watched):
    """Alerts too: in this run one board is lost, one is held back and full, and nothing has happened for long."""
    assert watched.silent([rule["expr"] for rule in rules()]) == []


def test_what_is_recorded_is_right(watched):
    expr = "device:testbed_device_headroom_bytes:now"
    assert watched.silent([expr]) == []
    assert {each["metric"]["device"]: float(each["value"][1]) for each in watched.query(expr)} == {"orin-1": MIB}


def test_the_run_and_the_exporter_are_each_scraped_once_and_well(watched):
    assert watched.silent(['up{serves="run"} == 1', 'up{serves="store"} == 1']) == []
    assert len(watched.query("up")) == 2


# ── a run ───────────────────────────────────────────────────────────────────────────────────────────────────────────
#: One device plays a recording of power, the other has no meter.
METERED = INVENTORY.replace("[big]}", "[big], meter: {replay: {trace: raspberry_pi_5, repeat: true}}}")


@pytest.mark.cgroup
@pytest.mark.timeout(600)
def test_a_run_is_seen_while_it_is_under_way_and_to_its_end(prometheus, tmp_path):
    """Another run's series may be there too: everything is asked of this one, by joining on its id."""
    lab = make_lab(tmp_path)
    (lab / "lab.yaml").write_text(METERED)
    words = arguments(lab, "--rounds", "12", "--idle-seconds", "0", "--metrics", "0")
    command = [sys.executable, "-m", "testbed", "run-method", "lora", *words]
    log = (tmp_path / "log").open("w+")
    with log, subprocess.Popen(command, env=os.environ, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            run = wait_for_run(prometheus, lab, process, log)
            of = f'on (instance) group_left (run) testbed_run_info{{run="{run}"}}'
            live = [
                f"({name}) * {of}"
                for name in (
                    "testbed_run_round", "testbed_run_train_loss", "testbed_run_loss", "testbed_run_accuracy_ratio",
                    'testbed_run_jobs_total{outcome="finished"} > 0', 'testbed_run_phase_seconds_total{phase="train"}',
                    "testbed_device_memory_bytes", 'testbed_device_power_watts{device="large"}',
                    'testbed_device_energy_joules_total{device="large"} > 0', 'testbed_meter_info{replayed="true"}',
                )
            ]  # fmt: skip
            seen = [f"last_over_time(({expr})[10m:1s])" for expr in live]
            assert prometheus.silent(seen) == []
            assert process.wait(timeout=300) == 0, text_of(log)
            end = f'last_over_time(testbed_run_info{{run="{run}", state="finished"}}[10m])'
            done = f"last_over_time((testbed_run_rounds_done * {of})[10m:1s]) == 12"
            assert prometheus.silent([end, done]) == []
        finally:
            process.kill()
    assert prometheus.silent([f'absent(testbed_run_info{{run="{run}"}})']) == []  # who has ended is not shown any more


def wait_for_run(prometheus, lab, process, log):
    deadline = time.monotonic() + 2 * PATIENCE_SECONDS
    while time.monotonic() < deadline:
        names = [path.name for path in (lab / "runs").glob("lora-*")]
        if names and prometheus.query(f'testbed_run_info{{run="{names[0]}"}}'):
            return names[0]
        assert process.poll() is None, text_of(log)
        time.sleep(0.1)
    raise AssertionError(f"the run was not seen: {text_of(log)}")


def text_of(log):
    log.seek(0)
    return log.read()
