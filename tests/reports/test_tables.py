from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

from testbed.costs import round_costs
from testbed.job import OUT_OF_MEMORY
from testbed.report import summarise
from testbed.report_tables import to_csv
from testbed.reports.exhibits import Figure, Table, said
from testbed.reports.gather import report_of
from testbed.statistics import MIN_RUNS, NOT_ENOUGH, estimate, paired
from testbed.store import RunFolder
from tests.reports.folders import at, exhibit, figure, row, rows, run, table, two_jobs
from tests.run_records import MIB, finished, out_of_memory, planned, quality, record, refused

OURS, THEIRS = (0.61, 0.64, 0.66), (0.50, 0.52, 0.51)
EXAMPLES = 800  # of tests.run_records.quality


@pytest.fixture
def seeds(tmp_path) -> list[RunFolder]:
    """Two methods on three seeds each."""
    pairs = [("lora", THEIRS), ("fedpruner", OURS)]
    return [run(tmp_path, name, seed, (0.3, value)) for name, found in pairs for seed, value in enumerate(found)]


# ── quality ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_means_and_intervals_are_those_of_the_statistics(seeds):
    found = row(table(report_of(seeds, title="Two"), "quality"), method="fedpruner")
    assert found["accuracy"] == estimate(OURS, resolution=1 / EXAMPLES)
    assert (found["runs"], found["resolution"]) == (3, 1 / EXAMPLES)
    assert (found["majority"], found["bag_of_words"], found["no_fine_tuning"]) == (0.125, pytest.approx(0.81), None)


def test_the_comparison_is_paired_on_the_seed_and_says_what_may_be_hidden(seeds):
    report = report_of(seeds, title="Two")
    expected = paired(dict(enumerate(OURS)), dict(enumerate(THEIRS)), resolution=1 / EXAMPLES)
    (found,) = rows(table(report, "comparison"))
    assert (found["accuracy_difference"], found["verdict"]) == (expected.difference, expected.verdict)
    assert (found["pairs"], found["hidden_difference"]) == (3, expected.hidden)


def test_more_comparisons_need_wider_intervals_for_the_verdict(seeds, tmp_path):
    third = [run(tmp_path, "ffa_lora", seed, (0.3, 0.6)) for seed in range(3)]
    found = row(table(report_of([*seeds, *third], title="Three"), "comparison"), method="fedpruner")
    assert found["accuracy_difference"].half_width > found["accuracy_difference_alone"].half_width
    expected = paired(dict(enumerate(OURS)), dict(enumerate(THEIRS)), comparisons=2, resolution=1 / EXAMPLES)
    assert (found["accuracy_difference"], found["verdict"]) == (expected.difference, expected.verdict)


def test_with_fewer_than_three_seeds_nothing_is_claimed(seeds):
    report = report_of([seeds[0], seeds[3]], title="One seed")
    (found,) = rows(table(report, "comparison"))
    assert (found["verdict"], found["accuracy_difference"].low) == (NOT_ENOUGH, None)
    assert any(f"fewer than {MIN_RUNS} seeds" in text for text in report.sections[1].text)


def test_a_mean_of_some_runs_never_passes_for_the_mean_of_all(seeds, tmp_path):
    blind = run(tmp_path, "lora", 3, (None, None))
    found = row(table(report_of([*seeds, blind], title="Blind"), "quality"), method="lora")
    assert (found["runs"], found["accuracy"], found["loss_nats"]) == (4, None, None)


def test_costs_are_those_of_the_last_round_without_evaluation(tmp_path):
    folder = run(tmp_path, accuracies=(0.4,))
    folder.record_round(1, seconds=20.0, learning_rate=0.1, quality=quality(0.6), evaluation_seconds=8.0)
    found = row(table(report_of([folder], title="Costs"), "costs"), method="lora")
    last = round_costs(folder)[-1]
    assert found["seconds_without_evaluation"].mean == last.seconds == 22.0
    assert found["sent_bytes"].mean == last.bytes_down + last.bytes_up == 2 * 1250
    assert found["energy_joules"] is None


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_memory_is_that_of_the_worst_run_with_its_bounds_and_their_sources(tmp_path):
    folders = [run(tmp_path, seed=seed, jobs=two_jobs(1, (700 + seed, 460))) for seed in range(3)]
    found = row(table(report_of(folders, title="Memory"), "memory"), device="orin-1")
    (said_of,) = [device for device in summarise(folders[2]).devices if device.device == "orin-1"]
    assert found["peak_worst_bytes"] == said_of.peak_worst_bytes == 702 * MIB
    assert (found["peak_lower_bytes"], found["peak_upper_bytes"]) == (697 * MIB, 714 * MIB)
    assert (found["prediction_error"], found["headroom_bytes"]) == (said_of.prediction_error, said_of.headroom_bytes)
    told = table(report_of(folders, title="Memory"), "memory")
    assert told.notes == ("Sources of lower, estimate and upper bound: sampled / vmhwm / cgroup1_max_usage.",)
    assert not {"sources", "accelerator_peak_bytes"} & set(found)  # all alike, and none


