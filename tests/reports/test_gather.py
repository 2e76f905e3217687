from __future__ import annotations

import re
from dataclasses import replace

import pytest

from testbed.config import default_inventory, load_inventory
from testbed.errors import UsageError
from testbed.experiments.cells import DONE, FAILED, Standing
from testbed.experiments.experiment import CLEAN, Cell
from testbed.frontier import record as frontier
from testbed.frontier.record import Frontier, FrontierPoint, Trial
from testbed.measurement import PeakMemory
from testbed.reports.exhibits import Figure
from testbed.reports.gather import report_of
from testbed.reports.material import SHOWN
from testbed.run import RunConfig
from testbed.run_record import INTERRUPTED
from tests.reports.folders import exhibit, figure, row, rows, run, table


def three_seeds(tmp_path, method: str, accuracies: tuple[float, ...], **config: object):
    return [run(tmp_path, method, seed, (accuracy / 2, accuracy), **config) for seed, accuracy in enumerate(accuracies)]


# ── as a whole ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_sections_come_in_the_order_in_which_one_reads(tmp_path):
    report = report_of([run(tmp_path), run(tmp_path, "fedpruner")], title="Two methods", target=0.5)
    assert [section.key for section in report.sections] == [
        "runs", "quality", "protocols", "memory", "energy", "time", "traffic", "outcomes", "data",
    ]  # fmt: skip
    assert (report.title, report.subtitle) == ("Two methods", "2 runs of 2 methods, seed 0")
    assert dict(report.facts)["Inventory"] == "lab.yaml"


def test_every_key_is_a_files_name_and_there_once(tmp_path):
    """Data sets in other alphabets, and methods that differ in what no file may be called."""
    folders = [
        run(tmp_path, name=f"run-{index}", data={"name": name}) for index, name in enumerate(("Ä/ö?", "Ä.ö!", "../x"))
    ]
    report = report_of(folders, title="Keys")
    keys = [key for each in report.exhibits for key in (each.key, each.table.key if isinstance(each, Figure) else "")]
    keys = [key for key in keys if key]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[a-z0-9-]+", key) for key in keys)


def test_a_run_that_has_done_nothing_yet_has_a_report(tmp_path):
    report = report_of([run(tmp_path, accuracies=(), jobs=[], state=INTERRUPTED)], title="Nothing")
    assert exhibit(report, "quality") is None
    assert row(table(report, "memory"), device="pi-1")["peak_worst_bytes"] is None


def test_no_run_and_a_reference_that_is_none_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no run to report of"):
        report_of([], title="None")
    with pytest.raises(UsageError, match=r'"fedprunr".*fedpruner'):
        report_of([run(tmp_path), run(tmp_path, "fedpruner")], title="Two", reference="fedprunr")


# ── which runs belong together ──────────────────────────────────────────────────────────────────────────────────────
def test_runs_that_differ_in_the_seed_alone_are_one_method(tmp_path):
    report = report_of(three_seeds(tmp_path, "lora", (0.5, 0.6, 0.7)), title="Seeds")
    assert [(each["method"], each["runs"], each["seeds"]) for each in rows(table(report, "quality"))] == [
        ("lora", 3, "0, 1, 2")
    ]


def test_another_setting_is_another_label_and_says_which(tmp_path):
    folders = [run(tmp_path, name=f"r-{rank}", settings={"rank": rank, "alpha": 16}) for rank in (4, 8)]
    report = report_of(folders, title="Ranks")
    assert [each["method"] for each in rows(table(report, "quality"))] == ["lora, rank=4", "lora, rank=8"]
    assert "Against lora, rank=4" in table(report, "comparison").title


