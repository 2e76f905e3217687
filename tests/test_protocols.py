"""Methods judged by a protocol, from the folders of finished runs: the same rows wherever they are told."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from testbed.errors import ConfigError
from testbed.experiments.cells import standings
from testbed.experiments.experiment import CLEAN, load_experiment
from testbed.experiments.tables import outcome_to_json, print_outcome
from testbed.reports.gather import report_on
from testbed.reports.grouping import material_of_experiment
from testbed.reports.to_target import NOT_REACHED
from testbed.run_record import FINISHED
from testbed.statistics import NO_DIFFERENCE, NOT_ENOUGH, WORSE
from testbed.stopping import Stopping
from testbed.store import RunFolder
from tests.reports.folders import row, rows, table
from tests.run_records import add_rounds, finished, record

THREE = "name: three\nseeds: [0, 1, 2]\nmethods: {lora: {}, bitfit: {}}\nrun: {rounds: 20}\n"


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment's file and reads it."""

    def write(text: str):
        (tmp_path / "three.yaml").write_text(text)
        return load_experiment(tmp_path / "three.yaml")

    return write


def done(runs_dir, cell, accuracies, seconds=10.0):
    """The run folder of a cell whose rounds went like that."""
    base = record(cell.config.method, seed=cell.seed)
    mark = {"cell": cell.identity, "label": cell.label, "name": "three"}
    name = f"{cell.config.method}-20260314-150926-{cell.identity[:4]}"
    until = dict(cell.config.until)
    folder = RunFolder.create(runs_dir, name, replace(base, config={**base.config, "until": until, "experiment": mark}))
    for index in range(len(accuracies)):
        folder.record_result(finished(index, 0, "orin-1", 700))
    add_rounds(folder, accuracies, seconds)
    Stopping(cell.config.until, folder).ended(len(accuracies), last=True)
    folder.set_status(FINISHED)


def told(experiment, runs_dir, key, **how):
    """A table of the experiment's report."""
    material = material_of_experiment(experiment, standings(experiment.cells, runs_dir), **how)
    return table(report_on(material, "Judged"), key)


def printed(experiment, runs_dir):
    print_outcome(experiment, standings(experiment.cells, runs_dir), console := silent())
    return console.file.getvalue()


def silent():
    return Console(file=io.StringIO(), width=300, color_system=None)


def test_under_a_budget_the_last_round_within_counts_and_the_one_that_exceeded_it_does_not(experiment, tmp_path):
    budget = experiment(THREE + "protocol: {quality_under_budget: {seconds: 25}}\n")
    assert {tuple(cell.config.until.items()) for cell in budget.cells} == {(("seconds", 25.0),)}
    for cell in budget.cells:
        last = {"lora": [0.4, 0.6, 0.9], "bitfit": [0.3, 0.41, 0.9]}[cell.label]
        done(tmp_path, cell, [accuracy + cell.seed / 100 for accuracy in last])
    found = told(budget, tmp_path, "under-budget")
    lora, bitfit = row(found, method="lora"), row(found, method="bitfit")
    assert lora["accuracy"].mean == pytest.approx(0.61)
    assert (lora["seconds_without_evaluation"].mean, lora["rounds"].mean, lora["ended_by"]) == (20.0, 2, "seconds (3)")
    assert (lora["accuracy_difference"], lora["verdict"]) == (None, None)  # the reference itself
    assert (bitfit["accuracy_difference"].mean, bitfit["verdict"]) == (pytest.approx(-0.19), WORSE)
    assert found.notes == ()


def test_rounds_that_were_done_before_the_budget_was_spent_are_told(experiment, tmp_path):
    budget = experiment(THREE + "protocol: {quality_under_budget: {bytes: 1 MiB}}\n")
    for cell in budget.cells:
        done(tmp_path, cell, [0.4, 0.6])
    found = told(budget, tmp_path, "under-budget")
    assert row(found, method="lora")["ended_by"] == "rounds (3)"
    assert found.notes == ("Rounds were done before the budget was spent: lora; bitfit. Give them more rounds.",)


