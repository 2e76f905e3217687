from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import pytest
from click.testing import CliRunner
from rich.console import Console

from testbed.commands.report import command as report
from testbed.commands.runs import command as runs
from testbed.errors import StoreError
from testbed.method import State
from testbed.quantities import DASH, bytes_text, percent_text, seconds_text
from testbed.report import Failure, fairness, summarise
from testbed.report_tables import print_report, to_csv, to_json
from testbed.store import FINISHED, RunFolder
from tests.run_records import MIB, add_rounds, device, finished, out_of_memory, planned, quality, record, refused

LORA, PRUNER = "lora-20260314-150926-5f3a", "fedpruner-20260314-160000-aaaa"


@pytest.fixture
def lora(tmp_path) -> RunFolder:
    """Three rounds on orin-1 (peaks 720, 735, then out of memory); pi-1 was refused."""
    folder = RunFolder.create(tmp_path, LORA, record())
    for result in (finished(0, 0, "orin-1", 720), finished(1, 0, "orin-1", 735), out_of_memory(2, 0, "orin-1", 800)):
        folder.record_result(result)
    add_rounds(folder, [0.4, 0.7, 0.65])
    folder.record_reference(no_fine_tuning=0.14)
    folder.set_status(FINISHED)
    return folder


@pytest.fixture
def pruner(tmp_path) -> RunFolder:
    """Three rounds on both devices."""
    clients = [planned(0, "orin-1", 800, 740, 12), planned(1, "pi-1", 500, 470, 3)]
    folder = RunFolder.create(tmp_path, PRUNER, record("fedpruner", clients))
    for index in range(3):
        folder.record_result(finished(index, 0, "orin-1", 730))
        folder.record_result(finished(index, 1, "pi-1", 460 + index, limit_mib=500))
    add_rounds(folder, [0.5, None, 0.6], seconds=20.0)
    folder.set_status(FINISHED)
    return folder


def printed(summaries, width: int = 220) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_report(summaries, console)
    return console.file.getvalue()


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_quality_time_and_traffic(lora):
    found = summarise(lora, target=0.6)
    assert (found.accuracy, found.accuracy_best, found.loss) == (0.65, 0.7, 1.0)
    assert (found.rounds, found.rounds_planned, found.seconds) == (3, 3, 30.0)
    assert (found.target.rounds, found.target.seconds) == (2, 20.0)
    assert vars(found.reference) == {"majority": 0.125, "bag_of_words": 0.81, "no_fine_tuning": 0.14}
    assert (found.bytes_down, found.bytes_up) == (2000, 500)
    assert found.phase_seconds == {"load": 4.0, "train": 17.0}
    assert found.tokens_per_second == 8000 / 16  # of the finished jobs, over their training alone
    assert (found.uncapped, found.emulated, found.energy_joules) == (False, True, None)


def test_memory_of_a_device(lora):
    orin = summarise(lora).devices[0]
    assert (orin.budget_bytes, orin.predicted_bytes) == (800 * MIB, 740 * MIB)
    assert (orin.peak_median_bytes, orin.peak_worst_bytes) == (727.5 * MIB, 735 * MIB)
    assert (orin.peak_lower_bytes, orin.peak_upper_bytes, orin.peak_source) == (730 * MIB, 747 * MIB, "vmhwm")
    assert orin.prediction_error == pytest.approx(740 / 735 - 1)
    assert orin.headroom_bytes == 65 * MIB
    assert (orin.jobs, orin.finished) == (3, 2)


def test_refusals_and_failures_with_their_reasons(lora):
    found = summarise(lora)
    (refusal,) = found.refusals
    assert (refusal.device, refusal.needed_bytes, refusal.budget_bytes) == ("pi-1", 740 * MIB, 500 * MIB)
    assert found.failures == (Failure(0, "orin-1", 2, "out_of_memory", "train", "the kernel killed the trainer"),)


def test_what_was_not_measured_is_none_and_never_zero(lora):
    pi = summarise(lora).devices[1]
    names = ("predicted_bytes", "peak_median_bytes", "peak_worst_bytes", "prediction_error", "headroom_bytes",
             "bytes_down", "bytes_up", "tokens_per_second", "energy_joules", "uncapped")  # fmt: skip
    assert {name: getattr(pi, name) for name in names} == dict.fromkeys(names)


def test_a_run_that_has_done_nothing_yet(tmp_path):
    found = summarise(RunFolder.create(tmp_path, "lora-1", record()), target=0.5)
    assert (found.accuracy, found.seconds, found.bytes_down, found.tokens_per_second) == (None, None, None, None)
    assert (found.target.rounds, found.peak_worst_bytes, found.prediction_error_worst) == (None, None, None)
    assert DASH in printed([found])


def test_a_loss_that_ran_away_is_no_number_and_is_told(lora):
    lora.record_round(3, seconds=1.0, learning_rate=0.1, quality=quality(0.125, math.nan))
    found = summarise(lora)
    assert (found.loss, found.loss_best) == (None, 1.0)
    assert "the loss of the last evaluation was not a finite number" in printed([found])
    json.loads(to_json([found]), parse_constant=pytest.fail)