def test_sources_that_differ_between_devices_are_told_of_each(tmp_path):
    first, second = two_jobs(1)
    peak = replace(second.measurement.peak, sources={"estimate": "sampled"})
    phases = tuple(replace(phase, peak=peak) for phase in second.measurement.phases)
    other = replace(second, measurement=replace(second.measurement, phases=phases))
    told = table(report_of([run(tmp_path, jobs=[first, other])], title="Memory"), "memory")
    assert row(told, device="orin-1")["sources"] == "sampled / vmhwm / cgroup1_max_usage"
    assert row(told, device="pi-1")["sources"] == "– / sampled / –"


def test_a_refused_device_and_one_without_a_cap_say_so(tmp_path):
    clients = [planned(0, "orin-1", 800, 740, 12), refused(1, "pi-1", 500, 740)]
    folder = RunFolder.create(tmp_path, "lora-1", record(clients=clients))
    folder.record_result(finished(0, 0, "orin-1", 700, limit_mib=None))
    found = table(report_of([folder], title="Memory"), "memory")
    assert [row(found, device=name)["limit"] for name in ("orin-1", "pi-1")] == ["UNCAPPED", "refused"]
    assert row(found, device="pi-1")["peak_worst_bytes"] is None


# ── energy ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def metered_jobs(watts: float) -> list:
    return [at(job, 100.0 * index, watts) for index, job in enumerate(two_jobs(2))]


def test_energies_are_those_of_the_summary_with_the_measurements_interval(tmp_path):
    folder = run(tmp_path, jobs=metered_jobs(5.0))
    report = report_of([folder], title="Energy")
    summary = summarise(folder)
    for device in summary.devices:
        gross = device.energy.gross
        found = row(table(report, "energy"), device=device.device)
        interval = found["gross_joules"]
        assert (interval.mean, interval.low, interval.high) == (gross.joules, gross.low_joules, gross.high_joules)
        train = row(table(report, "energy-phases-measured"), device=device.device, phase="train")
        assert train["gross_joules"].mean == device.energy.phases["train"].joules
    whole = row(table(report, "energy"), device="all")
    assert whole["gross_joules"].mean == summary.energy_joules == pytest.approx(2 * 2 * 10 * 5.0, rel=0.01)
    assert whole["net_joules"] is None  # no rest was measured
    spent = row(table(report, "costs"), method="lora")["energy_joules"]
    assert spent.mean == round_costs(folder)[-1].joules == summary.energy_joules  # no job was an evaluation


def test_a_device_without_a_meter_leaves_the_whole_unknown(tmp_path):
    jobs = [job if job.device == "orin-1" else replace(job, measurement=replace(job.measurement, power=()))
            for job in metered_jobs(5.0)]  # fmt: skip
    report = report_of([run(tmp_path, jobs=jobs)], title="Part")
    assert [each["device"] for each in rows(table(report, "energy"))] == ["orin-1"]
    assert row(table(report, "costs"), method="lora")["energy_joules"] is None
    assert exhibit(report, "accuracy-joules") is None
    (section,) = [section for section in report.sections if section.key == "energy"]
    assert any("pi-1" in text for text in section.text)


def test_without_any_meter_there_is_a_sentence_and_no_exhibit(tmp_path):
    report = report_of([run(tmp_path)], title="None")
    (section,) = [section for section in report.sections if section.key == "energy"]
    assert section.exhibits == ()
    assert "No device has a meter" in section.text[0]


# ── traffic and outcomes ────────────────────────────────────────────────────────────────────────────────────────────
def test_bytes_are_told_per_round_and_per_run(seeds):
    found = row(table(report_of(seeds, title="Two"), "traffic"), method="lora")
    assert (found["down_bytes"].mean, found["up_bytes"].mean) == (4 * 1000, 4 * 250)
    assert found["round_down_bytes"].mean == 2 * 1000
    assert found["down_bytes"].low is None  # three equal counts are no interval of no width


