"""Energy from samples: exact cases, what widens an interval, what makes a figure invalid, sums, idle and net."""

import importlib.util
import math
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from testbed.energy import UNRESOLVED, Energy, across, added, idle_power, net, with_conditions
from testbed.measurement import Calibration, Conditions, PowerTrace
from testbed.meters import Accuracy
from testbed.power_integral import LEAST_SAMPLES, gross

PERFECT = Accuracy(0.0)
INTERVAL = 0.1


def times(begin, end, interval=INTERVAL):
    return [round(begin + number * interval, 6) for number in range(round((end - begin) / interval) + 1)]


def trace_of(rows, *, accuracy=PERFECT, **changes):
    """One rail, "IN", the whole at the DC input, where nothing else is said."""
    given = {
        "meter": "ina226",
        "point": "dc_input",
        "rails": ("IN",),
        "total_rails": ("IN",),
        "interval_seconds": INTERVAL,
    }
    given |= {"accuracy": (accuracy,) if isinstance(accuracy, Accuracy) else accuracy}
    return PowerTrace(**{**given, "rows": tuple(tuple(row) for row in rows), **changes})


def sampled(power, begin=-1.0, end=31.0, **changes):
    """Samples of a function of time, evenly spaced, beyond the usual window of (0, 30) on both sides."""
    return trace_of([(at, 0.0, power(at)) for at in times(begin, end)], **changes)


def square(at):
    """A second at 5 W, two at 10 W, changing between two samples."""
    return 5.0 if (at + 0.05) % 3 < 1 else 10.0


WINDOW = [(0.0, 30.0)]


# ------------------------------------------------------------------------------------------------------------- figures
def test_constant_power():
    energy = gross(sampled(lambda at: 8.0), WINDOW)
    assert energy.joules == pytest.approx(240.0)
    assert (energy.half_width_joules, energy.valid, energy.notes) == (0.0, True, ())
    assert (energy.seconds, energy.samples, energy.highest_watts) == (30.0, 301, 8.0)
    assert energy.longest_gap_seconds == pytest.approx(INTERVAL)
    assert energy.mean_watts == pytest.approx(8.0)
    assert (energy.meter, energy.point, energy.replayed) == ("ina226", "dc_input", False)


def test_a_step_at_a_sample_is_a_line_from_the_sample_before():
    energy = gross(sampled(lambda at: 5.0 if at < 15 else 10.0), WINDOW)
    assert energy.joules == pytest.approx(15 * 5 + 15 * 10 + 5 * INTERVAL / 2)
    assert energy.low_joules < 15 * 5 + 15 * 10 < energy.high_joules


def test_a_ramp_is_exact():
    assert gross(sampled(lambda at: 2 + at / 3), WINDOW).joules == pytest.approx(2 * 30 + 30 * 30 / 6)


@pytest.mark.parametrize(("begin", "end"), [(0.25, 20.15), (3.0, 17.0), (4.01, 4.99 + 10)])
def test_windows_are_clipped_by_interpolation(begin, end):
    energy = gross(sampled(lambda at: 2 * at + 5), [(begin, end)])
    assert energy.joules == pytest.approx(end**2 - begin**2 + 5 * (end - begin))


def test_only_samples_inside_count():
    assert gross(sampled(lambda at: 8.0), [(0.05, 5.05), (10.05, 11.05)]).samples == 60


def test_rows_may_come_in_any_order():
    trace = sampled(square)
    assert gross(replace(trace, rows=trace.rows[::-1]), WINDOW) == gross(trace, WINDOW)


def test_a_trace_that_travelled_gives_the_same():
    trace = sampled(square, accuracy=Accuracy(0.01, 0.02, 0.04, 0.01))
    assert gross(PowerTrace.from_json(asdict(trace)), WINDOW) == gross(trace, WINDOW)


# ------------------------------------------------------------------------------------------------------------- rails
RAILS = {
    "rails": ("VDD_IN", "VDD_CPU", "VDD_SOC"),
    "accuracy": (Accuracy(0.01, 0.02), Accuracy(0.02, 0.01), Accuracy(0.03)),
}


def three_rails(**changes):
    rows = [(at, 0.0, 8.0, 3.0, 2.0) for at in times(-1, 31)]
    return trace_of(rows, **{**RAILS, "total_rails": ("VDD_IN",), **changes})


