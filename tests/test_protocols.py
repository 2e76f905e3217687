"""Methods judged by a protocol, from the folders of finished runs."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from testbed.errors import ConfigError
from testbed.experiments.cells import standings
from testbed.experiments.experiment import CLEAN, load_experiment
from testbed.experiments.outcome import Outcome
from testbed.experiments.protocols import NOT_REACHED, protocol_tables
from testbed.experiments.tables import outcome_to_json, print_outcome
from testbed.run_record import FINISHED
from testbed.statistics import NO_DIFFERENCE, NOT_ENOUGH, WORSE
from testbed.stopping import Stopping
from testbed.store import RunFolder
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
    folder = RunFolder.create(runs_dir, name, replace(base, config={**base.config, "experiment": mark}))
    for index in range(len(accuracies)):
        folder.record_result(finished(index, 0, "orin-1", 700))
    add_rounds(folder, accuracies, seconds)
    Stopping(cell.config.until, folder).ended(len(accuracies), last=True)
    folder.set_status(FINISHED)


def table_of(experiment, runs_dir):
    """Row by method, and cell by column, of the only table."""
    (table,) = protocol_tables(Outcome.of(experiment, standings(experiment.cells, runs_dir)))
    keys = [column.key for column in table.columns]
    return {row[0]: dict(zip(keys, row, strict=True)) for row in table.rows}, table


def test_under_a_budget_the_last_round_within_counts_and_the_one_that_exceeded_it_does_not(experiment, tmp_path):
    budget = experiment(THREE + "protocol: {quality_under_budget: {seconds: 25}}\n")
    assert {tuple(cell.config.until.items()) for cell in budget.cells} == {(("seconds", 25.0),)}
    for cell in budget.cells:
        last = {"lora": [0.4, 0.6, 0.9], "bitfit": [0.3, 0.41, 0.9]}[cell.label]
        done(tmp_path, cell, [accuracy + cell.seed / 100 for accuracy in last])
    rows, table = table_of(budget, tmp_path)
    assert rows["lora"]["accuracy"].mean == pytest.approx(0.61)
    assert (rows["lora"]["seconds"].mean, rows["lora"]["ended_by"]) == (20.0, "seconds (3)")
    assert rows["lora"]["verdict"] is None  # the reference itself
    assert (rows["bitfit"]["difference"].mean, rows["bitfit"]["verdict"]) == (pytest.approx(-0.19), WORSE)
    assert table.notes == ()


def test_rounds_that_were_done_before_the_budget_was_spent_are_told(experiment, tmp_path):
    budget = experiment(THREE + "protocol: {quality_under_budget: {bytes: 1 MiB}}\n")
    for cell in budget.cells:
        done(tmp_path, cell, [0.4, 0.6])
    rows, table = table_of(budget, tmp_path)
    assert rows["lora"]["ended_by"] == "rounds (3)"
    assert table.notes == ("Rounds were done before the budget was spent: lora, bitfit.  Give them more rounds.",)


def test_a_target_that_was_not_reached_is_no_cost_and_no_verdict(experiment, tmp_path):
    target = experiment(THREE + "protocol: {cost_to_target: {accuracy: 0.6}}\n")
    for cell in target.cells:
        reaches = cell.label == "lora" or cell.seed == 0
        done(tmp_path, cell, [0.4, 0.6 if reaches else 0.5, 0.5], seconds=10.0 + cell.seed)
    rows, _ = table_of(target, tmp_path)
    assert (rows["lora"]["reached"], rows["bitfit"]["reached"]) == ("3 of 3", "1 of 3")
    assert rows["lora"]["seconds"].mean == pytest.approx(22.0)
    assert (rows["bitfit"]["seconds"].count, rows["bitfit"]["seconds"].low) == (1, None)
    assert (rows["bitfit"]["difference"], rows["bitfit"]["verdict"]) == (None, NOT_REACHED)


def test_where_all_reach_the_target_the_one_that_took_longer_is_worse(experiment, tmp_path):
    target = experiment(THREE + "protocol: {cost_to_target: {accuracy: 0.6}}\n")
    for cell in target.cells:
        done(tmp_path, cell, [0.6] if cell.label == "lora" else [0.4, 0.6], seconds=10.0 + cell.seed)
    rows, _ = table_of(target, tmp_path)
    assert (rows["bitfit"]["difference"].mean, rows["bitfit"]["verdict"]) == (pytest.approx(11.0), WORSE)


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
        done(tmp_path, cell, [0.6 + cell.seed / 10 - lost[cell.disturbance]])
    rows, _ = table_of(robust, tmp_path)
    assert list(rows) == ["lora, lost", "bitfit, lost", "lora, slow", "bitfit, slow"]
    assert rows["lora, lost"]["difference"].mean == pytest.approx(-0.2)
    assert [row["verdict"] for row in rows.values()] == [WORSE, WORSE, NO_DIFFERENCE, NO_DIFFERENCE]
    assert rows["lora, lost"]["jobs_share"].mean == 1.0


def test_fewer_than_three_seeds_give_no_verdict(experiment, tmp_path):
    robust = experiment(ROBUST.replace("[0, 1, 2]", "[0, 1]"))
    for cell in robust.cells:
        done(tmp_path, cell, [0.6 if cell.disturbance == CLEAN else 0.2])
    rows, _ = table_of(robust, tmp_path)
    assert {row["verdict"] for row in rows.values()} == {NOT_ENOUGH}


def test_nothing_done_yet_gives_dashes_and_no_error(experiment, tmp_path):
    for protocol in ("{quality_under_budget: {joules: 9}}", "{cost_to_target: {accuracy: 0.6}}"):
        rows, table = table_of(experiment(THREE + f"protocol: {protocol}\n"), tmp_path / "none")
        assert rows["bitfit"]["verdict"] == NOT_ENOUGH
        assert all(len(cells) == len(table.columns) for cells in table.texts())


def test_people_and_programs_get_the_protocols_table(experiment, tmp_path):
    budget = experiment(THREE + "protocol: {quality_under_budget: {seconds: 25}}\n")
    for cell in budget.cells:
        done(tmp_path, cell, [0.4, 0.6, 0.9])
    found = standings(budget.cells, tmp_path)
    print_outcome(budget, found, console := Console(file=io.StringIO(), width=200, color_system=None))
    assert "quality under budget" in console.file.getvalue()
    assert "over seeds ──" not in console.file.getvalue()  # where the last round left them does not count
    content = json.loads(outcome_to_json(budget, found))
    assert content["protocol"]["quality_under_budget"][0]["accuracy"]["mean"] == pytest.approx(0.6)


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