def test_uncapped_and_boards_are_marked(tmp_path):
    settled = record(capped=False)
    boards = {"source": "lab.yaml", "devices": [device("orin-1", 800 * MIB, "jetson")]}
    folder = RunFolder.create(tmp_path, "lora-1", replace(settled, inventory=boards))
    assert summarise(folder).uncapped
    folder.record_result(finished(0, 0, "orin-1", 700, limit_mib=None))
    found = summarise(folder)
    assert found.uncapped
    assert found.devices[0].emulated is False
    assert "UNCAPPED" in printed([found])


def test_a_refitted_client_is_judged_by_its_new_prediction(lora):
    lora.record_refit(2, planned(0, "orin-1", 800, 600, 9))
    lora.record_result(finished(2, 0, "orin-1", 610))
    assert summarise(lora).devices[0].prediction_error == pytest.approx(740 / 735 - 1)
    for index in (0, 1):
        (lora.path / "results" / f"run-r{index}-c0.json").unlink()
    assert summarise(lora).devices[0].prediction_error == pytest.approx(600 / 610 - 1)


def test_figures_come_from_the_folder_and_not_from_the_index(lora):
    before = summarise(lora, 0.6)
    for path in lora.path.parent.glob("index.sqlite*"):
        path.unlink()
    assert summarise(RunFolder(lora.path), 0.6) == before


# ── fairness ────────────────────────────────────────────────────────────────────────────────────────────────────────
def run_with(tmp_path, name: str, **config: object):
    return summarise(RunFolder.create(tmp_path, name, record(**config)))


def test_equal_conditions_need_no_note(tmp_path):
    assert fairness([run_with(tmp_path, "lora-1"), run_with(tmp_path, "lora-2")]) == []


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ({"seed": 8}, "seed: lora-1 7, lora-2 8"),
        ({"data_hash": "beef"}, "data: lora-1 d0c5, lora-2 beef"),
        ({"partition": {"name": "dirichlet", "alpha": 0.1}}, "partition: lora-2 not as lora-1"),
        ({"rounds": 5}, "rounds: lora-1 3, lora-2 5"),
        ({"shards": ["s1", "s2"]}, "shards: lora-2 not as lora-1"),
        ({"capped": False}, "memory cap: lora-1 True, lora-2 False"),
    ],
)
def test_what_differs_is_named(tmp_path, config, note):
    assert fairness([run_with(tmp_path, "lora-1"), run_with(tmp_path, "lora-2", **config)]) == [note]


def test_other_initial_states_are_named(lora, pruner):
    import torch

    lora.record_initial_state(State({"w": torch.zeros(2)}))
    pruner.record_initial_state(State({"w": torch.zeros(2)}))
    both = [summarise(lora), summarise(pruner)]
    assert fairness(both) == [f"clients taking part: {LORA} 1, {PRUNER} 2"]
    pruner.record_initial_state(State({"w": torch.ones(2)}))
    assert f"initial state: {PRUNER} not as {LORA}" in fairness([summarise(lora), summarise(pruner)])


# ── the same numbers everywhere ─────────────────────────────────────────────────────────────────────────────────────
def test_table_of_a_run(lora):
    text = printed([summarise(lora, 0.6)])
    lines = text.splitlines()
    orin = next(line for line in lines if line.startswith("orin-1"))
    assert orin.split("  ")[0] == "orin-1"
    for cell in ("800 MiB", "740 MiB", "727.5 MiB", "735 MiB", "730 MiB", "747 MiB", "vmhwm", "+0.7 %", "65 MiB"):
        assert cell in orin
    assert any(line.startswith("pi-1") and "refused" in line for line in lines)
    assert "accuracy      0.650 at the end, 0.700 at best" in text
    assert "majority class 0.125, bag of words 0.810, no fine-tuning 0.140" in text
    assert "to 0.6        2 rounds, 20.0 s" in text
    assert "refused: client 1 on pi-1: the smallest submodel needs 740 MiB, its budget is 500 MiB" in text
    assert "out_of_memory: client 0 on orin-1, round 3, in train: the kernel killed the trainer" in text


def test_comparison_has_one_row_per_run(lora, pruner):
    text = printed([summarise(lora), summarise(pruner)])
    rows = text[text.index("comparison ─") :].splitlines()
    (one,) = [row for row in rows if row.startswith(LORA)]
    (other,) = [row for row in rows if row.startswith(PRUNER)]
    assert "Bag of words" in rows[1]
    for cell in ("0.650", "0.700", "0.125", "0.810", "0.140", "735 MiB", "65 MiB", "1 of 2"):
        assert cell in one
    for cell in ("0.600", "1 min 00 s", "730 MiB", "38 MiB", "0 of 2"):
        assert cell in other
    assert f"Not like for like: clients taking part: {LORA} 1, {PRUNER} 2." in text


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_a_narrow_terminal_gets_more_tables_and_not_broken_ones(lora, pruner, width):
    text = printed([summarise(lora), summarise(pruner)], width)
    rows = [line for line in text.splitlines() if line.startswith((f"{LORA} ", "orin-1", "all ", "Run ", "Device"))]
    assert max(map(len, rows)) <= width
    for cell in ("0.650", "0.810", "735 MiB", "+0.7 %", "1 of 2"):
        assert any(cell in row for row in rows)