def test_the_whole_is_what_the_profile_says():
    assert gross(three_rails(), WINDOW).joules == pytest.approx(240)
    both = gross(three_rails(total_rails=("VDD_CPU", "VDD_SOC")), WINDOW)
    assert both.joules == pytest.approx(150)
    assert both.gain_joules == pytest.approx(90 * 0.02 + 60 * 0.03)  # each rail by its own class
    assert both.offset_joules == pytest.approx(0.01 * 30)


def test_a_rail_alone():
    energy = gross(three_rails(), WINDOW, "VDD_SOC")
    assert (energy.joules, energy.gain_joules) == (pytest.approx(60), pytest.approx(1.8))


def test_a_meter_without_a_whole_has_rails_only():
    trace = three_rails(total_rails=())
    energy = gross(trace, WINDOW)
    assert (energy.joules, energy.claim, energy.valid) == (None, None, False)
    assert "no rail, nor a sum of rails, is the whole at dc_input" in energy.problems[0]
    assert "VDD_IN, VDD_CPU, VDD_SOC" in energy.problems[0]
    assert gross(trace, WINDOW, "VDD_CPU").valid


def test_a_rail_that_is_not_there():
    with pytest.raises(ValueError, match='ina226 has no rail "GPU"; it has VDD_IN'):
        gross(three_rails(), WINDOW, "GPU")


# -------------------------------------------------------------------------------------------------- nothing can be said
def test_no_sample_is_not_zero_joules():
    energy = gross(sampled(lambda at: 8.0), [(0.01, 0.09)])
    assert (energy.joules, energy.half_width_joules, energy.mean_watts) == (None, 0.0, None)
    assert (energy.low_joules, energy.high_joules) == (None, None)
    assert energy.problems == ("no sample in 0.1 s",)
    assert gross(trace_of([]), WINDOW).joules is None


def test_no_window_has_no_energy():
    energy = gross(sampled(lambda at: 8.0), [])
    assert (energy.joules, energy.problems) == (None, ("there is no window",))


def test_a_window_that_ends_before_it_begins():
    with pytest.raises(ValueError, match="ends before it begins"):
        gross(sampled(lambda at: 8.0), [(5.0, 4.0)])


# ------------------------------------------------------------------------------------------------------ the half-widths
def test_the_class_of_the_meter():
    energy = gross(sampled(lambda at: 8.0, accuracy=Accuracy(0.01, 0.02)), WINDOW)
    assert (energy.gain_joules, energy.offset_joules) == (pytest.approx(2.4), pytest.approx(0.6))
    assert energy.systematic_joules == pytest.approx(3.0)  # gain and offset add, as a class is told
    assert energy.half_width_joules == pytest.approx(3.0)
    assert energy.claim == pytest.approx(3.0 / 240)
    assert energy.low_joules == pytest.approx(237)
    assert energy.high_joules == pytest.approx(243)


def test_a_coarse_step_is_half_a_step_on_one_level_and_less_on_many():
    coarse = Accuracy(0.0, step_watts=0.4)
    one = gross(sampled(lambda at: 8.0, accuracy=coarse), WINDOW)
    assert one.other_joules == pytest.approx(0.2 * 30)
    many = gross(sampled(lambda at: round((5 + at / 10) / 0.4) * 0.4, accuracy=coarse), WINDOW)
    two = gross(sampled(lambda at: 8.0 if at < 15 else 8.4, accuracy=coarse), WINDOW)
    assert many.other_joules < two.other_joules < one.other_joules
    assert two.other_joules == pytest.approx(0.4 * 1.96 / math.sqrt(12) * math.sqrt(0.5) * 30, rel=0.01)


def test_steps_of_rails_that_are_added_up_are_independent():
    rows = [(at, 0.0, 8.0, 4.0) for at in times(-1, 31)]
    rails = {
        "rails": ("A", "B"),
        "total_rails": ("A", "B"),
        "accuracy": (Accuracy(0.0, 0.0, 0.3), Accuracy(0.0, 0.0, 0.4)),
    }
    assert gross(trace_of(rows, **rails), WINDOW).other_joules == pytest.approx(0.25 * 30)


def test_a_late_sensor_counts_at_both_edges_by_the_change_of_power_there():
    def power(at):
        return 8.0 if 0 <= at < 30 else 3.0

    late = gross(sampled(power, accuracy=Accuracy(0.0, timing_seconds=0.02)), WINDOW)
    in_time = gross(sampled(power), WINDOW)
    assert late.other_joules**2 - in_time.other_joules**2 == pytest.approx((2 * 0.02 * 5) ** 2)
    assert gross(sampled(lambda at: 8.0, accuracy=Accuracy(0.0, timing_seconds=0.02)), WINDOW).other_joules == 0