def test_a_target_that_was_not_reached_is_no_cost_and_no_verdict(experiment, tmp_path):
    target = experiment(THREE + "protocol: {cost_to_target: {accuracy: 0.6}}\n")
    for cell in target.cells:
        reaches = cell.label == "lora" or cell.seed == 0
        done(tmp_path, cell, [0.4, 0.6 if reaches else 0.5, 0.5], seconds=10.0 + cell.seed)
    found = told(target, tmp_path, "to-target")
    lora, bitfit = row(found, method="lora"), row(found, method="bitfit")
    assert [(each["reached"], each["runs"]) for each in (lora, bitfit)] == [(3, 3), (1, 3)]
    assert lora["seconds_without_evaluation"].mean == pytest.approx(22.0)
    assert (bitfit["rounds"], bitfit["seconds_without_evaluation"], bitfit["all_bytes"]) == (None, None, None)
    assert (bitfit["pairs"], bitfit["seconds_difference"], bitfit["verdict"]) == (None, None, NOT_REACHED)
    reached = row(told(target, tmp_path, "to-target-runs"), method="bitfit", seed=0)
    assert (reached["target_reached"], reached["seconds_without_evaluation"]) == ("reached", 20.0)


def test_where_all_reach_the_target_the_one_that_took_longer_is_worse(experiment, tmp_path):
    target = experiment(THREE + "protocol: {cost_to_target: {accuracy: 0.6}}\n")
    for cell in target.cells:
        done(tmp_path, cell, [0.6] if cell.label == "lora" else [0.4, 0.6], seconds=10.0 + cell.seed)
    bitfit = row(told(target, tmp_path, "to-target"), method="bitfit")
    assert (bitfit["seconds_difference"].mean, bitfit["verdict"]) == (pytest.approx(11.0), WORSE)


def test_a_target_that_was_reached_beyond_the_budget_was_not_reached(experiment, tmp_path):
    both = experiment(THREE + "protocol: {cost_to_target: {accuracy: 0.6}, quality_under_budget: {seconds: 25}}\n")
    for cell in both.cells:
        done(tmp_path, cell, [0.4, 0.6] if cell.label == "lora" else [0.4, 0.5, 0.9])
    bitfit = row(told(both, tmp_path, "to-target"), method="bitfit")
    assert (bitfit["reached"], bitfit["seconds_without_evaluation"], bitfit["verdict"]) == (0, None, NOT_REACHED)
    figures = rows(told(both, tmp_path, "run-figures"))
    assert [each["target_rounds"] for each in figures if each["method"] == "bitfit"] == [None] * 3
    assert row(told(both, tmp_path, "under-budget"), method="lora")["ended_by"] == "accuracy (3)"


def test_another_target_or_reference_goes_before_those_of_the_file(experiment, tmp_path):
    target = experiment(THREE + "protocol: {cost_to_target: {accuracy: 0.6}}\n")
    for cell in target.cells:
        done(tmp_path, cell, [0.5, 0.6])
    found = told(target, tmp_path, "to-target", target=0.5, reference="bitfit")
    assert row(found, method="bitfit")["verdict"] is None
    assert (row(found, method="lora")["target"], row(found, method="lora")["seconds_without_evaluation"].mean) == (
        0.5,
        10.0,
    )
    assert row(found, method="lora")["verdict"] == NO_DIFFERENCE


ROBUST = THREE + "protocol: {robustness: {lost: {dropout: 0.3}, slow: {straggler: 3}}}\n"


def test_robustness_does_every_run_clean_and_under_each_set_of_disturbances(experiment):
    robust = experiment(ROBUST)
    first = [cell for cell in robust.cells if cell.label == "lora" and cell.seed == 0]
    assert [cell.title for cell in first] == ["lora, clean, seed 0", "lora, lost, seed 0", "lora, slow, seed 0"]
    assert [sorted(cell.config.disturbances) for cell in first] == [[], ["dropout"], ["straggler"]]
    plain = experiment(THREE)
    assert first[0].identity == next(cell.identity for cell in plain.cells if cell.label == "lora")


