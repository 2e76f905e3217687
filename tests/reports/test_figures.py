from __future__ import annotations

import pytest

from testbed.reports.exhibits import Span
from testbed.reports.gather import report_of
from testbed.reports.material import Evidence
from testbed.reports.timeline import WAITING, round_times
from testbed.statistics import estimate
from tests.reports.folders import at, exhibit, figure, row, run, table, two_jobs
from tests.run_records import MIB, finished

EXAMPLES = 800


# ── curves ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_curve_is_the_mean_over_seeds_with_the_interval_of_the_statistics(tmp_path):
    values = (0.61, 0.64, 0.66)
    report = report_of([run(tmp_path, seed=s, accuracies=(None, v)) for s, v in enumerate(values)], title="Curve")
    expected = estimate(values, resolution=1 / EXAMPLES)
    (series,) = figure(report, "accuracy-rounds").series
    assert [(point.x, point.y, point.low, point.high) for point in series.points] == [
        (2, expected.mean, expected.low, expected.high)
    ]


def test_a_reference_far_from_the_curves_is_told_and_does_not_press_them_flat(tmp_path):
    drawn = figure(report_of([run(tmp_path, accuracies=(0.11, 0.14))], title="Curve"), "accuracy-rounds")
    assert drawn.lines == (("majority class", 0.125),)
    assert drawn.notes[0] == "Above the figure: bag of words 0.810."
    end = run(tmp_path / "high", accuracies=(0.7, 0.8))
    drawn = figure(report_of([end], title="Curve"), "accuracy-rounds")
    assert drawn.lines == (("bag of words", 0.81),)
    assert drawn.notes[0] == "Below the figure: majority class 0.125."


def test_x_is_the_mean_cost_and_only_rounds_that_all_runs_evaluated_are_drawn(tmp_path):
    short, long = (
        run(tmp_path, seed=seed, accuracies=found, rounds=3)
        for seed, found in enumerate(((0.4, 0.6), (0.5, None, 0.7)))
    )
    report = report_of([short, long], title="Rounds")
    (seconds,) = figure(report, "accuracy-seconds").series
    assert [(point.x, point.y) for point in seconds.points] == [(10.0, 0.45)]
    (sent,) = figure(report, "accuracy-bytes").series
    assert [point.x for point in sent.points] == [2 * 1250]


def test_energy_is_drawn_for_whom_every_device_has_a_meter_and_the_others_are_named(tmp_path):
    jobs = [at(job, 100.0 * index, 5.0) for index, job in enumerate(two_jobs(2))]
    report = report_of([run(tmp_path, jobs=jobs), run(tmp_path, "fedpruner")], title="Joules")
    drawn = figure(report, "accuracy-joules")
    (series,) = drawn.series
    assert series.name == "lora"
    assert [point.x for point in series.points] == [pytest.approx(100.0, rel=0.01), pytest.approx(200.0, rel=0.01)]
    assert any("No curve of fedpruner" in note for note in drawn.notes)


def test_without_a_meter_there_is_no_figure_of_energy(tmp_path):
    report = report_of([run(tmp_path)], title="None")
    assert exhibit(report, "accuracy-joules") is None
    assert exhibit(report, "energy-phases") is None


# ── peaks and bars ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_peaks_stand_between_their_bounds_beside_prediction_and_budget(tmp_path):
    drawn = figure(report_of([run(tmp_path, jobs=two_jobs(1))], title="Peaks"), "peaks")
    measured, predicted = drawn.series
    assert [(point.x, point.y, point.low, point.high) for point in measured.points] == [
        ("orin-1", 720 * MIB, 715 * MIB, 732 * MIB), ("pi-1", 460 * MIB, 455 * MIB, 472 * MIB),
    ]  # fmt: skip
    assert predicted.predicts == measured.name == "lora"
    assert [point.y for point in predicted.points] == [740 * MIB, 470 * MIB]
    assert list(drawn.ticks) == [("orin-1", "budget", 800 * MIB), ("pi-1", "budget", 500 * MIB)]