def test_a_change_that_is_as_far_from_the_edge_as_the_sensor_lags_counts_too():
    energy = gross(sampled(lambda at: 3.0 if at < 0.5 else 8.0, accuracy=Accuracy(0.0, timing_seconds=0.6)), WINDOW)
    assert energy.other_joules == pytest.approx(0.6 * 5)


def test_a_clock_that_is_known_only_so_well_counts_the_same():
    def power(at):
        return 8.0 if 0 <= at < 30 else 3.0

    unsure = gross(sampled(power, timing_seconds=0.2), WINDOW)
    assert unsure.other_joules**2 - gross(sampled(power), WINDOW).other_joules ** 2 == pytest.approx((2 * 0.2 * 5) ** 2)


def test_a_jump_at_an_edge_between_two_samples():
    def power(at):
        return 8.0 if 0.05 <= at < 29.95 else 3.0

    energy = gross(sampled(power), [(0.03, 29.97)])
    # Of each gap 0.07 s lie in the window; a jump at its very edge is off by ΔP · 0.07² / (2 · 0.1).
    assert energy.other_joules == pytest.approx(2 * 5 * 0.07**2 / 0.2)
    # By chance it may also lie outside the window: up to a third of the square, not a twelfth.
    variance = 2 * (5 * 0.07) ** 2 * (4 - 3 * 0.7) / 12
    assert energy.random_joules == pytest.approx(2.2 * (1 + 2 / energy.samples) * math.sqrt(variance))
    assert energy.low_joules <= 8 * 29.94 <= energy.high_joules


def test_windows_that_touch_have_no_edges_between_them():
    def power(at):
        return 8.0 if at < 14.95 else 3.0

    trace = sampled(power, timing_seconds=0.01)
    assert gross(trace, [(0.0, 14.97), (14.9701, 30.0)]).other_joules == gross(trace, WINDOW).other_joules == 0
    assert gross(trace, [(0.0, 14.97)]).other_joules > 0
    assert gross(trace, [(15.0, 30.0), (0.0, 15.0)]).samples == gross(trace, WINDOW).samples


def test_one_step_costs_its_height_times_the_gap():
    energy = gross(sampled(lambda at: 5.0 if at < 15 else 10.0), WINDOW)
    assert energy.random_joules == pytest.approx(2.2 * (1 + 2 / 301) * 5 * INTERVAL / math.sqrt(12))


def test_a_sample_that_sticks_out_was_met_by_chance():
    flat = gross(sampled(lambda at: 5.0), WINDOW)
    pulse = gross(sampled(lambda at: 10.0 if 14.95 < at < 15.05 else 5.0), WINDOW)
    assert flat.random_joules == 0
    # By itself (ΔP·Δt)² and two half steps; with two hits more of the same kind, which may have been missed.
    variance = (5 * INTERVAL) ** 2 * (1 + 2 / 12 + 2)
    assert pulse.random_joules == pytest.approx(2.2 * (1 + 2 / 301) * math.sqrt(variance))


def test_readings_at_random_have_the_half_width_of_their_mean():
    chance = random.Random(1)
    readings = {at: chance.gauss(10, 1.0) for at in times(-1, 31)}
    energy = gross(sampled(readings.__getitem__), WINDOW)
    assert energy.random_joules == pytest.approx(2.2 * 1.0 * INTERVAL * math.sqrt(300), rel=0.25)


# --------------------------------------------------------------------------------------------------------- resolution
def test_levels_that_last_are_resolved_and_may_be_claimed():
    energy = gross(sampled(square, accuracy=Accuracy(0.001)), WINDOW)
    assert (energy.valid, energy.notes, energy.unresolved_joules) == (True, (), 0.0)
    assert energy.claim <= 0.02


def short_dips(at):
    """A dip of 0.23 s every three seconds, of which two samples tell."""
    return 5.0 if (at + 0.05) % 3 < 0.23 else 10.0


@pytest.mark.parametrize(
    ("power", "changes", "window", "why"),
    [
        (short_dips, {}, WINDOW, "the power changes within 3 intervals of 0.1 s"),
        (square, {}, [(0.0, 9.5)], "fewer than 100 samples"),
        (square, {"accuracy": Accuracy(0.001, timing_seconds=0.5)}, WINDOW, "a reading may be 0.5 s old"),
    ],
)
def test_what_may_lie_between_the_samples_is_never_claimed_within_two_percent(power, changes, window, why):
    energy = gross(sampled(power, **{"accuracy": Accuracy(0.001), **changes}), window)
    assert energy.valid
    assert energy.notes[0].startswith(f"unresolved: {why}")
    assert energy.claim >= UNRESOLVED > 0.02
    many = added([energy] * 400)
    assert many.claim >= UNRESOLVED
    assert many.notes == energy.notes
    assert across([energy] * 400).claim >= UNRESOLVED


