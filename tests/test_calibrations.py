"""Calibrations: seconds that two meters share, the line through them, and the store."""

from __future__ import annotations

import dataclasses
import math
from random import Random

import pytest

from testbed import calibrations, fact_sheets
from testbed.calibrations import Reference, calibration_of, fitted, means_by_second, pairs_of
from testbed.errors import MeterError
from testbed.inventory import Access
from testbed.meters import Accuracy
from tests.drills import device

PLUG = Reference("shelly", "wall_ac", Accuracy(0.01, 0.02, 0.1))


def series(watts, seconds, spacing=0.1, begin=0.0):
    count = round(seconds / spacing) + 1
    return [(begin + step * spacing, watts(begin + step * spacing)) for step in range(count)]


# ── seconds ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_second_is_the_mean_of_straight_lines():
    found = means_by_second(series(lambda at: 2 * at + 1, 4.0, spacing=0.25, begin=-0.5))
    assert found == {0: 2.0, 1: 4.0, 2: 6.0}


def test_only_seconds_that_samples_enclose_count():
    assert means_by_second([(0.2, 1.0), (2.9, 1.0)]) == {1: 1.0}
    assert means_by_second([(0.2, 1.0), (0.9, 1.0)]) == {}
    assert means_by_second([(0.2, 1.0)]) == {}


def test_seconds_of_a_gap_are_left_out():
    samples = [(at, watts) for at, watts in series(lambda _: 5.0, 20.0) if not 4.05 < at < 9.95]
    assert sorted(means_by_second(samples)) == [0, 1, 2, 3, *range(10, 20)]


def test_two_meters_of_different_rates_share_seconds():
    quick, slow = series(lambda at: 5 + at, 10.0), series(lambda at: 2 * (5 + at), 10.0, spacing=1.0, begin=2.5)
    pairs = pairs_of(quick, slow)
    assert len(pairs) == 7
    assert all(theirs == pytest.approx(2 * ours) for ours, theirs in pairs)


# ── the line ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def drawn(gain, offset, noise, count=120, span=(3.0, 9.0), seed=0):
    draw = Random(seed)
    watts = [draw.uniform(*span) for _ in range(count)]
    return [(each, gain * each + offset + draw.gauss(0, noise)) for each in watts]


def test_a_known_line_is_found_again():
    found = fitted(drawn(1.145, 0.588, 0.0), PLUG)
    assert (found.gain, found.offset_watts) == pytest.approx((1.145, 0.588))
    assert found.residual_watts == pytest.approx(0.0, abs=1e-9)
    assert (found.reference, found.point, found.samples) == ("shelly", "wall_ac", 120)
    assert 3.0 <= found.lowest_watts < found.highest_watts <= 9.0


def test_what_is_left_is_a_half_width_at_95_percent():
    pairs = drawn(1.1, 0.5, 0.2, count=2000)
    found = fitted(pairs, PLUG)
    within = [abs(their - found.gain * ours - found.offset_watts) <= found.residual_watts for ours, their in pairs]
    assert sum(within) / len(within) == pytest.approx(0.95, abs=0.015)


def test_the_references_offset_and_step_count_at_its_lowest_power():
    found = fitted([(1.0 + step / 10, 2.0 + step / 10) for step in range(40)], PLUG)
    assert found.reference_gain == pytest.approx(0.01 + (0.02 + 0.05) / 2.0)


def test_where_the_power_hardly_moved_only_an_offset_is_fitted():
    found = fitted(drawn(1.3, 0.0, 0.01, span=(5.0, 5.5)), PLUG)
    assert found.gain == 1.0
    assert found.offset_watts == pytest.approx(0.3 * 5.25, abs=0.05)


def test_a_little_more_movement_gives_a_gain():
    assert fitted(drawn(1.3, 0.0, 0.001, span=(5.0, 6.2)), PLUG).gain == pytest.approx(1.3, abs=0.01)


def test_too_few_seconds():
    with pytest.raises(MeterError, match="seen together in 29 seconds, and a calibration needs 30"):
        fitted(drawn(1.0, 0.0, 0.0, count=29), PLUG)
    assert fitted(drawn(1.0, 0.0, 0.0, count=30), PLUG).samples == 30


def test_meters_of_different_things():
    draw = Random(1)
    pairs = [(draw.uniform(3, 9), draw.uniform(3, 9)) for _ in range(100)]
    with pytest.raises(MeterError, match="do not move together"):
        fitted(pairs, PLUG)
    with pytest.raises(MeterError, match="do not move together"):
        fitted([(ours, 20 - ours) for ours, _ in pairs], PLUG)
    with pytest.raises(MeterError, match="do not move together"):
        fitted([(ours, 7.0) for ours, _ in pairs], PLUG)


def test_a_reference_that_is_off():
    with pytest.raises(MeterError, match="told 0 W: is the device plugged into it"):
        fitted([(5.0, 0.0)] * 40, PLUG)


# ── the store ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("TESTBED_DATA", str(tmp_path))
    return tmp_path


BOARD = dataclasses.replace(device("pi"), kind="raspberry_pi", access=Access("pi.lan"))


def provisioned(model):
    fact_sheets.store("pi", {"host": "pi.lan", "board": {"model": model}})


def test_it_is_kept_for_device_and_meter(data):
    assert calibration_of(BOARD, "rpi_pmic") is None
    made = fitted(drawn(1.1, 0.5, 0.1), PLUG)
    calibrations.store(BOARD, "rpi_pmic", made)
    assert calibration_of(BOARD, "rpi_pmic") == made
    assert calibration_of(BOARD, "ina3221") is None
    assert calibration_of(dataclasses.replace(BOARD, name="other"), "rpi_pmic") is None
    assert (data / "calibrations/pi.rpi_pmic.json").exists()
    assert calibrations.forget(BOARD, "rpi_pmic")
    assert calibration_of(BOARD, "rpi_pmic") is None
    assert not calibrations.forget(BOARD, "rpi_pmic")


def test_it_does_not_hold_for_another_board():
    provisioned("Raspberry Pi 5 Model B Rev 1.0")
    calibrations.store(BOARD, "rpi_pmic", fitted(drawn(1.1, 0.5, 0.1), PLUG))
    assert calibration_of(BOARD, "rpi_pmic") is not None
    provisioned("Raspberry Pi 5 Model B Rev 1.1")
    assert calibration_of(BOARD, "rpi_pmic") is None
    elsewhere = dataclasses.replace(BOARD, access=Access("pi-2.lan"))
    assert calibration_of(elsewhere, "rpi_pmic") is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"board": {"host": "pi.lan", "profile": "test"}, "calibration": {"gain": 1}}']
)
def test_a_file_that_is_none_counts_as_none(data, text):
    (data / "calibrations").mkdir()
    (data / "calibrations/pi.rpi_pmic.json").write_text(text)
    assert calibration_of(BOARD, "rpi_pmic") is None


def test_numbers_survive_the_store():
    made = dataclasses.replace(fitted(drawn(1.1, 0.5, 0.1), PLUG), gain=math.pi)
    calibrations.store(BOARD, "rpi_pmic", made)
    assert calibration_of(BOARD, "rpi_pmic") == made