def test_other_data_are_other_circumstances_that_nobody_compares(tmp_path):
    folders = [run(tmp_path, method, name=f"{method}-{data}", data={"name": data})
               for data in ("news", "code") for method in ("lora", "ffa_lora")]  # fmt: skip
    report = report_of(folders, title="Data")
    found = rows(table(report, "comparison"))
    assert [(each["method"], each["circumstances"]) for each in found] == [("ffa_lora", "news"), ("ffa_lora", "code")]
    assert [series.name for series in figure(report, "accuracy-rounds-code").series] == ["lora", "ffa_lora"]


def test_of_two_runs_alike_the_later_counts_and_the_report_says_so(tmp_path):
    folders = [run(tmp_path, accuracies=(0.3,), name="lora-old"), run(tmp_path, accuracies=(0.6,), name="lora-young")]
    report = report_of(folders, title="Again")
    assert row(table(report, "quality"), method="lora")["accuracy"].mean == 0.6
    assert any("and not lora-old" in text for text in report.sections[0].text)


def test_a_run_that_is_not_finished_counts_only_where_no_other_does(tmp_path):
    begun = run(tmp_path, accuracies=(0.3,), name="lora-begun", state=INTERRUPTED, seed=1)
    alone = report_of([begun], title="Begun")
    assert row(table(alone, "quality"), method="lora")["accuracy"].mean == 0.3
    assert any("its figures are those so far" in text for text in alone.sections[0].text)
    both = report_of([begun, run(tmp_path, accuracies=(0.6,))], title="Both")
    assert row(table(both, "quality"), method="lora")["accuracy"].mean == 0.6
    assert any("lora-begun is interrupted and counts in no mean" in text for text in both.sections[0].text)


def test_many_methods_are_in_every_table_and_a_few_are_drawn_which_is_said(tmp_path):
    folders = [run(tmp_path, f"m{index:02}", accuracies=(0.01 * index,)) for index in range(SHOWN + 3)]
    report = report_of(folders, title="Many")
    curves = figure(report, "accuracy-rounds")
    drawn = [series.name for series in curves.series]
    assert drawn == ["m00", *(f"m{index:02}" for index in range(4, SHOWN + 3))]  # the reference and the best
    assert any(f"{SHOWN} of {SHOWN + 3}" in note for note in curves.notes)
    assert {each[0] for each in curves.table.rows} == {f"m{index:02}" for index in range(SHOWN + 3)}
    assert list(report.order[:SHOWN]) == drawn
    assert any("m01; m02; m03" in text for text in report.sections[0].text)


# ── experiments ─────────────────────────────────────────────────────────────────────────────────────────────────────
def standing(folder, label: str, *, disturbance: str | None = None, state: str = DONE, error: str | None = None):
    config = RunConfig("lora", seed=folder.config["seed"] if folder else 9)
    under = () if disturbance is None else (disturbance,)  # the last of the circumstances
    cell = Cell(label, config, load_inventory(default_inventory()), f"{label}{config.seed}", under, disturbance)
    return Standing(cell, state, folder, error)


def test_an_experiment_gives_labels_an_order_and_what_is_not_done(tmp_path):
    plain, large = run(tmp_path, name="a"), run(tmp_path, name="b", settings={"rank": 64})
    cells = [standing(large, "large"), standing(plain, "plain"), standing(None, "plain", state=FAILED, error="no room")]
    report = report_of([], title="Cells", experiment=cells, rows=["plain", "large"], reference="large")
    assert [each["method"] for each in rows(table(report, "quality"))] == ["plain", "large"]
    assert table(report, "comparison").title == "Against large"
    (left,) = rows(table(report, "not-done"))
    assert (left["cell"], left["state"], left["reason"]) == ("plain, seed 9", FAILED, "no room")


def test_two_labels_of_one_cell_share_its_run(tmp_path):
    folder = run(tmp_path)
    report = report_of([folder], title="Shared", experiment=[standing(folder, "one"), standing(folder, "other")])
    assert [each["method"] for each in rows(table(report, "quality"))] == ["one", "other"]
    assert len(table(report, "runs").rows) == 1