def test_a_look_of_the_sensor_that_is_read_again_is_one_look():
    """New readings come every half second, and are read every tenth."""
    chance = random.Random(1)
    readings = [chance.gauss(10, 1.0) for _ in range(70)]
    held = {at: readings[int((at + 1) / 0.5 + 1e-6)] for at in times(-1, 31)}
    energy = gross(sampled(held.__getitem__, accuracy=Accuracy(0.0, timing_seconds=0.5)), WINDOW)
    assert energy.random_joules == pytest.approx(2.2 * 1.0 * 0.5 * math.sqrt(60), rel=0.4)


def test_a_stop_on_the_way_is_a_level_too():
    def stairs(at):
        at = (at + 0.05) % 6
        return 5.0 if at < 3 else 7.5 if at < 3.1 else 10.0

    assert gross(sampled(stairs), WINDOW).notes


def test_small_changes_are_one_level():
    assert not gross(sampled(lambda at: 10.0 + 0.15 * (round(at / INTERVAL) % 2)), WINDOW).notes
    assert gross(sampled(lambda at: 10.0 + 0.60 * (round(at / INTERVAL) % 2)), WINDOW).notes


def test_the_edge_of_a_window_cuts_no_level_short():
    assert not gross(sampled(square), [(0.85, 21.15)]).notes  # 0.1 s and 0.2 s of a level at the edges


def test_the_ends_of_a_trace_cut_levels_that_may_have_lasted():
    assert not gross(sampled(lambda at: 5.0 if at < 0.05 or at > 29.95 else 10.0, 0.0, 30.0), WINDOW).notes


def test_a_short_level_elsewhere_in_the_trace_does_not_matter():
    def power(at):
        return 10.0 if 25 <= at < 25.1 else 5.0

    trace = sampled(power)
    assert not gross(trace, [(0.0, 20.0)]).notes
    assert gross(trace, WINDOW).notes


# ------------------------------------------------------------------------------------------------------------ verdicts
def test_too_few_samples():
    seconds = (LEAST_SAMPLES - 2) * INTERVAL
    energy = gross(sampled(lambda at: 8.0), [(0.0, seconds)])
    assert energy.joules == pytest.approx(8.0 * seconds)
    assert energy.problems == (
        "9 samples in 0.8 s, at least 10 are needed: longer jobs, or a shorter interval than 0.1 s",
    )
    assert gross(sampled(lambda at: 8.0), [(0.0, seconds + INTERVAL)]).valid


def without(trace, begin, end):
    return replace(trace, rows=tuple(row for row in trace.rows if not begin < row[0] < end))


def later(seconds):
    """Samples from so long after 10 s on, until 11 s."""
    return [(at, 0.0, square(at)) for at in times(10 + seconds, 10.95)]


def test_a_gap_of_more_than_three_intervals():
    trace = sampled(square)
    three, more = (
        replace(trace, rows=(*without(trace, 10.0, 11.0).rows, *late)) for late in (later(0.29), later(0.31))
    )
    assert gross(three, WINDOW).valid
    energy = gross(more, WINDOW)
    assert energy.problems == ("no sample for 0.3 s, where one was to come every 0.1 s",)
    assert energy.longest_gap_seconds == pytest.approx(0.31)


def test_a_gap_outside_the_window_does_not_matter():
    assert gross(without(sampled(square), 22.0, 25.0), [(0.0, 20.0)]).valid


def test_up_to_an_interval_is_extrapolated_and_no_more():
    trace = sampled(square, begin=0.08)
    held = gross(trace, [(0.0, 20.0)])
    assert held.valid
    assert held.other_joules >= 0.08 * 5  # nothing says at which of the two levels it was
    energy = gross(sampled(square, begin=0.3), [(0.0, 20.0)])
    assert energy.problems == ("0.3 s at the edge of a window lie before the first sample or after the last",)
    assert energy.other_joules >= 0.3 * 10
    assert not gross(sampled(square, end=19.5), [(0.0, 20.0)]).valid


def with_clock(moved):
    return trace_of([(at, moved(at), 8.0) for at in times(-1, 31)])


