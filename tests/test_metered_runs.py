"""Power, rest and energy through real agents: from a meter's samples to the figures of a report."""

from __future__ import annotations

import http.server
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest

from testbed import calibrations
from testbed.controller_meters import ControllerMeters, try_meters_here
from testbed.energy_summary import device_energy, run_energy
from testbed.errors import MeterError
from testbed.inventory import MeterChoice
from testbed.job import FINISHED, OVER_BUDGET, REST, TIMED_OUT, Result
from testbed.measurement import Calibration, Measurement, PhaseMeasurement, PowerTrace
from testbed.power_integral import gross
from testbed.store import RunFolder
from tests import drills
from tests.drills import device, engine, job
from tests.run_records import record

STEADY = "# point: dc_input\n# total_rails: VIN\n# gain: 0.01\nseconds,VIN,PART\n0,5.0,2.0\n30,5.0,2.0\n"


@pytest.fixture
def metered(tmp_path):
    trace = tmp_path / "steady.csv"
    trace.write_text(STEADY)
    return replace(device(), meters=(MeterChoice("replay", {"file": str(trace), "repeat": True}),))


def rest(identity="rest-1", **wishes):
    return replace(job(identity, **wishes), kind=REST, round=-1)


def run(running, *jobs):
    return [result for result, _ in running.run([("board", each, None) for each in jobs])]


def test_a_job_brings_samples_of_all_its_phases_and_they_make_its_energy(tmp_path, metered):
    with engine(tmp_path, metered) as running:
        steps = [["phase", "train"], ["take_time", 0.3]]
        (result,) = run(running, job(steps=steps, update={"a": [300, 1000]}))
    (trace,) = result.measurement.power
    assert (trace.meter, trace.point, trace.rails, trace.total_rails) == (
        "replay",
        "dc_input",
        ("VIN", "PART"),
        ("VIN",),
    )
    assert trace.replayed
    names = [phase.name for phase in result.measurement.phases]
    assert names[-1] == "send"
    ends = {phase.name: (phase.begun_seconds or 0.0) + phase.seconds for phase in result.measurement.phases}
    assert trace.rows[0][0] < 0.25 < ends["send"] - 0.001 <= trace.rows[-1][0]
    energy = gross(trace, [(0.0, ends["send"])])
    assert energy.joules == pytest.approx(5.0 * ends["send"], rel=1e-6)


def test_the_phases_of_a_job_lie_one_after_another_from_its_first_byte(tmp_path, metered):
    with engine(tmp_path, metered) as running:
        (result,) = run(running, job(steps=[["phase", "train"]], update={"a": [3]}))
    phases = [phase for phase in result.measurement.phases if phase.name != "idle"]
    assert phases[0].name == "receive"
    assert phases[0].begun_seconds == 0.0
    for before, after in pairwise(phases):
        assert before.begun_seconds + before.seconds <= after.begun_seconds + 0.01


def test_a_device_rests_without_a_trainer_and_is_measured_meanwhile(tmp_path, metered):
    with engine(tmp_path, metered) as running:
        (result,) = run(running, rest(seconds=0.5))
        assert len(drills.processes_below(tmp_path)) == 1  # the agent
    assert result.outcome == FINISHED
    windows = {phase.name: phase for phase in result.measurement.phases}
    assert windows["idle_window"].seconds > 0.49
    assert "start" not in windows
    assert len(result.measurement.power[0].rows) >= 4


def test_a_node_that_is_cooler_than_asked_for_does_not_wait(tmp_path, metered):
    with engine(tmp_path, metered) as running:
        (result,) = run(running, rest(seconds=0.1, below_celsius=1000.0, cool_seconds=60.0))
    assert result.measurement.conditions.too_hot is False


def test_a_rest_can_be_cancelled(tmp_path, metered):
    options = {"job_timeout_seconds": 0.3}
    with engine(tmp_path, metered, options=options) as running:
        first, second = run(running, rest(seconds=600.0), job(steps=[["phase", "train"]]))
    assert (first.outcome, second.outcome) == (TIMED_OUT, FINISHED)


def test_a_meter_that_cannot_be_read_is_told_before_any_job(tmp_path):
    broken = replace(device(), meters=(MeterChoice("replay", {"file": str(tmp_path / "none.csv")}),))
    with (
        pytest.raises(MeterError, match=r"device board: meter replay: .*none\.csv.*`meter: none`"),
        engine(tmp_path, broken) as running,
    ):
        running.hold()
    with pytest.raises(MeterError, match="device board: meter replay"):
        try_meters_here([broken])