def test_robustness_is_each_method_disturbed_less_itself_clean_paired_on_the_seeds(experiment, tmp_path):
    robust = experiment(ROBUST)
    lost = {CLEAN: 0.0, "lost": 0.2, "slow": 0.0}
    for cell in robust.cells:
        seconds = 30.0 if cell.disturbance == "slow" else 10.0
        done(tmp_path, cell, [0.6 + cell.seed / 10 - lost[cell.disturbance]], seconds)
    found = told(robust, tmp_path, "robustness")
    assert [(each["method"], each["disturbance"]) for each in rows(found)] == [
        ("lora", "lost"), ("bitfit", "lost"), ("lora", "slow"), ("bitfit", "slow"),
    ]  # fmt: skip
    lost, slow = row(found, method="lora", disturbance="lost"), row(found, method="lora", disturbance="slow")
    assert lost["accuracy_difference"].mean == pytest.approx(-0.2)
    assert [each["verdict"] for each in rows(found)] == [WORSE, WORSE, NO_DIFFERENCE, NO_DIFFERENCE]
    assert (lost["hidden_difference"], slow["hidden_difference"]) == (None, pytest.approx(1 / 800))
    assert (lost["jobs_finished"], lost["jobs"]) == (3, 3)
    assert [each["time_ratio"].mean for each in rows(found)] == [1.0, 1.0, 3.0, 3.0]


def test_under_a_budget_robustness_is_that_of_the_rounds_within(experiment, tmp_path):
    robust = experiment(THREE + "protocol: {quality_under_budget: {seconds: 25}, robustness: {lost: {dropout: 0.3}}}\n")
    for cell in robust.cells:
        done(tmp_path, cell, [0.4, 0.6 if cell.disturbance == CLEAN else 0.5, 0.9])
    found = row(told(robust, tmp_path, "robustness"), method="lora")
    assert (found["clean_accuracy"].mean, found["accuracy"].mean) == (pytest.approx(0.6), pytest.approx(0.5))
    assert found["accuracy_difference"].mean == pytest.approx(-0.1)


def test_fewer_than_three_seeds_give_no_verdict(experiment, tmp_path):
    robust = experiment(ROBUST.replace("[0, 1, 2]", "[0, 1]"))
    for cell in robust.cells:
        done(tmp_path, cell, [0.6 if cell.disturbance == CLEAN else 0.2])
    found = told(robust, tmp_path, "robustness")
    assert {each["verdict"] for each in rows(found)} == {NOT_ENOUGH}


@pytest.mark.parametrize("protocol", ["{quality_under_budget: {joules: 9}}", "{cost_to_target: {accuracy: 0.6}}"])
def test_nothing_done_yet_gives_no_rows_and_no_error(experiment, tmp_path, protocol):
    asked = experiment(THREE + f"protocol: {protocol}\n")
    assert printed(asked, tmp_path / "none") == ""
    content = json.loads(outcome_to_json(asked, standings(asked.cells, tmp_path / "none")))
    assert (content["tables"], content["runs"], content["reference"]) == ({}, [], "lora")


def test_a_budget_of_joules_without_a_meter_gives_dashes_and_no_error(experiment, tmp_path):
    budget = experiment(THREE + "protocol: {quality_under_budget: {seconds: 25}}\n")
    for cell in budget.cells:
        done(tmp_path, cell, [0.4])
    for config in tmp_path.glob("*/config.json"):
        config.write_text(config.read_text().replace('"seconds"', '"joules"'))
    found = told(budget, tmp_path, "under-budget")
    bitfit = row(found, method="bitfit")
    assert (bitfit["accuracy"], bitfit["energy_joules"], bitfit["verdict"]) == (None, None, NOT_ENOUGH)
    assert all(len(cells) == len(found.columns) for cells in found.texts())