def test_a_wall_clock_that_is_set():
    energy = gross(with_clock(lambda at: 0.0 if at < 10 else -1.5), WINDOW)
    assert energy.problems == ("the wall clock moved by -1.50 s against the monotonic one",)
    assert energy.joules == pytest.approx(240)
    assert gross(with_clock(lambda at: 0.0 if at < 10 else -1.5), [(15.0, 30.0)]).valid


def test_a_wall_clock_that_is_slewed_or_was_read_late_once_is_not_set():
    assert gross(with_clock(lambda at: 0.08 * at), WINDOW).valid
    every_second = replace(with_clock(lambda at: 0.08 * at), interval_seconds=1.0)
    assert gross(replace(every_second, rows=every_second.rows[::10]), WINDOW).valid
    late_once = with_clock(lambda at: 0.3 if at == 10 else 0.0)
    assert gross(late_once, WINDOW).valid
    assert gross(replace(late_once, timing_seconds=0.1), WINDOW).valid


def test_any_movement_counts_where_the_samples_have_a_clock_of_their_own():
    drifting = with_clock(lambda at: 0.01 * at)
    assert gross(replace(drifting, timing_seconds=0.5), WINDOW).valid
    energy = gross(replace(drifting, timing_seconds=0.1), WINDOW)
    assert energy.problems == ("the wall clock moved by +0.30 s against the monotonic one",)


def test_throttling_and_heat_make_an_energy_invalid():
    energy = gross(sampled(lambda at: 8.0), WINDOW)
    good = Conditions(begin_celsius=50.0, throttled=())
    assert with_conditions(energy, [good, Conditions()]) == energy  # nothing that tells is not throttling
    bad = [
        good,
        replace(good, throttled=("under_voltage", "thermal")),
        replace(good, throttled=("thermal",)),
        replace(good, begin_celsius=71.4, too_hot=True),
    ]
    found = with_conditions(replace(energy, problems=("a gap",)), bad)
    assert found.problems == (
        "a gap",
        "held back by thermal in 2 of 4 jobs",
        "held back by under_voltage in 1 of 4 jobs",
        "begun too hot in 1 of 4 jobs, at up to 71 °C: it did not cool down in time",
    )
    assert found.joules == energy.joules
    assert with_conditions(energy, [Conditions(too_hot=True)]).problems == (
        "begun too hot in the job: it did not cool down in time",
    )


# ------------------------------------------------------------------------------------------------------------- counters
def counted(power, joules, **changes):
    return trace_of([(at, 0.0, power(at), joules(at)) for at in times(-1, 31)], **changes)


def dips_joules(at):
    """The energy of `short_dips`, exactly."""
    whole, part = divmod(at + 0.05, 3)
    return whole * 28.85 + 5.0 * min(part, 0.23) + 10.0 * max(0.0, part - 0.23)


def test_a_counter_that_agrees_lifts_what_is_unresolved():
    alone = gross(sampled(short_dips), WINDOW)
    energy = gross(counted(short_dips, dips_joules), WINDOW)
    assert energy.valid
    assert energy.counter_joules == pytest.approx(288.5)
    assert energy.joules == energy.counter_joules
    assert energy.sampled_joules == alone.joules != energy.joules
    assert energy.random_joules < alone.random_joules
    assert (energy.unresolved_joules, energy.notes) == (0.0, ())
    assert energy.claim <= 0.02 < alone.claim