def test_how_a_node_stands_is_told_while_it_works_and_between(tmp_path, metered):
    told = []
    options = {"on_telemetry": lambda name, figures: told.append((name, figures))}
    with engine(tmp_path, metered, options=options, telemetry_seconds=0.05) as running:
        run(running, rest(seconds=0.5))
    name, figures = told[-1]
    assert name == "board"
    (meter,) = figures["meters"]
    assert (meter["meter"], meter["point"], meter["replayed"]) == ("replay", "dc_input", True)
    assert meter["watts"] == pytest.approx({"VIN": 5.0, "PART": 2.0})
    assert meter["total_watts"] == pytest.approx(5.0)
    assert 0 < meter["joules"]["PART"] < meter["joules"]["VIN"]
    assert meter["joules"]["VIN"] >= told[0][1]["meters"][0]["joules"]["VIN"]


def test_nobody_is_told_who_did_not_ask(tmp_path, metered):
    told = []
    with engine(tmp_path, metered, options={"on_telemetry": lambda *figures: told.append(figures)}) as running:
        run(running, rest(seconds=0.3))
    assert told == []


def test_the_agent_says_what_it_took_itself(tmp_path, metered):
    with engine(tmp_path, metered) as running:
        (result,) = run(running, rest(seconds=1.0))
    measured = result.measurement
    assert not list(tmp_path.glob("nodes/board/spool/power*")), "what belongs to a job is in its result"
    assert 0 <= measured.agent_cpu_seconds < measured.seconds
    assert measured.agent_pss_bytes < 15 * drills.MIB


# ── meters of the controller ─────────────────────────────────────────────────────────────────────────────────────────
@contextmanager
def plug(watts):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = {"StatusSNS": {"ENERGY": {"Power": watts, "Total": 1.0}}}
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_samples_of_a_plug_become_part_of_the_jobs_by_the_clocks_of_both(tmp_path, metered):
    with plug(7.5) as host:
        both = replace(metered, meters=(*metered.meters, MeterChoice("tasmota", {"host": host})))
        with ControllerMeters([both], tmp_path / "meters") as meters, engine(tmp_path, both) as running:
            (received,) = run(running, rest(seconds=2.5))
            result = meters.complete(received)
    own, wall = result.measurement.power
    assert (own.meter, wall.meter, wall.point) == ("replay", "tasmota", "wall_ac")
    assert result.measurement.clock_seconds < 0.5
    assert wall.timing_seconds == result.measurement.clock_seconds
    (window,) = [phase for phase in result.measurement.phases if phase.name == "idle_window"]
    energy = gross(wall, [(window.begun_seconds, window.begun_seconds + window.seconds)])
    assert energy.joules == pytest.approx(7.5 * window.seconds, rel=0.01)


def test_a_stored_calibration_counts_in_every_run_and_the_samples_stay_as_they_were(tmp_path, metered, monkeypatch):
    monkeypatch.setenv("TESTBED_DATA", str(tmp_path / "data"))
    fitted = Calibration(1.2, 0.5, 0.02, "shelly", "wall_ac", 0.01, 1.0, 9.0, 60)
    calibrations.store(metered, "replay", fitted)
    with ControllerMeters([metered], tmp_path / "meters") as meters, engine(tmp_path, metered) as running:
        (received,) = run(running, rest(seconds=0.5))
        folder, _ = stored(tmp_path, [meters.complete(received)])
    (result,) = folder.rests()
    (trace,) = folder.with_power(result).measurement.power
    assert trace.calibration == fitted
    assert {row[2] for row in trace.rows} == {5.0}
    energy = gross(trace, [(0.1, 0.4)])
    assert (energy.joules, energy.point) == (pytest.approx(0.3 * (1.2 * 5.0 + 0.5)), "wall_ac")


