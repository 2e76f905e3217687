"""Live state and results as metrics: what a watcher is told comes out as series, and where it is served it is found."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.cli import main
from testbed.energy import Energy
from testbed.energy_summary import EnergySummary
from testbed.errors import DeviceError, UsageError
from testbed.exporter.background import Refreshed
from testbed.exporter.families import COUNTER, FAMILIES
from testbed.exporter.figures import Figures, registry_of
from testbed.exporter.fleet_figures import fleet_figures
from testbed.exporter.run_metrics import RunMetrics, Tee
from testbed.exporter.serving import parse_address, serve
from testbed.exporter.store_figures import Store, result_figures
from testbed.exporter.targets import all_targets, announced, targets_folder
from testbed.fleet import Told
from testbed.inventory import Budget, Device, HardwareProfile, Inventory
from testbed.job import UNREACHABLE, Result
from testbed.live import Silent
from testbed.process_identity import ProcessIdentity
from testbed.report import summarise
from testbed.store import FINISHED, RunFolder
from tests.dashboards.server import get
from tests.run_records import MIB, add_rounds, finished, out_of_memory, planned, quality, record, refused

RUN = "lora-20260314-150926-5f3a"
CLIENTS = [planned(0, "orin-1", 800, 740, 12), planned(1, "pi-1", 500, 470, 3), refused(2, "pi-0", 300, 470)]
RECORD = record(clients=CLIENTS)
NOW = 1_700_000_000.0


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path / "cache"))


class Clock:
    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


def read(*figures):
    """What a scrape sees: {name: {labels: value}}, labels as (name, value) pairs that are not empty."""
    found = {}
    for metric in registry_of(*figures).collect():
        for sample in metric.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def value(figures, name, **labels):
    """The one series of that name and labels, or None."""
    return read(figures).get(name, {}).get(frozenset(labels.items()))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics(clock):
    """A run of three rounds has begun."""
    metrics = RunMetrics(clock, Clock(NOW))
    metrics.about(RECORD.config)
    metrics.run_started(RUN, RECORD.plan, 3)
    return metrics


def metered(joules, *, meter="ina3221", watts=5.1, **figures):
    told = {"meter": meter, "point": "module_rail", "replayed": False, "watts": {"VDD_IN": watts}}
    return {"meters": [{**told, "joules": {"VDD_IN": joules}}], **figures}


# ── a run ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_run_that_has_begun_says_what_it_is_and_what_was_planned(metrics):
    found = read(metrics.figures)
    [info] = found["testbed_run_info"]
    assert dict(info) == {
        "run": RUN, "method": "lora", "model": "quickstart", "data": "docstrings", "task": "sequence_classification",
        "seed": "7", "state": "running",
    }  # fmt: skip
    assert value(metrics.figures, "testbed_run_rounds_planned") == 3
    assert value(metrics.figures, "testbed_device_budget_bytes", device="pi-1") == 500 * MIB
    assert value(metrics.figures, "testbed_device_predicted_peak_bytes", device="orin-1") == 740 * MIB
    assert value(metrics.figures, "testbed_device_state", device="pi-0", state="refused") == 1
    assert value(metrics.figures, "testbed_run_jobs_total", device="pi-1", kind="train", outcome="finished") == 0


def test_what_nobody_knows_has_no_series(metrics):
    silent = {"testbed_run_loss", "testbed_run_accuracy_ratio", "testbed_run_round_seconds", "testbed_device_up"}
    assert not silent & set(read(metrics.figures))


def test_without_its_configuration_a_run_is_named_from_its_id_and_its_plan():
    metrics = RunMetrics()
    metrics.run_started(RUN, RECORD.plan, 3)
    [info] = read(metrics.figures)["testbed_run_info"]
    assert {"method": "lora", "model": "quickstart", "data": "", "seed": ""}.items() <= dict(info).items()


def test_rounds_losses_and_quality(metrics, clock):
    metrics.evaluated(-1, quality(0.125, 2.0))
    metrics.round_started(0, 2, 0.002)
    metrics.job_ended(finished(0, 0, "orin-1", 720))
    clock.now += 12.0
    metrics.round_started(1, 1, 0.001)
    metrics.job_ended(finished(1, 1, "pi-1", 450))
    metrics.evaluated(1, quality(0.5, 1.2))
    expected = {
        "rounds_done": 1, "round": 2, "round_seconds": 12.0, "participants": 1, "learning_rate": 0.001,
        "train_loss": 1.4, "loss": 1.2, "accuracy_ratio": 0.5,
    }  # fmt: skip
    assert {name: value(metrics.figures, f"testbed_run_{name}") for name in expected} == expected
    clock.now += 3.0
    metrics.run_ended("finished")
    assert value(metrics.figures, "testbed_run_rounds_done") == 3
    assert value(metrics.figures, "testbed_run_round_seconds") == 3.0


def test_a_loss_that_ran_away_is_no_number(metrics):
    metrics.evaluated(0, quality(0.5, 1.2))
    metrics.evaluated(1, quality(0.5, math.inf))
    assert value(metrics.figures, "testbed_run_loss") is None


def test_jobs_count_by_outcome_with_their_phases_traffic_and_tokens(metrics):
    for index in range(2):
        metrics.job_ended(finished(index, 0, "orin-1", 720))
    metrics.job_ended(out_of_memory(1, 1, "pi-1", 500))
    figures = metrics.figures
    assert value(figures, "testbed_run_jobs_total", device="orin-1", kind="train", outcome="finished") == 2
    assert value(figures, "testbed_run_jobs_total", device="pi-1", kind="train", outcome="out_of_memory") == 1
    assert value(figures, "testbed_run_phase_seconds_total", device="orin-1", phase="train") == 16.0
    assert value(figures, "testbed_run_traffic_bytes_total", device="orin-1", direction="up") == 500
    assert value(figures, "testbed_run_tokens_total", device="orin-1") == 8000
    assert value(figures, "testbed_device_state", device="pi-1", state="out_of_memory") == 1


def test_a_run_that_ends_says_how_and_lets_its_devices_go(metrics):
    metrics.event("orin-1", 0, "train")
    assert value(metrics.figures, "testbed_device_held", device="orin-1") == 1
    metrics.run_ended("interrupted")
    [info] = read(metrics.figures)["testbed_run_info"]
    assert dict(info)["state"] == "interrupted"
    assert value(metrics.figures, "testbed_device_held", device="orin-1") == 0
    assert value(metrics.figures, "testbed_device_state", device="orin-1", state="idle") == 1
    assert value(metrics.figures, "testbed_run_rounds_done") is None


def test_the_next_run_of_the_same_process_begins_with_nothing_of_the_last(metrics):
    metrics.evaluated(0, quality(0.5, 1.2))
    metrics.telemetry("orin-1", metered(7.0))
    metrics.run_started("fedpruner-20260314-160000-aaaa", RECORD.plan, 5)
    found = read(metrics.figures)
    [info] = found["testbed_run_info"]
    assert dict(info)["method"] == "fedpruner"
    assert dict(info)["data"] == ""
    assert not {"testbed_run_loss", "testbed_device_energy_joules_total"} & set(found)
    metrics.telemetry("orin-1", metered(2.0))
    assert energy(metrics) == 2.0


def test_the_id_of_a_run_is_a_label_of_one_live_series_only(metrics):
    metrics.round_started(0, 2, 0.002)
    metrics.event("orin-1", 0, "train", {"step": 1, "loss": 2.0, "peak_bytes": 5})
    metrics.telemetry("orin-1", metered(7.0, memory_bytes=1, celsius=40.0, throttled=["under-voltage"]))
    metrics.job_ended(finished(0, 0, "orin-1", 720))
    with_it = {
        name for name, series in read(metrics.figures).items() if any(RUN in dict(key).values() for key in series)
    }
    assert with_it == {"testbed_run_info"}


# ── its devices ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_device_has_one_state(metrics):
    metrics.event("orin-1", 0, "load")
    metrics.event("orin-1", 0, "train")
    metrics.event("orin-1", 0, None, {"step": 2})
    states = [
        dict(key)["state"] for key in read(metrics.figures)["testbed_device_state"] if ("device", "orin-1") in key
    ]
    assert states == ["train"]


@pytest.mark.parametrize("lose", [
    lambda metrics: metrics.event("pi-1", 1, "link lost"),
    lambda metrics: metrics.job_ended(Result("j", 1, 0, UNREACHABLE, "pi-1")),
])  # fmt: skip
def test_a_device_is_up_from_its_first_word_until_its_link_is_lost(metrics, lose):
    metrics.event("pi-1", 1, "train")
    assert value(metrics.figures, "testbed_device_up", device="pi-1") == 1
    assert value(metrics.figures, "testbed_device_last_contact_timestamp_seconds", device="pi-1") == NOW
    lose(metrics)
    assert value(metrics.figures, "testbed_device_up", device="pi-1") == 0
    metrics.telemetry("pi-1", {})
    assert value(metrics.figures, "testbed_device_up", device="pi-1") == 1


def test_the_peak_is_of_the_job_under_way_and_then_what_was_measured(metrics):
    def peak():
        return value(metrics.figures, "testbed_device_peak_bytes", device="orin-1")

    metrics.event("orin-1", 0, "train", {"peak_bytes": 300})
    metrics.event("orin-1", 0, None, {"peak_bytes": 200})
    assert peak() == 300
    metrics.job_ended(finished(0, 0, "orin-1", 720))
    assert peak() == 720 * MIB
    metrics.event("orin-1", 3, "load")
    assert peak() is None


def test_telemetry_is_told_and_what_becomes_unknown_is_gone(metrics):
    metrics.telemetry("pi-1", {"meters": [], "memory_bytes": 400, "accelerator_bytes": None, "celsius": 61.5})
    assert value(metrics.figures, "testbed_device_memory_bytes", device="pi-1") == 400
    assert value(metrics.figures, "testbed_device_temperature_celsius", device="pi-1") == 61.5
    assert value(metrics.figures, "testbed_device_accelerator_bytes", device="pi-1") is None
    metrics.telemetry("pi-1", {"memory_bytes": None, "celsius": None})
    assert not {"testbed_device_memory_bytes", "testbed_device_temperature_celsius"} & set(read(metrics.figures))


def test_what_holds_a_device_back_is_told_by_reason(metrics):
    def by(reason):
        return value(metrics.figures, "testbed_device_throttled_by", device="pi-1", reason=reason)

    def held_back():
        return value(metrics.figures, "testbed_device_throttled", device="pi-1")

    metrics.telemetry("pi-1", {"throttled": []})
    assert held_back() == 0
    metrics.telemetry("pi-1", {"throttled": ["under-voltage"]})
    assert (held_back(), by("under-voltage")) == (1, 1)
    metrics.telemetry("pi-1", {"throttled": ["heat"]})
    assert (held_back(), by("under-voltage"), by("heat")) == (1, 0, 1)
    metrics.telemetry("pi-1", {"throttled": None})
    assert (held_back(), by("under-voltage"), by("heat")) == (None, None, None)


def energy(metrics):
    rail = {"device": "orin-1", "meter": "ina3221", "rail": "VDD_IN"}
    return value(metrics.figures, "testbed_device_energy_joules_total", **rail)


def test_joules_grow_over_the_agents_of_a_run(metrics):
    seen = []
    for joules in (10.0, 25.0, 3.0, 8.0, 0.0, 1.0):  # two agents were replaced
        metrics.telemetry("orin-1", metered(joules))
        seen.append(energy(metrics))
    assert seen == [10.0, 25.0, 28.0, 33.0, 33.0, 34.0]


def test_a_meter_that_says_nothing_has_no_series_and_goes_on_where_it_was(metrics):
    metrics.telemetry("orin-1", metered(10.0))
    metrics.telemetry("orin-1", {"meters": []})
    assert not [name for name in read(metrics.figures) if re.search("watts|joules|meter", name)]
    metrics.telemetry("orin-1", metered(14.0, watts=None))
    assert energy(metrics) == 14.0
    assert "testbed_device_power_watts" not in read(metrics.figures)


def test_a_meter_that_plays_a_recording_is_marked(metrics):
    told = {"meter": "replay", "point": "dc_input", "replayed": True, "watts": {"in": 3.0}, "joules": {}}
    metrics.telemetry("pi-1", {"meters": [told]})
    labels = {"device": "pi-1", "meter": "replay", "point": "dc_input", "replayed": "true"}
    assert value(metrics.figures, "testbed_meter_info", **labels) == 1


def test_a_scrape_sees_whole_updates(metrics):
    """Watts and joules of one reading, however many threads tell and read."""
    over = threading.Event()

    def tell():
        joules = 0.0
        while not over.is_set():
            joules += 1.0
            metrics.telemetry("orin-1", metered(joules, watts=joules))

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        for _ in range(300):
            found = read(metrics.figures)
            watts, joules = (found.get(f"testbed_device_{name}") for name in ("power_watts", "energy_joules_total"))
            assert (watts or {}).values() == {} or list(watts.values()) == list(joules.values())
    finally:
        over.set()
        teller.join()


def test_a_tee_tells_both_everything(metrics):
    class Heard(Silent):
        def __init__(self):
            self.heard = []

        def __getattribute__(self, name):
            if name in Watched:
                return lambda *told: self.heard.append((name, *told))
            return super().__getattribute__(name)

    Watched = {  # noqa: N806
        "run_started": (RUN, RECORD.plan, 3),
        "round_started": (0, 2, 0.1),
        "event": ("pi-1", 1, "train", None),
        "telemetry": ("pi-1", {}),
        "job_ended": (finished(0, 0, "orin-1", 720),),
        "evaluated": (0, quality(0.5)),
        "run_ended": ("finished",),
    }
    one, other = Heard(), Heard()
    tee = Tee(one, other)
    for name, told in Watched.items():
        getattr(tee, name)(*told)
    assert one.heard == other.heard == [(name, *told) for name, told in Watched.items()]


def test_a_label_that_a_family_lacks_is_a_mistake():
    with pytest.raises(ValueError, match="expected the labels"):
        Figures().set("testbed_device_up", 1, run=RUN)


# ── the store and the fleet ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def runs(tmp_path):
    """Three rounds on orin-1, the last of them out of memory; pi-1 was refused."""
    folder = RunFolder.create(tmp_path / "runs", RUN, record())
    for result in (finished(0, 0, "orin-1", 720), finished(1, 0, "orin-1", 735), out_of_memory(2, 0, "orin-1", 800)):
        folder.record_result(result)
    add_rounds(folder, [0.4, 0.7, 0.65])
    folder.set_status(FINISHED)
    return tmp_path / "runs"


def test_the_results_of_a_run_are_those_of_the_report(runs):
    figures = Store(runs).look()
    [info] = read(figures)["testbed_result_info"]
    assert {"run": RUN, "method": "lora", "seed": "7", "state": "finished", "emulated": "true"}.items() <= dict(
        info
    ).items()
    expected = {"accuracy_ratio": 0.65, "loss": 1.0, "rounds": 3, "seconds": 30.0, "failed_jobs": 1}
    assert {name: value(figures, f"testbed_result_{name}", run=RUN) for name in expected} == expected
    assert value(figures, "testbed_result_peak_bytes", run=RUN, device="orin-1") == 735 * MIB
    assert value(figures, "testbed_result_budget_bytes", run=RUN, device="orin-1") == 800 * MIB
    assert value(figures, "testbed_result_phase_seconds", run=RUN, phase="train") == 17.0
    assert value(figures, "testbed_result_traffic_bytes", run=RUN, direction="up") == 500
    assert value(figures, "testbed_result_reference_accuracy_ratio", run=RUN, reference="majority") == 0.125
    assert "testbed_result_energy_joules" not in read(figures)
    assert value(figures, "testbed_runs", state="finished") == 1


def test_an_energy_stands_with_its_verdict(runs):
    summary = summarise(RunFolder(runs / RUN))
    for energy, marks in (
        (Energy(410.0, 30.0), {"valid": "true", "replayed": "false"}),
        (Energy(410.0, 30.0, replayed=True, problems=("gaps",)), {"valid": "false", "replayed": "true"}),
    ):
        figures = result_figures([replace(summary, energy=EnergySummary(energy))])
        assert value(figures, "testbed_result_energy_joules", run=RUN, **marks) == 410.0
    unknown = result_figures([replace(summary, energy=EnergySummary(Energy(None, 30.0)))])
    assert "testbed_result_energy_joules" not in read(unknown)


def test_a_run_that_has_changed_is_read_again_and_no_other(runs, monkeypatch):
    asked = []
    import testbed.exporter.store_figures as module

    real = module.summarise
    monkeypatch.setattr(module, "summarise", lambda folder: asked.append(folder.run_id) or real(folder))
    other = RunFolder.create(runs, "fedpruner-20260314-160000-aaaa", record("fedpruner"))
    other.set_status(FINISHED)
    store = Store(runs)
    store.look()
    assert sorted(asked) == ["fedpruner-20260314-160000-aaaa", RUN]
    asked.clear()
    store.look()
    assert asked == []
    other.record_result(finished(0, 0, "orin-1", 720))
    figures = store.look()
    assert asked == ["fedpruner-20260314-160000-aaaa"]
    assert value(figures, "testbed_result_peak_bytes", run=other.run_id, device="orin-1") == 720 * MIB


def test_a_run_that_is_removed_is_gone(runs):
    store = Store(runs)
    store.look()
    (runs / RUN / "config.json").unlink()
    assert "testbed_result_info" not in read(store.look())


def test_a_run_that_cannot_be_read_is_counted_and_hides_no_other(runs, caplog):
    broken = RunFolder.create(runs, "lora-20260314-170000-bbbb", record())
    (broken.path / "config.json").write_text("{")
    figures = Store(runs).look()
    assert value(figures, "testbed_runs", state="unreadable") == 1
    assert value(figures, "testbed_runs", state="finished") == 1
    assert "lora-20260314-170000-bbbb" in caplog.text


PROFILE = HardwareProfile("pi-4", "Raspberry Pi 4", 4096 * MIB, 3800 * MIB, 4)
ORIN, PI, HERE = (Device(name, "generic", PROFILE, Budget(800 * MIB)) for name in ("orin-1", "pi-1", "here"))


def test_devices_are_told_as_they_answered_and_one_that_was_not_asked_is_not_guessed():
    answer = {"holder": {"run": RUN}, "free_bytes": 5 << 30}
    told = [Told(ORIN, answer), Told(PI, error=DeviceError("no route to host"))]
    figures = fleet_figures(Inventory((ORIN, PI, HERE)), told)
    up = {name: value(figures, "testbed_device_up", device=name) for name in ("orin-1", "pi-1", "here")}
    assert up == {"orin-1": 1, "pi-1": 0, "here": None}
    assert value(figures, "testbed_device_held", device="orin-1") == 1
    assert value(figures, "testbed_device_held", device="pi-1") is None
    assert value(figures, "testbed_device_disk_free_bytes", device="orin-1") == 5 << 30
    assert value(figures, "testbed_device_budget_bytes", device="here") == 800 * MIB


def test_a_look_that_fails_leaves_the_last_one_standing(caplog):
    looks, looked = iter([True, False]), threading.Semaphore(0)

    def look():
        try:
            if next(looks, False):
                figures = Figures()
                figures.set("testbed_runs", 4, state="finished")
                return figures
            raise DeviceError("no route to host")
        finally:
            looked.release()

    with Refreshed("runs", look, 0.01) as refreshed:
        assert all(looked.acquire(timeout=20) for _ in range(3))
        assert value(refreshed.figures, "testbed_runs", state="finished") == 4
    assert "no route to host" in caplog.text


# ── serving ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_metrics_are_served_on_loopback_in_a_form_that_prometheus_reads(metrics):
    from prometheus_client.parser import text_string_to_metric_families

    with serve(metrics.registry(), 0) as url:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", url)
        families = {family.name: family for family in text_string_to_metric_families(get(url).decode())}
    assert families["testbed_run_rounds_planned"].type == "gauge"
    assert families["testbed_run_jobs"].type == COUNTER
    assert {family.removesuffix("_total") for family in FAMILIES} >= set(families)


def test_nothing_else_is_served(metrics):
    with serve(metrics.registry(), 0) as url:
        with pytest.raises(OSError, match="404"):
            get(url.replace("/metrics", "/config.json"))
        assert b"/metrics" in get(url.replace("/metrics", "/"))


def test_a_port_that_is_in_use_is_told_in_one_message(metrics):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port}: Address already in use; choose another port, or 0"),
            serve(metrics.registry(), f"127.0.0.1:{port}"),
        ):
            pass
    assert all_targets() == []


@pytest.mark.parametrize(
    ("text", "address"),
    [("9101", ("127.0.0.1", 9101)), (0, ("127.0.0.1", 0)), ("lab:9101", ("lab", 9101)), ("[::1]:1", ("::1", 1))],
)
def test_addresses(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", ":9101", "lab", "lab:", "lab:http", "1:99999", "-1"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(UsageError, match="expected an address such as 9101"):
        parse_address(text)


def test_who_serves_is_found_and_forgotten(metrics):
    with serve(metrics.registry(), 0) as url:
        target = url.removeprefix("http://").removesuffix("/metrics")
        [path] = targets_folder().glob("*.json")
        assert json.loads(path.read_text()) == [{"targets": [target], "labels": {"serves": "run"}}]
        assert json.loads(get(url.replace("/metrics", "/targets"))) == all_targets() == json.loads(path.read_text())
    assert list(targets_folder().iterdir()) == []


def test_who_serves_everywhere_is_found_on_loopback(metrics):
    with serve(metrics.registry(), "0.0.0.0:0") as url:
        assert url.startswith("http://127.0.0.1:")
        assert get(url)


def test_a_process_that_was_killed_is_swept_away_and_the_users_own_file_is_not():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        it = ProcessIdentity.of(process.pid)
        killed = targets_folder() / f"run.{it.pid}.{it.started}.{it.boot}.9101.json"
        own = targets_folder() / "node.json"
        targets_folder().mkdir(parents=True)
        killed.write_text('[{"targets": ["127.0.0.1:9101"]}]')
        own.write_text('[{"targets": ["192.0.2.17:9100"]}]')
        with announced("127.0.0.1:9102", "run"):
            assert killed.exists()
        process.kill()
    with announced("127.0.0.1:9102", "run"):
        assert not killed.exists()
        assert [entry["targets"][0] for entry in all_targets()] == ["192.0.2.17:9100", "127.0.0.1:9102"]
    assert [path.name for path in targets_folder().iterdir()] == ["node.json"]


def test_the_end_of_a_run_waits_for_who_has_been_watching(metrics):
    """The block ends, and a scrape that comes after that still gets an answer."""
    ended, watched = threading.Event(), []

    def scrape_at_the_end(url):
        assert ended.wait(20)
        watched.append(get(url))

    with serve(metrics.registry(), 0, linger_seconds=20.0) as url:
        get(url)
        late = threading.Thread(target=scrape_at_the_end, args=(url,))
        late.start()
        metrics.run_ended("finished")
        ended.set()
    late.join()
    assert b'state="finished"' in watched[0]


@pytest.mark.timeout(20)
def test_it_does_not_wait_where_nobody_watches_or_the_user_is_in_a_hurry(metrics):
    with serve(metrics.registry(), 0, linger_seconds=3600.0):
        pass

    def interrupted():
        with serve(metrics.registry(), 0, linger_seconds=3600.0) as url:
            get(url)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_exporter_serves_runs_and_devices_until_it_is_told_to_end(runs):
    command = [sys.executable, "-u", "-m", "testbed", "exporter", "--runs", str(runs), "--address", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            url = re.search(r"http://\S+/metrics", line)[0]
            wanted = {f'testbed_result_accuracy_ratio{{run="{RUN}"}} 0.65', "testbed_device_budget_bytes{device="}
            text = ""
            while not all(each in text for each in wanted):  # its first look is on its way; the timeout ends this
                text = get(url).decode()
            assert [entry["labels"] for entry in all_targets()] == [{"serves": "store"}]
            process.send_signal(signal.SIGTERM)
            _, problems = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, problems) == (0, "")
    assert "4 devices" in line
    assert all_targets() == []


def test_an_exporter_whose_port_is_taken_says_so(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["exporter", "--address", str(port)]) == 2
    assert "Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["--help"], ["exporter", "--help"], ["dashboards", "up", "--help"], ["dashboards", "status"]]
)
def test_commands_that_serve_nothing_need_no_client_library(args):
    code = "import sys; sys.modules['prometheus_client'] = None; from testbed.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False, env=os.environ
    )
    assert "Traceback" not in done.stderr
    assert done.stdout


def test_the_page_lists_every_metric_as_it_is_exported():
    page = (Path(__file__).parent.parent / "docs" / "watching.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(testbed_\w+)` \| (.*?) ?\| (.*?) ?\| (.+) \|$", page, re.MULTILINE)
    assert rows == [(f.name, " ".join(f.labels), f.unit, f.about) for f in FAMILIES.values()]