def test_a_counter_that_jumps_now_and_then_proves_nothing():
    energy = gross(counted(short_dips, lambda at: dips_joules(at // 7 * 7)), WINDOW)
    assert energy.valid
    assert energy.notes
    assert energy.joules == energy.sampled_joules != energy.counter_joules
    assert energy.claim >= UNRESOLVED


def test_a_counter_that_disagrees():
    energy = gross(counted(lambda at: 8.0, lambda at: 4.0 * at), WINDOW)
    assert energy.problems == ("its energy counter says 120.0 J and its samples 240.0 J",)
    assert energy.joules == energy.sampled_joules == pytest.approx(240)


def test_a_counter_that_went_back():
    energy = gross(counted(lambda at: 8.0, lambda at: 8.0 * at if at < 10 else 8.0 * (at - 10)), WINDOW)
    assert energy.problems == ("its energy counter went back: it was reset, or has lost power",)
    assert energy.counter_joules is None


# --------------------------------------------------------------------------------------------------------- calibration
CALIBRATION = Calibration(
    gain=1.1, offset_watts=0.5, residual_watts=0.1, reference="shelly", point="wall_ac", reference_gain=0.02,
    lowest_watts=4.0, highest_watts=9.5, samples=300,
)  # fmt: skip


def test_a_calibration_takes_the_place_of_the_class():
    trace = replace(sampled(lambda at: 8.0, accuracy=Accuracy(0.05, 0.1)), calibration=CALIBRATION)
    energy = gross(trace, WINDOW)
    assert energy.joules == pytest.approx((8 * 1.1 + 0.5) * 30)
    assert (energy.point, energy.meter, energy.valid) == ("wall_ac", "ina226", True)
    assert energy.gain_joules == pytest.approx(0.02 * energy.joules)
    assert (energy.offset_joules, energy.other_joules) == (0.0, pytest.approx(0.1 * 30))
    rail = gross(trace, WINDOW, "IN")
    assert (rail.joules, rail.point) == (pytest.approx(240), "dc_input")
    assert rail.gain_joules == pytest.approx(0.05 * 240)


def test_beyond_the_range_of_a_calibration_the_class_counts():
    trace = replace(sampled(lambda at: 12.0, accuracy=Accuracy(0.05)), calibration=CALIBRATION)
    energy = gross(trace, WINDOW)
    beyond = 12 * 1.1 + 0.5 - 9.5
    assert energy.other_joules == pytest.approx((0.1 + 0.05 * beyond) * 30)
    assert energy.problems == (
        "13.7 W in the mean, where the calibration saw 4.0 to 9.5 W: calibrate again under this load",
    )


def test_counters_are_calibrated_too():
    trace = replace(counted(short_dips, dips_joules), calibration=replace(CALIBRATION, highest_watts=20.0))
    assert gross(trace, WINDOW).counter_joules == pytest.approx(288.5 * 1.1 + 0.5 * 30)


# ---------------------------------------------------------------------------------------------------------- identities
def bursts(seed):
    chance = random.Random(seed)
    rows, at, left, watts = [], -1.0, 0, 5.0
    while at < 31:
        if left == 0:
            left, watts = chance.randint(1, 12), chance.uniform(3, 12)
        rows.append((round(at, 4), 0.0, watts))
        at, left = at + INTERVAL * chance.uniform(0.2, 1.8), left - 1
    return trace_of(rows, accuracy=Accuracy(0.01, 0.02, 0.01, 0.01))


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_of_a_window_give_the_whole(seed):
    trace, middle = bursts(seed), random.Random(seed).uniform(5, 25)
    whole = gross(trace, WINDOW)
    parts = added([gross(trace, [(0.0, middle)]), gross(trace, [(middle, 30.0)])])
    windows = gross(trace, [(0.0, middle), (middle, 30.0)])
    for name in ("joules", "gain_joules", "offset_joules", "seconds", "samples"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name))
        assert getattr(windows, name) == pytest.approx(getattr(whole, name))
    assert parts.half_width_joules >= whole.half_width_joules * 0.99  # edges that are none do not help
    assert windows.half_width_joules == pytest.approx(whole.half_width_joules)


@pytest.mark.parametrize("seed", range(5))
def test_twice_the_power_is_twice_the_energy(seed):
    trace = bursts(seed)
    double = [Accuracy(*each) for each in trace.accuracy]
    double = tuple(each._replace(offset_watts=each.offset_watts * 2, step_watts=each.step_watts * 2) for each in double)
    twice = replace(trace, accuracy=double, rows=tuple((at, moved, 2 * watts) for at, moved, watts in trace.rows))
    once, twice = gross(trace, WINDOW), gross(twice, WINDOW)
    for name in ("joules", "gain_joules", "offset_joules", "other_joules", "random_joules", "unresolved_joules"):
        assert getattr(twice, name) == pytest.approx(2 * getattr(once, name))
    assert twice.claim == pytest.approx(once.claim)
    assert (twice.notes, twice.problems) == (once.notes, once.problems)


@pytest.mark.parametrize("seed", range(5))
def test_the_time_of_day_does_not_matter(seed):
    trace = bursts(seed)
    later = replace(trace, rows=tuple((at + 512, *rest) for at, *rest in trace.rows))
    moved, found = gross(later, [(512.0, 542.0)]), gross(trace, WINDOW)
    assert (moved.samples, moved.notes, moved.problems) == (found.samples, found.notes, found.problems)
    for name in ("joules", "gain_joules", "other_joules", "random_joules", "longest_gap_seconds"):
        assert getattr(moved, name) == pytest.approx(getattr(found, name))


@pytest.mark.parametrize("seed", range(5))
def test_a_longer_gap_never_narrows_the_interval(seed):
    """Levels far apart on either side, so that no sample that is left out was the only one to show anything."""
    at = random.Random(seed).uniform(10, 20)
    trace = sampled(lambda t: square(t) if not at - 2 < t < at + 2 else 5.0, accuracy=Accuracy(0.01))
    widths = [
        gross(without(trace, at - half, at + half), WINDOW).half_width_joules for half in (0, 0.12, 0.2, 0.5, 1, 1.8)
    ]
    assert widths == sorted(widths)
    assert widths[-1] > 2 * widths[0]


# ---------------------------------------------------------------------------------------------------------------- sums
def an_energy(joules=100.0, **changes):
    given = {"seconds": 20.0, "samples": 200, "gain_joules": 1.0, "offset_joules": 0.5, "other_joules": 2.0,
             "random_joules": 3.0, "sampled_joules": joules, "longest_gap_seconds": 0.2, "highest_watts": 9.0,
             "point": "dc_input", "meter": "ina226"}  # fmt: skip
    return Energy(joules, **{**given, **changes})


def test_of_one_meter_what_is_systematic_adds_up_and_chance_does_not():
    whole = added([an_energy(), an_energy(200.0, longest_gap_seconds=0.7, highest_watts=4.0)])
    assert (whole.joules, whole.seconds, whole.samples) == (300, 40, 400)
    assert (whole.gain_joules, whole.offset_joules, whole.other_joules) == (2.0, 1.0, 4.0)
    assert whole.random_joules == pytest.approx(3 * math.sqrt(2))
    assert (whole.longest_gap_seconds, whole.highest_watts) == (0.7, 9.0)
    assert (whole.point, whole.meter, whole.valid) == ("dc_input", "ina226", True)
    assert whole.half_width_joules == pytest.approx(math.hypot(3.0, 4.0, 3 * math.sqrt(2)))


def test_different_meters_err_each_in_its_own_way():
    whole = across([an_energy(), an_energy(meter="rpi_pmic")])
    assert whole.gain_joules == whole.offset_joules * 2 == pytest.approx(math.sqrt(2))
    assert whole.other_joules == pytest.approx(2 * math.sqrt(2))
    assert (whole.meter, whole.valid) == ("ina226 + rpi_pmic", True)


def test_one_meter_means_one():
    assert added([an_energy(), an_energy(meter="shelly")]).problems == (
        "measured by more than one meter: ina226, shelly",
    )


@pytest.mark.parametrize("sum_of", [added, across])
def test_what_holds_of_both_sums(sum_of):
    part = an_energy(problems=("a gap",), replayed=True)
    whole = sum_of([part, part, an_energy(problems=("a clock",))])
    assert whole.problems == ("a gap", "a clock")
    assert whole.replayed
    unknown = sum_of([an_energy(), an_energy(None, problems=("no sample in 1.0 s",))])
    assert (unknown.joules, unknown.problems) == (None, ("no sample in 1.0 s",))
    points = sum_of([an_energy(), an_energy(point="wall_ac")])
    assert points.problems == ("measured at more than one point: dc_input, wall_ac",)
    long = sum_of([an_energy(problems=(f"gap {number}",)) for number in range(8)])
    assert long.problems == (*(f"gap {number}" for number in range(5)), "and 3 more")
    with pytest.raises(ValueError, match="no energy to sum up"):
        sum_of([])


# ------------------------------------------------------------------------------------------------------- idle and net
def rested(watts, **changes):
    return gross(sampled(lambda at: watts, accuracy=Accuracy(0.01, 0.02), **changes), WINDOW)


def test_idle_is_the_mean_of_before_and_after():
    idle = idle_power(rested(3.0), rested(3.4))
    assert (idle.watts, idle.drift_watts) == (pytest.approx(3.2), pytest.approx(0.4))
    assert (idle.gain_watts, idle.offset_watts) == (pytest.approx(0.032), pytest.approx(0.02))
    assert (idle.seconds, idle.samples, idle.problems) == (60.0, 602, ())
    assert idle.half_width_watts == pytest.approx(math.hypot(0.052, 0.2))
    assert (idle.low_watts, idle.high_watts) == (pytest.approx(3.2 - 0.2067, abs=1e-4), pytest.approx(3.4067, abs=1e-4))


def test_idle_of_one_side_only_is_a_problem():
    for idle in (idle_power(rested(3.0), None), idle_power(None, rested(3.0))):
        assert (idle.watts, idle.drift_watts) == (pytest.approx(3.0), None)
        assert idle.problems == ("idle was measured only once, before or after: how far it drifts is not known",)


def test_no_idle_no_net():
    nothing = gross(trace_of([]), WINDOW)
    assert idle_power(None, None) is None
    assert idle_power(nothing, nothing) is None
    assert net(rested(8.0), None) is None


def test_what_gross_and_idle_have_in_common_counts_once():
    energy, idle = rested(8.0), idle_power(rested(3.0), rested(3.0))
    work = net(energy, idle)
    assert work.joules == pytest.approx(150)
    assert work.gain_joules == pytest.approx(0.01 * 150)  # of the difference alone
    assert work.offset_joules == pytest.approx(0.0, abs=1e-9)
    assert work.half_width_joules == pytest.approx(1.5)
    assert (work.seconds, work.samples, work.valid) == (30.0, 301, True)


def test_a_meter_that_errs_within_its_class_errs_so_much_in_net():
    def read(watts):
        return gross(sampled(lambda at: watts * 1.01 + 0.02, accuracy=Accuracy(0.01, 0.02)), WINDOW)

    work = net(read(8.0), idle_power(read(3.0), read(3.0)))
    assert work.low_joules <= 150 <= work.high_joules
    assert work.joules - 150 == pytest.approx(work.half_width_joules, rel=0.02)


def test_net_counts_half_of_the_drift_and_the_chance_of_both():
    energy = replace(rested(8.0), random_joules=3.0)
    before, after = replace(rested(3.0), random_joules=6.0), replace(rested(3.4), random_joules=8.0)
    work = net(energy, idle_power(before, after))
    assert work.other_joules == pytest.approx(0.2 * 30)
    assert work.random_joules == pytest.approx(math.hypot(3.0, 5.0))


def test_what_is_wrong_with_idle_is_wrong_with_net():
    gap = replace(rested(3.0), problems=("a gap",))
    work = net(replace(rested(8.0), problems=("throttled",)), idle_power(gap, rested(3.0)))
    assert work.problems == ("throttled", "idle before: a gap")
    assert net(gross(trace_of([]), WINDOW), idle_power(gap, gap)).joules is None


def test_net_of_unresolved_idle_is_unresolved():
    rest = replace(rested(3.0), unresolved_joules=90.0)
    work = net(rested(8.0), idle_power(rest, rest))
    assert work.unresolved_joules == pytest.approx(90)
    assert work.half_width_joules >= UNRESOLVED * 90


# -------------------------------------------------------------------------------------------------------- small things
def test_a_claim_about_nothing():
    assert an_energy(0.0).claim == math.inf
    assert an_energy(-100.0).claim == an_energy().claim > 0


@pytest.mark.parametrize(("seconds", "samples", "brief"), [(60.0, 100, False), (59.9, 600, True), (600.0, 99, True)])
def test_a_brief_energy_says_so(seconds, samples, brief):
    assert an_energy(seconds=seconds, samples=samples).brief is brief


# --------------------------------------------------------------------------------------------- a slice of the benchmark
@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parent.parent / "benchmarks" / "energy_integration.py"
    spec = importlib.util.spec_from_file_location("energy_integration", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_intervals_hold_the_truth_and_nothing_is_claimed_that_is_not_known(benchmark):
    found = benchmark.run(104, seed=2)
    assert {one.case.family for one in found} == set(benchmark.FAMILIES)
    assert sum(one.covered for one in found) >= 0.95 * len(found)
    assert not [one for one in found if one.false]
    right = [one.error for one in found if one.claims]
    assert len(right) >= 15
    assert sorted(right)[len(right) // 2] <= 0.005


def test_pulses_in_step_with_the_samples_are_neither_missed_nor_claimed(benchmark):
    found = benchmark.run(26, seed=3, families=("pulses",))
    assert sum(one.covered for one in found) >= 24
    assert not [one for one in found if one.claims]
    assert max(one.error for one in found) < 0.12


def test_the_benchmark_knows_a_bad_interval_when_it_sees_one(benchmark):
    found = benchmark.run(13, seed=2)
    bad = [replace(one, energy=replace(one.energy, joules=2 * one.truth)) for one in found]
    assert any("hold the truth" in problem for problem in benchmark.missed(bad))
    pulses = benchmark.run(1, seed=3, families=("pulses",))
    sure = replace(pulses[0].energy, joules=pulses[0].truth, random_joules=0.0, unresolved_joules=0.0, gain_joules=0.0)
    assert any("false claims" in problem for problem in benchmark.missed([replace(pulses[0], energy=sure)]))