def test_what_an_instrument_recorded_is_added_at_the_end_and_survives_in_the_folder(tmp_path, metered):
    export = tmp_path / "bench.csv"
    export.write_text("time,watts\n0,1.0\n1,1.0\n")
    choice = MeterChoice("csv", {"file": str(export), "time": "time", "watts": "watts"})
    both = replace(metered, meters=(*metered.meters, choice))
    folder = RunFolder.create(tmp_path / "runs", "run", record())
    with ControllerMeters([both], tmp_path / "meters") as meters, engine(tmp_path, both) as running:
        (received,) = run(running, rest(seconds=1.0))
        folder.record_result(meters.complete(received))
        begun = received.measurement.begun_unix_seconds
        rows = "".join(f"{begun - 1 + step / 10},9.0\n" for step in range(60))
        export.write_text(f"time,watts\n{rows}")
        meters.complete_later(folder)
    (stored,) = RunFolder(folder.path).rests()
    own, bench = folder.with_power(stored).measurement.power
    assert (own.meter, bench.meter, bench.point) == ("replay", "csv", "dc_input")
    energy = gross(bench, [(0.0, stored.measurement.seconds)])
    assert energy.joules == pytest.approx(9.0 * stored.measurement.seconds, rel=0.02)


# ── from the folder to the figures ───────────────────────────────────────────────────────────────────────────────────
def test_a_devices_energy_is_that_of_its_first_meter_by_phase_by_rail_and_net_of_rest(tmp_path, metered):
    folder = RunFolder.create(tmp_path / "runs", "run", record())
    steps = [["phase", "train"], ["take_time", 0.4]]
    work = [job(f"job-{number}", steps=steps, update={"a": [3]}) for number in range(2)]
    with engine(tmp_path, metered) as running:
        before, *results, after = run(running, rest(seconds=1.0), *work, replace(rest("rest-2", seconds=1.0), round=5))
    for each in (before, *results, after):
        folder.record_result(each)
    jobs = [each for each in folder.results() if each.job.startswith("job-")]
    summary = device_energy(folder, jobs, folder.rests())
    phases = [phase for each in jobs for phase in each.measurement.phases]
    seconds = sum(phase.seconds for phase in phases if phase.name != "idle")
    trained = sum(phase.seconds for phase in phases if phase.name == "train")
    assert trained > 2 * 0.4
    assert summary.gross.joules == pytest.approx(5.0 * seconds, rel=1e-3)
    assert summary.gross.replayed
    assert summary.phases["train"].joules == pytest.approx(5.0 * trained, rel=1e-3)
    assert summary.rails["PART"].joules == pytest.approx(2.0 * seconds, rel=1e-3)
    assert summary.idle.watts == pytest.approx(5.0, rel=1e-3)
    assert summary.net.joules == pytest.approx(0.0, abs=0.05)
    whole = run_energy({"a": summary, "b": summary})
    assert whole.gross.joules == pytest.approx(2 * summary.gross.joules)
    assert run_energy({"a": summary, "b": None}) is None


def test_jobs_without_samples_make_a_devices_energy_invalid_and_no_meter_makes_none(tmp_path, metered):
    folder = RunFolder.create(tmp_path / "runs", "run", record())
    with engine(tmp_path, metered) as running:
        (result,) = run(running, job(steps=[["phase", "train"]]))
    bare = replace(result, job="job-2", measurement=replace(result.measurement, power=()))
    for each in (result, bare):
        folder.record_result(each)
    jobs = [each for each in folder.results() if each.job.startswith("job-")]
    assert "1 of 2 jobs brought no samples" in device_energy(folder, jobs, []).gross.problems
    assert device_energy(folder, [bare], []) is None


def job_of(number, *, boot=0.0, seconds=0.4, watts=5.0):
    """A job of `seconds` that began a second after the one before, with five samples; `boot`: when the clock was 0."""
    begun = 100.0 + number
    rows = tuple((0.1 * step - 0.05, 0.0, watts) for step in range(6))
    trace = PowerTrace("hwmon", "dc_input", ("VIN",), ("VIN",), ((0.01, 0.0, 0.0, 0.0),), 0.1, rows)
    measured = Measurement(
        (PhaseMeasurement("train", seconds, begun_seconds=0.0),), seconds, power=(trace,),
        begun_monotonic_seconds=begun - boot, begun_unix_seconds=1e9 + begun, clock_seconds=0.001,
    )  # fmt: skip
    return Result(f"job-{number}", 0, number, FINISHED, "board", measurement=measured)


def stored(tmp_path, results):
    folder = RunFolder.create(tmp_path / "runs", "run", record())
    for result in results:
        folder.record_result(result)
    return folder, [each for each in folder.results() if each.job.startswith("job-")]