def test_what_is_not_done_is_told_and_a_reference_without_runs_compares_with_nothing(experiment, tmp_path):
    budget = experiment(THREE + "protocol: {quality_under_budget: {seconds: 25}}\n")
    for cell in budget.cells:
        if cell.label == "bitfit" and cell.seed < 2:
            done(tmp_path, cell, [0.4, 0.6, 0.9])
    found = told(budget, tmp_path, "under-budget")
    assert found.notes == ("Not all runs are done: lora 0 of 3; bitfit 2 of 3.",)
    (bitfit,) = rows(found)
    assert (bitfit["runs"], bitfit["verdict"]) == (2, None)
    assert "The reference, lora, has no finished run: nothing is compared with it." in printed(budget, tmp_path)


def test_page_people_and_programs_get_the_same_rows(experiment, tmp_path):
    budget = experiment(THREE + "protocol: {quality_under_budget: {seconds: 25}, robustness: {lost: {dropout: 0.3}}}\n")
    for cell in budget.cells:
        done(tmp_path, cell, [0.4, 0.6 + cell.seed / 100, 0.9])
    lines = [" ".join(line.split()) for line in printed(budget, tmp_path).splitlines()]
    records = json.loads(outcome_to_json(budget, standings(budget.cells, tmp_path)))["tables"]
    for key, names in (("under-budget", 1), ("robustness", 2)):  # so many of its columns are the row's name
        shown = told(budget, tmp_path, key)
        assert [[*record] for record in records[key]] == [[column.key for column in shown.columns]] * len(shown.rows)
        means = [each["accuracy"].mean for each in rows(shown)]
        assert [record["accuracy"]["mean"] for record in records[key]] == means
        for texts in shown.texts():
            assert " ".join([", ".join(texts[:names]), *texts[names:]]) in lines


def test_runs_that_a_budget_ended_are_not_judged_by_their_last_round(experiment, tmp_path):
    plain, budget = experiment(THREE), experiment(THREE + "protocol: {quality_under_budget: {seconds: 25}}\n")
    for cell in (*plain.cells, *budget.cells):
        done(tmp_path, cell, [0.4, 0.6, 0.9])
    assert "Quality under budget ──" in printed(budget, tmp_path)
    assert "Quality at the end ──" not in printed(budget, tmp_path)
    assert "Quality at the end ──" in printed(plain, tmp_path)
    assert "Quality under budget ──" not in printed(plain, tmp_path)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ("{quality_under_budget: {second: 9}}", 'quality_under_budget.second: unknown key; did you mean "seconds"'),
        ("{quality_under_budget: {}}", "protocol.quality_under_budget: expected a mapping with any of seconds"),
        ("{quality_under_budget: {seconds: 0}}", "quality_under_budget.seconds: expected a number of seconds above 0"),
        ("{quality_under_budget: {bytes: 5 MB}}", 'quality_under_budget: bytes: expected bytes such as "4 GiB"'),
        ("{cost_to_target: {accuracy: 60}}", "accuracy: expected a share above 0 and up to 1, got 60"),
        ("{robustness: {}}", "protocol.robustness: expected a mapping from names of your own"),
        ("{robustness: {lost: {dropuot: 1}}}", "protocol.robustness: lost.dropuot: there is no such disturbance; did"),
        ("{robustness: {lost: {}}}", "protocol.robustness.lost: expected a mapping such as {dropout: 0.3}"),
        ("{robustness: {clean: {dropout: 1}}}", 'robustness.clean: expected another name: "clean" is without any'),
        ("{}", "protocol: expected a mapping such as"),
    ],
)
def test_a_wrong_protocol_is_told_by_its_key(experiment, protocol, message):
    with pytest.raises(ConfigError) as error:
        experiment(THREE + f"protocol: {protocol}\n")
    assert message in str(error.value)


def test_what_two_places_say_is_refused(experiment):
    for run, key in (("until: {seconds: 9}", "run.until"), ("disturbances: {dropout: 0.1}", "run.disturbances")):
        protocol = "protocol: {cost_to_target: {accuracy: 0.5}, robustness: {lost: {dropout: 0.3}}}\n"
        with pytest.raises(ConfigError, match=f"{key}: protocol says it too; leave one of them out"):
            experiment(THREE.replace("rounds: 20", f"rounds: 20, {run}") + protocol)
