"""A recorded trace is played as a meter reads: between its rows, over and over, with what is known of it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from testbed.config import load_inventory
from testbed.errors import ConfigError, MeterError, UsageError
from testbed.meters import BOARD, Accuracy, make, replay

INVENTORY = Path(__file__).parents[2] / "inventory"
TRACES = INVENTORY / "traces"

RECORDED = """\
# recorded on the bench
# point: dc_input
# total_rails: IN
# interval_seconds: 1
# gain: 0.02
# step_watts: 0.04
seconds,IN,SOC
10.0,4.0,1.0
11.0,6.0,1.5
12.0,6.0,1.5
"""


@pytest.fixture
def clock(monkeypatch):
    """The time that the meter sees, as the test sets it."""
    now = [1000.0]
    monkeypatch.setattr(replay, "_clock", lambda: now[0])
    return now


@pytest.fixture
def playing(tmp_path):
    """A meter that plays this text."""

    def play(text, **settings):
        path = tmp_path / "trace.csv"
        path.write_text(text)
        meter = make("replay", {"file": str(path), **settings})
        meter.open()
        return meter

    return play


def test_it_plays_from_its_first_row_on_in_straight_lines(playing, clock):
    meter = playing(RECORDED)
    assert meter.read().watts == (4.0, 1.0)
    clock[0] += 0.5
    assert meter.read().watts == (5.0, 1.25)
    clock[0] += 1.5
    assert meter.read().watts == (6.0, 1.5)


def test_it_says_what_the_trace_says_and_that_nothing_was_measured(playing):
    meter = playing(RECORDED)
    assert (meter.rails, meter.total_rails, meter.point) == (("IN", "SOC"), ("IN",), "dc_input")
    assert meter.accuracy == (Accuracy(0.02, step_watts=0.04),) * 2
    assert meter.replayed
    assert meter.where == BOARD
    assert not meter.has_counters
    assert meter.read().joules is None


def test_what_a_trace_does_not_say_is_assumed_with_care(playing):
    meter = playing("seconds,IN\n0,1\n1,1\n")
    assert (meter.point, meter.total_rails, meter.accuracy) == ("module_rail", (), (Accuracy(0.05),))


def test_at_its_end_it_starts_again_only_if_it_may(playing, clock):
    once, again = playing(RECORDED), playing(RECORDED, repeat=True)
    clock[0] += 2.5  # the recording has two seconds
    assert again.read().watts == (5.0, 1.25)
    with pytest.raises(MeterError, match=r"ended after 2 s; set `repeat: true`"):
        once.read()


def test_opened_again_it_plays_from_the_start(playing, clock):
    meter = playing(RECORDED)
    clock[0] += 100
    meter.close()
    meter.open()
    assert meter.read().watts == (4.0, 1.0)


def test_the_samples_that_a_run_keeps_are_a_trace(playing, clock):
    kept = "# interval_seconds: 0.1\nseconds,clock_seconds,IN_watts,IN_joules\n-0.1,0.0,2.0,0.0\n0.1,0.0,4.0,0.6\n"
    meter = playing(kept)
    clock[0] += 0.1
    assert meter.rails == ("IN",)
    assert meter.read().watts == (pytest.approx(3.0),)


def test_a_gap_in_the_recording_stays_a_gap(playing, clock):
    meter = playing("# interval_seconds: 0.1\nseconds,IN\n0.0,1\n0.1,1\n5.0,9\n5.1,9\n")
    clock[0] += 2
    with pytest.raises(MeterError, match=r"a gap of 4\.9 s"):
        meter.read()
    clock[0] += 3.05
    assert meter.read().watts == (9.0,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "fewer than two rows"),
        ("seconds,IN\n0,1\n", "fewer than two rows"),
        ("time,IN\n0,1\n1,1\n", "expected a header such as seconds"),
        ("seconds\n0\n1\n", "expected a header such as seconds"),
        ("seconds,IN\n0,1\n1,lots\n", r"line 3: expected 2 numbers \(seconds,IN\), got '1,lots'"),
        ("seconds,IN\n0,1\n1\n", "line 3: expected 2 numbers"),
        ("seconds,IN\n0,1\n0,2\n", "line 3: expected finite numbers at growing times"),
        ("seconds,IN\n0,1\n1,nan\n", "line 3: expected finite numbers"),
        ("# point: wall\nseconds,IN\n0,1\n1,1\n", "point: expected one of wall_ac"),
        ("# total_rails: OUT\nseconds,IN\n0,1\n1,1\n", "there is no rail 'OUT'; there are IN"),
        ("# gain: 2 %\nseconds,IN\n0,1\n1,1\n", "gain: expected a number from 0 up, got '2 %'"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_the_place(playing, text, said):
    with pytest.raises(MeterError, match=said):
        playing(text)


def test_a_trace_that_is_not_where_the_agent_runs_says_so(tmp_path):
    with pytest.raises(MeterError, match=r"elsewhere\.csv is not on this machine, .* where the agent runs"):
        make("replay", {"file": str(tmp_path / "elsewhere.csv")}).open()


def test_an_unknown_packaged_trace_names_those_there_are():
    with pytest.raises(MeterError, match="there are: jetson_orin_nano, raspberry_pi_5"):
        make("replay", {"trace": "jetson_nano"}).open()


@pytest.mark.parametrize("settings", [{}, {"file": "a.csv", "trace": "a"}])
def test_it_needs_a_file_or_a_trace(settings):
    with pytest.raises(UsageError, match="either a file or a packaged trace"):
        make("replay", settings)


def test_an_inventory_without_either_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "lab.yaml").write_text(
        "devices:\n  one: {kind: emulated, profile: jetson_nano_4gb, budget: {memory: 1 GiB}, meter: replay}\n"
    )
    with pytest.raises(ConfigError, match=r"lab\.yaml: devices\.one\.meter\.replay: .*a file or a packaged trace"):
        load_inventory(tmp_path / "lab.yaml")


def test_the_metered_inventory_plays_what_is_packaged_at_one_point():
    for device in load_inventory(INVENTORY / "emulated-metered.yaml"):
        (choice,) = device.meters
        assert choice.point == "dc_input"
        meter = make(choice.name, choice.settings)
        meter.open()
        watts = dict(zip(meter.rails, meter.read().watts, strict=True))
        assert 1 < sum(watts[rail] for rail in meter.total_rails) < 20


def test_it_has_the_devices_of_the_emulated_inventory():
    def devices(name):
        return [(d.name, d.profile, d.budget, d.clients, d.threads, d.tags) for d in load_inventory(INVENTORY / name)]

    assert devices("emulated-metered.yaml") == devices("emulated.yaml")


def test_the_packaged_traces_are_made_by_their_script_and_say_that_they_are_synthetic(tmp_path):
    runpy.run_path(str(TRACES / "make_traces.py"))["main"](tmp_path)
    packaged = sorted(TRACES.glob("*.csv"))
    assert [path.name for path in packaged] == sorted(path.name for path in tmp_path.iterdir())
    for path in packaged:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
        assert path.read_text().startswith("# synthetic, recorded on no board")
        assert f"{path.name:<22} synthetic, recorded on no board" in (TRACES / "SOURCES").read_text()