def test_few_samples_in_each_of_many_jobs_are_many_of_them_all(tmp_path):
    one = device_energy(*stored(tmp_path / "one", [job_of(0)]), []).gross
    many = device_energy(*stored(tmp_path / "many", [job_of(number) for number in range(30)]), []).gross
    assert not one.valid
    assert any("at least 10 are needed" in problem for problem in one.problems)
    assert many.valid
    assert (many.samples, many.joules) == (120, pytest.approx(30 * 0.4 * 5.0))
    assert many.longest_gap_seconds < 0.2


def test_a_board_that_was_restarted_is_added_up_across_its_clocks(tmp_path):
    """The second half counts from another zero, and would lie before the first."""
    jobs = [job_of(number) for number in range(15)] + [job_of(number, boot=90.0) for number in range(15, 30)]
    gross_energy = device_energy(*stored(tmp_path, jobs), []).gross
    assert (gross_energy.samples, gross_energy.joules) == (120, pytest.approx(30 * 0.4 * 5.0))
    assert gross_energy.valid


# ── a board with an accelerator of its own kernel's making ───────────────────────────────────────────────────────────
class Board:
    """What an agent reads of a Jetson, as files that a test moves on."""

    def __init__(self, root):
        self.root = root
        self.events = root / "sys/class/hwmon/hwmon1/oc1_event_cnt"
        self.events.parent.mkdir(parents=True)
        (self.events.parent / "name").write_text("soctherm_oc\n")
        self.events.write_text("0\n")
        (root / "proc").mkdir()
        self.holds(mebibytes=0)

    def holds(self, *, mebibytes, available=4000):
        kib = {"MemTotal": 8000 << 10, "MemAvailable": available << 10, "NvMapMemUsed": (100 + mebibytes) << 10}
        text = "".join(f"{name}: {value:10} kB\n" for name, value in kib.items())
        file = os.open(self.root / "proc/meminfo", os.O_WRONLY | os.O_CREAT)  # in place: an agent keeps it open
        os.write(file, text.encode())
        os.close(file)


@pytest.fixture
def board(tmp_path):
    return Board(tmp_path / "board")


def end_of_job(tmp_path, board, where, meanwhile, *, capped=False):
    """The result of a job in whose middle something happens to the board."""
    begun, over = tmp_path / "begun", tmp_path / "over"
    steps = [["phase", "train"], ["touch", str(begun)], ["wait_for", str(over)]]
    with engine(tmp_path, where, root=str(board.root), capped=capped) as running, ThreadPoolExecutor() as pool:
        ended = pool.submit(run, running, job(steps=steps))
        drills.wait_until(begun.exists)
        meanwhile(over)
        (result,) = ended.result()
    return result


@pytest.mark.cgroup
def test_what_the_kernel_cannot_hold_to_its_budget_the_agent_ends(tmp_path, board):
    where = replace(device(), accelerator="cuda")
    result = end_of_job(tmp_path, board, where, lambda _: board.holds(mebibytes=200), capped=True)
    assert result.outcome == OVER_BUDGET
    assert result.phase == "train"
    assert "200.0 MiB on the accelerator (nvmap_delta), the budget is 64.0 MiB" in result.error
    assert result.measurement.phases[-1].peak.accelerator_bytes == 200 * drills.MIB


def test_a_board_that_is_about_to_run_out_of_memory_loses_its_trainer_and_not_its_life(tmp_path, board):
    where = replace(device(), accelerator="cuda")
    result = end_of_job(tmp_path, board, where, lambda _: board.holds(mebibytes=10, available=20))
    assert result.outcome == OVER_BUDGET
    assert "the board was about to run out of memory in phase train" in result.error


def test_a_board_that_was_held_back_during_a_job_says_so_and_its_energy_is_not_valid(tmp_path, board, metered):
    def held_back(over):
        board.events.write_text("3\n")
        over.touch()

    result = end_of_job(tmp_path, board, metered, held_back)
    assert result.outcome == FINISHED
    (word,) = result.measurement.conditions.throttled
    folder = RunFolder.create(tmp_path / "runs", "run", record())
    folder.record_result(result)
    (stored,) = folder.results()
    problems = device_energy(folder, [stored], []).gross.problems
    assert any(word in problem for problem in problems)