def test_energy_bars_are_stacked_in_the_order_of_the_phases_and_all_name_every_bar(tmp_path):
    jobs = [at(job, 100.0 * index, 5.0) for index, job in enumerate(two_jobs(1))]
    drawn = figure(report_of([run(tmp_path, jobs=jobs)], title="Bars"), "energy-phases")
    assert [series.name for series in drawn.series] == ["load", "train"]
    for series, joules in zip(drawn.series, (2 * 5.0, 8 * 5.0), strict=True):
        assert [point.x for point in series.points] == ["lora, orin-1", "lora, pi-1"]
        assert [point.y for point in series.points] == [pytest.approx(joules, rel=0.05)] * 2


# ── time lines ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def timed(tmp_path):
    """One round: orin-1 from 0 to 10 s, pi-1 from 4 to 14 s; a rest afterwards is in no round."""
    first, second = two_jobs(1)
    return run(tmp_path, accuracies=(0.5,), jobs=[at(first, 50.0), at(second, 54.0)])


def test_a_time_line_has_each_phase_and_who_waited(timed):
    drawn = figure(report_of([timed], title="Time"), "timeline-lora")
    assert drawn.spans == (
        Span("orin-1", 0.0, 2.0, "load"), Span("orin-1", 2.0, 10.0, "train"), Span("orin-1", 10.0, 14.0, WAITING),
        Span("pi-1", 4.0, 6.0, "load"), Span("pi-1", 6.0, 14.0, "train"),
    )  # fmt: skip
    assert len(drawn.table.rows) == len(drawn.spans)


def test_who_was_last_and_how_long_the_others_waited(timed):
    report = report_of([timed], title="Time")
    (last,) = [
        dict(zip((c.key for c in table(report, "last").columns), r, strict=True)) for r in table(report, "last").rows
    ]
    assert (last["last"], last["longest"], last["longest_seconds"], last["round_seconds"]) == (
        "pi-1",
        "orin-1",
        4.0,
        14.0,
    )
    early, late = (row(table(report, "waiting"), device=name) for name in ("orin-1", "pi-1"))
    assert (early["before_seconds"], early["work_seconds"], early["waited_seconds"], early["times_last"]) == (
        0,
        10,
        4,
        0,
    )
    assert (late["before_seconds"], late["work_seconds"], late["waited_seconds"], late["times_last"]) == (4, 10, 0, 1)


def test_devices_that_took_turns_are_told_apart_from_those_that_did_not(tmp_path):
    first, second = two_jobs(1)
    turns = run(tmp_path, name="turns", accuracies=(0.5,), jobs=[at(first, 50.0), at(second, 60.0)])
    (times,) = round_times(Evidence.of(turns))
    assert times.side_by_side == 1
    report = report_of([turns], title="Turns")
    (section,) = [section for section in report.sections if section.key == "time"]
    assert any("take turns: at most 1 of 2" in text for text in section.text)


def test_of_many_rounds_the_first_a_middle_and_the_last_are_drawn(tmp_path):
    jobs = [at(finished(index, 0, "orin-1", 700), 100.0 * index) for index in range(5)]
    drawn = figure(report_of([run(tmp_path, accuracies=(0.5,) * 5, jobs=jobs)], title="Rounds"), "timeline-lora")
    assert list(dict.fromkeys(span.row for span in drawn.spans)) == [f"round {n}: orin-1" for n in (1, 3, 5)]
    assert drawn.caption.startswith("Round 1, 3, 5 of 5")


def test_records_without_moments_have_no_time_line_and_say_why(tmp_path):
    report = report_of([run(tmp_path)], title="Old")
    assert exhibit(report, "timeline-lora") is None
    (section,) = [section for section in report.sections if section.key == "time"]
    assert any("do not tell when jobs began" in text for text in section.text)