def test_names_in_brackets_are_printed_as_they_are(tmp_path):
    clients = [planned(0, "pi[red]", 800, 740, 12), refused(1, "pi[/]", 500, 740)]
    text = printed([summarise(RunFolder.create(tmp_path, "lora-1", record(clients=clients)))])
    assert "pi[red]" in text
    assert "pi[/]" in text


def test_json_csv_and_dataclass_hold_the_same(lora, pruner):
    summaries = [summarise(lora, 0.6), summarise(pruner, 0.6)]
    content = json.loads(to_json(summaries))
    lines = list(csv.DictReader(io.StringIO(to_csv(summaries))))
    by_run = {line["run"]: line for line in lines if line["level"] == "run"}
    assert len(content["fairness"]) == 1
    for summary, record_ in zip(summaries, content["runs"], strict=True):
        line = by_run[summary.run]
        for name in ("accuracy", "seconds", "bytes_down", "peak_worst_bytes", "prediction_error_worst"):
            assert record_[name] == getattr(summary, name) == float(line[name])
        assert record_["target"]["seconds"] == summary.target.seconds == float(line["target_seconds"])
        assert (record_["energy_joules"], line["energy_joules"]) == (None, "")
    for line in (line for line in lines if line["level"] == "device"):
        summary = next(summary for summary in summaries if summary.run == line["run"])
        found = next(device for device in summary.devices if device.device == line["device"])
        assert line["peak_worst_bytes"] == ("" if found.peak_worst_bytes is None else str(found.peak_worst_bytes))
        assert line["seconds_train"] == str(found.phase_seconds.get("train", ""))


# ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_command_reports_by_the_beginning_of_an_id(lora, pruner):
    folder = str(lora.path.parent)
    told = CliRunner().invoke(report, ["lora", "fedpruner", "--runs", folder, "--json"], catch_exceptions=False)
    assert [run["run"] for run in json.loads(told.stdout)["runs"]] == [LORA, PRUNER]
    told = CliRunner().invoke(report, ["lora", "--runs", folder, "--csv"], catch_exceptions=False)
    assert told.stdout.startswith("level,run,method,")
    told = CliRunner().invoke(report, ["lora", "--runs", folder, "--target", "0.9"], catch_exceptions=False)
    assert "not reached" in told.stdout


def test_the_command_refuses_what_makes_no_sense(lora):
    folder = str(lora.path.parent)
    assert CliRunner().invoke(report, ["lora", "--runs", folder, "--json", "--csv"]).exit_code == 2
    with pytest.raises(StoreError, match="there is no run 'lore'; did you mean"):
        CliRunner().invoke(report, ["lore", "--runs", folder], catch_exceptions=False)


def test_without_a_run_the_newest_finished_run_of_every_method_is_shown(lora, pruner, tmp_path):
    told = CliRunner().invoke(report, ["--runs", str(tmp_path), "--json"], catch_exceptions=False)
    assert {run["run"] for run in json.loads(told.stdout)["runs"]} == {LORA, PRUNER}
    empty = CliRunner().invoke(report, ["--runs", str(tmp_path / "nowhere")])
    assert isinstance(empty.exception, StoreError)


def test_the_command_lists_runs(lora, pruner, tmp_path):
    told = CliRunner().invoke(runs, ["--runs", str(tmp_path), "--json"], catch_exceptions=False)
    rows = {row["run"]: row for row in json.loads(told.stdout)}
    assert rows[LORA]["accuracy"] == 0.65
    assert rows[PRUNER]["state"] == "finished"
    told = CliRunner().invoke(runs, ["--runs", str(tmp_path), "--reindex"], env={"COLUMNS": "160"})
    assert LORA in told.stdout
    assert PRUNER in told.stdout


def test_no_runs_yet(tmp_path):
    told = CliRunner().invoke(runs, ["--runs", str(tmp_path / "none")], catch_exceptions=False)
    assert "There are no runs in" in told.stdout
    assert json.loads(CliRunner().invoke(runs, ["--runs", str(tmp_path / "none"), "--json"]).stdout) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(None), DASH),
        (bytes_text(1.5 * (1 << 30)), "1.5 GiB"),
        (bytes_text(-5 * MIB), "-5 MiB"),
        (seconds_text(None), DASH),
        (seconds_text(0.123), "0.12 s"),
        (seconds_text(59.99), "60.0 s"),
        (seconds_text(245), "4 min 05 s"),
        (seconds_text(7380), "2 h 03 min"),
        (percent_text(-0.018), "-1.8 %"),
        (percent_text(None), DASH),
    ],
)
def test_human_units(text, expected):
    assert text == expected