def test_disturbed_runs_are_set_against_clean_ones_on_the_same_seed(tmp_path):
    clean = [run(tmp_path, seed=seed, accuracies=(0.7 + 0.01 * seed,), name=f"c{seed}") for seed in range(3)]
    rough = [run(tmp_path, seed=seed, accuracies=(0.5 + 0.01 * seed,), name=f"d{seed}") for seed in range(3)]
    cells = [standing(folder, "lora", disturbance=CLEAN) for folder in clean]
    cells += [standing(folder, "lora", disturbance="dropout") for folder in rough]
    report = report_of([], title="Weather", experiment=cells)
    found = row(table(report, "robustness"), method="lora", disturbance="dropout")
    assert found["accuracy_difference"].mean == pytest.approx(-0.2)
    assert (found["pairs"], found["verdict"], found["jobs_finished"], found["jobs"]) == (3, "worse", 6, 6)
    (series,) = figure(report, "robustness-difference").series
    assert (series.name, series.points[0].x) == ("dropout", "lora")


# ── the frontier ────────────────────────────────────────────────────────────────────────────────────────────────────
TRIALS = (
    Trial(34, "34 examples", "finished", 780 << 20, 760 << 20, PeakMemory(estimate_bytes=800 << 20), jobs=2),
    Trial(35, "35 examples", "out_of_memory", 790 << 20, 770 << 20, jobs=1),
)
POINT = FrontierPoint(
    device="orin-1", profile="pi-4", kind="emulated", accelerator="cpu", threads=1, budget_bytes=800 << 20,
    axis="batch_size", unit="examples", held={"length": 64}, limit=1024, limited_by="memory", predicted=26,
    predicted_bytes=790 << 20, trials=TRIALS,
)  # fmt: skip


WORK = {"task": "sequence_classification", "batch_size": 4, "accelerator": "cuda"}  # of it the point varies the batch
FRONTIER = Frontier(
    "lora-1", "2026-01-01", "lora", {"rank": 8}, "quickstart", "sequence_classification", WORK, "lab.yaml", {}, (POINT,)
)


def test_a_frontier_of_what_was_run_is_shown(tmp_path):
    frontier.save(FRONTIER, tmp_path)
    report = report_of([run(tmp_path)], title="Frontier")
    (found,) = rows(table(report, "frontier"))
    assert (found["predicted"], found["confirmed"], found["refuted"], found["jobs"]) == (26, 34, 35, 3)
    assert found["bytes_error"] == pytest.approx(760 / 800 - 1)
    measured, predicted = figure(report, "frontier-batch-size").series
    assert [(point.x, point.y, point.high) for point in measured.points] == [("orin-1", 34, 35)]
    assert (predicted.predicts, predicted.points[0].y) == ("lora", 26)


@pytest.mark.parametrize(
    "other",
    [
        {"method": "fedprox"},
        {"settings": {"rank": 4}},
        {"model": "another"},
        {"task": "causal_lm"},
        {"work": {**WORK, "length": 16}},
        {"points": (replace(POINT, budget_bytes=500 << 20),)},
        {"points": (replace(POINT, device="pi-9"),)},
        {"points": (replace(POINT, axis="length"),)},  # with a batch that the runs did not have
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_frontier_of_anything_else_is_not(tmp_path, other):
    frontier.save(replace(FRONTIER, **other), tmp_path)
    assert "frontier" not in [section.key for section in report_of([run(tmp_path)], title="None").sections]


def test_a_frontier_that_nobody_tried_has_no_table_of_trials(tmp_path):
    frontier.save(replace(FRONTIER, points=(replace(POINT, trials=()),)), tmp_path)
    report = report_of([run(tmp_path)], title="Predicted")
    assert exhibit(report, "frontier") is not None
    assert exhibit(report, "frontier-trials") is None


def test_without_a_frontier_there_is_no_section_of_it(tmp_path):
    assert "frontier" not in [section.key for section in report_of([run(tmp_path)], title="None").sections]