def test_outcomes_are_counted_and_each_cause_is_named(tmp_path):
    jobs = [finished(0, 0, "orin-1", 720), out_of_memory(0, 1, "pi-1", 500), out_of_memory(1, 1, "pi-1", 500)]
    report = report_of([run(tmp_path, jobs=jobs)], title="Outcomes")
    found = row(table(report, "outcomes"), device="pi-1")
    assert (found["finished"], found[OUT_OF_MEMORY]) == (0, 2)
    (cause,) = rows(table(report, "failures"))
    assert (cause["outcome"], cause["error"], cause["rounds"]) == (
        OUT_OF_MEMORY,
        "the kernel killed the trainer",
        "1, 2",
    )
    bars = {series.name: [point.y for point in series.points] for series in figure(report, "how-jobs-ended").series}
    assert bars == {"finished": [1.0, 0.0], "out of memory": [0.0, 2.0]}


def test_where_all_finished_no_bar_says_so_again(seeds):
    assert exhibit(report_of(seeds, title="Two"), "how-jobs-ended") is None


# ── protocols ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_target_that_one_run_missed_has_no_mean_cost(tmp_path):
    folders = [run(tmp_path, seed=seed, accuracies=(0.4, value)) for seed, value in enumerate((0.7, 0.65, 0.5))]
    report = report_of(folders, title="Target", target=0.6)
    found = row(table(report, "to-target"), method="lora")
    assert (found["runs"], found["reached"], found["rounds"], found["seconds_without_evaluation"]) == (3, 2, None, None)
    each = rows(table(report, "to-target-runs"))
    assert [(one["target_reached"], one["rounds"], one["seconds_without_evaluation"]) for one in each] == [
        ("reached", 2, 20.0), ("reached", 2, 20.0), ("not reached", None, None),
    ]  # fmt: skip
    assert each[0]["peak_bytes"] == 721 * MIB


def test_a_target_that_all_reached_has_a_mean_cost(tmp_path):
    folders = [run(tmp_path, seed=seed, accuracies=(0.7 - 0.2 * (seed == 2), 0.8)) for seed in range(3)]
    found = row(table(report_of(folders, title="Target", target=0.6), "to-target"), method="lora")
    assert found["seconds_without_evaluation"] == estimate([10.0, 10.0, 20.0])


def test_quality_under_a_budget_is_that_of_the_last_round_within(tmp_path):
    folders = [
        run(tmp_path, method, seed, (0.4, value, 0.9), until={"seconds": 25.0})
        for method, found in (("lora", THEIRS), ("fedpruner", OURS))
        for seed, value in enumerate(found)
    ]
    found = row(table(report_of(folders, title="Budget"), "under-budget"), method="fedpruner")
    assert (found["budget"], found["rounds"].mean, found["seconds_without_evaluation"].mean) == ("25.0 s", 2, 20.0)
    assert found["accuracy"] == estimate(OURS, resolution=1 / EXAMPLES)
    assert found["accuracy_difference"].mean == pytest.approx(sum(OURS) / 3 - sum(THEIRS) / 3)


# ── everywhere the same ─────────────────────────────────────────────────────────────────────────────────────────────
def test_the_tables_of_every_run_hold_what_the_csv_holds(seeds):
    report = report_of(seeds, title="Two", target=0.6)
    lines = list(csv.DictReader(io.StringIO(to_csv([summarise(folder, 0.6) for folder in seeds]))))
    for key, level in (("run-figures", "run"), ("device-figures", "device")):
        told = [{name: "" if value is None else str(value) for name, value in each.items()}
                for each in rows(table(report, key))]  # fmt: skip
        expected = [line for line in lines if line["level"] == level]
        assert [{name: line[name] for name in each} for each, line in zip(told, expected, strict=True)] == told


def test_every_value_can_be_said(seeds, tmp_path):
    metered = run(tmp_path, "metered", jobs=metered_jobs(5.0), until={"accuracy": 0.4, "seconds": 100.0})
    report = report_of([*seeds, metered], title="All", target=0.55)
    tables = [each.table if isinstance(each, Figure) else each for each in report.exhibits]
    assert len(tables) > 20
    for each in tables:
        assert isinstance(each, Table)
        for line in each.rows:
            assert all(isinstance(said(column, value), str) for column, value in zip(each.columns, line, strict=True))
