"""What an experiment will take, before it is run: every figure with its source, and none where nothing is known."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from testbed.cli import main
from testbed.costs import round_costs
from testbed.environment import describe_machine
from testbed.experiments.cells import standings
from testbed.experiments.experiment import load_experiment
from testbed.experiments.forecast import (
    BY_STEPS_HERE,
    MEASURED,
    MODELLED,
    SCALED,
    Guess,
    Known,
    Work,
    devices_of,
    left,
    total,
)
from testbed.experiments.forecast_plan import Forecast, Outlook, Peak
from testbed.experiments.forecast_probe import pace_here
from testbed.experiments.forecast_table import dry_run_to_json, print_forecasts
from testbed.run_record import FINISHED, RUNNING_SECONDS
from testbed.stopping import FACT
from testbed.store import RunFolder
from tests.run_records import add_rounds, finished, planned, record
from tests.tiny_lab import make_lab

TWO = "name: two\nseeds: [0, 1]\nmethods: {lora: {}, bitfit: {}}\nrun: {rounds: 20}\n"
WORK = Work(weight_bytes=4e7, trained_bytes=1e6, clients=2, deployed_bytes=5000)


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment's file and reads it."""

    def write(text: str = TWO):
        (tmp_path / "two.yaml").write_text(text)
        return load_experiment(tmp_path / "two.yaml")

    return write


def done(runs_dir, cell, *, rounds=20, seconds=200.0, name=None, machine=None, **changes):
    """A finished run of such a cell: `rounds` rounds that took `seconds` in all, a job of 1250 bytes in each."""
    config = replace(cell.config, **changes)
    base = record(config.method, clients=[planned(0, cell.inventory.devices[0].name, 800, 740, 12)])
    plain = {**config.to_json(), "model": "quickstart", "task": "sequence_classification"}
    mark = {"cell": cell.identity, "label": cell.label, "name": "two"}
    devices = [
        {"name": name, "kind": kind, "profile": {"name": profile}, "budget": {"memory_bytes": budget}, "clients": count}
        for name, kind, profile, budget, count in devices_of(cell)
    ]
    base = replace(
        base,
        config={**plain, "experiment": {} if changes else mark},
        inventory={"devices": devices},
        versions={"machine": machine or describe_machine(), "packages": {}},
    )
    folder = RunFolder.create(runs_dir, name or f"{config.method}-20260314-150926-{cell.identity[:4]}", base)
    for index in range(rounds):
        folder.record_result(finished(index, 0, cell.inventory.devices[0].name, 700))
    add_rounds(folder, [0.5] * rounds, seconds / rounds)
    folder.set_status(FINISHED, **{RUNNING_SECONDS: seconds})
    return folder


# ── where figures come from ─────────────────────────────────────────────────────────────────────────────────────────
def test_a_finished_run_with_another_seed_is_a_measurement(experiment, tmp_path):
    two = experiment()
    first, _, second, _ = two.cells
    done(tmp_path / "runs", first, seconds=200.0)
    known = Known(two, tmp_path / "runs")
    assert known.seconds(second, WORK) == Guess(200.0, MEASURED, "1 run with other seeds")
    assert known.bytes(second, WORK) == Guess(20 * 1250.0, MEASURED, "1 run with other seeds")
    assert known.disk_bytes(second).source == MEASURED


def test_other_runs_of_the_method_are_scaled_by_what_decides_time_and_by_rounds_for_bytes(experiment, tmp_path):
    two = experiment()
    lora = two.cells[0]
    done(tmp_path / "runs", lora, rounds=10, seconds=100.0, steps=2)  # half the rounds, half the steps
    known = Known(two, tmp_path / "runs")
    assert known.seconds(lora, WORK) == Guess(400.0, SCALED, "1 run of lora")
    assert known.bytes(lora, WORK) == Guess(20 * 1250.0, SCALED, "1 run of lora")
    other = replace(lora, config=replace(lora.config, settings={**lora.config.settings, "rank": 2}))
    assert known.seconds(other).of == "1 run of lora, with other settings"


def test_time_is_modelled_from_the_work_at_the_rate_of_other_methods(experiment, tmp_path):
    two = experiment()
    lora, bitfit, *_ = two.cells
    done(tmp_path / "runs", lora, seconds=200.0)
    known = Known(two, tmp_path / "runs")
    assert known.seconds(bitfit) == Guess()  # without a plan there is nothing to model from
    once = known.seconds(bitfit, replace(WORK, clients=1, weight_bytes=100 * 2**20))
    assert once == Guess(200.0, MODELLED, "weights × tokens, at the rate of 1 run")
    twice = known.seconds(bitfit, replace(WORK, clients=2, weight_bytes=100 * 2**20))
    assert twice.value == pytest.approx(400.0)
    traffic = known.bytes(bitfit, WORK)
    assert (traffic.value, traffic.source) == (2 * 1e6 * 2 * 20 + 5000, MODELLED)


def test_the_first_run_on_a_machine_is_modelled_by_steps_that_are_timed_here(experiment, tmp_path):
    two = experiment()
    once = Known(two, tmp_path / "none", pace=lambda: 1e-12, start=lambda: 0.0).seconds(two.cells[0], WORK)
    twice = Known(two, tmp_path / "none", pace=lambda: 2e-12, start=lambda: 0.0).seconds(two.cells[0], WORK)
    assert (once.source, once.of) == (MODELLED, BY_STEPS_HERE)
    assert twice.value == pytest.approx(2 * once.value)
    assert 1e-13 < pace_here() < 1e-8  # from a board's core to a server's


def test_nothing_is_guessed_where_nothing_is_known(experiment, tmp_path):
    two = experiment()
    known = Known(two, tmp_path / "none", pace=lambda: 1e-12, start=lambda: 0.0)
    boards = [replace(device, kind="raspberry_pi") for device in two.cells[0].inventory]
    on_boards = replace(two.cells[0], inventory=replace(two.cells[0].inventory, devices=tuple(boards)))
    assert known.seconds(on_boards, WORK) == Guess()
    assert known.bytes(two.cells[0], replace(WORK, trained_bytes=None)) == Guess()
    assert total([Guess(2.0), Guess()]) == (2.0, False)
    assert total([Guess(2.0), Guess(3.0)]) == (5.0, True)


def test_another_machine_says_nothing_of_time_but_of_bytes(experiment, tmp_path):
    two = experiment()
    done(tmp_path / "runs", two.cells[0], machine={"cpu": "another", "cores": 64})
    known = Known(two, tmp_path / "runs", pace=lambda: 1e-12, start=lambda: 0.0)
    assert known.seconds(two.cells[2], WORK).of == BY_STEPS_HERE
    assert known.bytes(two.cells[2]).source == MEASURED


def test_an_unfinished_or_damaged_run_tells_nothing(experiment, tmp_path):
    two = experiment()
    done(tmp_path / "runs", two.cells[0]).set_status("interrupted")
    damaged = done(tmp_path / "runs", two.cells[1], name="bitfit-20260101-000000-0000")
    (damaged.path / "plan.json").write_text("[]")
    assert (
        Known(two, tmp_path / "runs", pace=lambda: 1e-12, start=lambda: 0.0).seconds(two.cells[2], WORK).of
        == BY_STEPS_HERE
    )


def test_a_budget_bounds_what_is_not_measured(experiment, tmp_path):
    budget = experiment(TWO + "protocol: {quality_under_budget: {seconds: 90, bytes: 1 MiB}}\n")
    known = Known(budget, tmp_path / "none", pace=lambda: 3e-11, start=lambda: 0.0)
    assert known.seconds(budget.cells[0], WORK) == Guess(90.0, MODELLED, "its budget, which ends it")
    small = replace(WORK, trained_bytes=2e5)
    assert known.bytes(budget.cells[0], small).value == 2**20


def test_a_run_takes_one_round_at_least_whatever_its_budget(experiment, tmp_path):
    """A run ends after the round that exceeds its budget, and never before the first."""
    budget = experiment(TWO + 'protocol: {quality_under_budget: {bytes: "50 B"}}\n')
    found = Known(budget, tmp_path / "none").bytes(budget.cells[0], replace(WORK, deployed_bytes=0))
    assert found == Guess(2 * 1e6 * 2, MODELLED, "one round, which spends more than its budget")


def test_a_forecast_counts_a_start_for_each_device_and_the_evaluations(experiment, tmp_path):
    """Of a tiny run they are most of it."""
    two = experiment()

    def seconds(text=TWO, start=0.0, **changes):
        cell = experiment(text).cells[0]
        known = Known(two, tmp_path / "none", pace=lambda: 1e-12, start=lambda: start)
        return known.seconds(cell, replace(WORK, **changes)).value

    assert seconds(start=5.0, devices=4) - seconds() == pytest.approx(20.0)
    often = TWO.replace("rounds: 20", "rounds: 20, evaluate_every: 1")
    seldom = TWO.replace("rounds: 20", "rounds: 20, evaluate_every: 20")
    assert seconds(often) > seconds(seldom)


def test_a_cell_that_cannot_be_run_adds_nothing_and_nothing_is_not_zero(experiment, tmp_path):
    two = experiment()
    found = standings(two.drawn, tmp_path)
    none = Guess(0.0, "planned", "it cannot be run")
    console = Console(width=200, file=io.StringIO())
    print_forecasts([Forecast(found[0], Outlook(error="no data"), none, none, none)], console)
    total_row = next(line for line in console.file.getvalue().splitlines() if line.startswith("in total"))
    assert total_row.split() == ["in", "total", "–", "–", "–"]


@pytest.mark.parametrize(("schedule", "warned"), [("cosine", True), ("constant", False)])
def test_a_cosine_under_a_budget_is_warned_of_before_anything_is_run(experiment, tmp_path, schedule, warned):
    text = TWO.replace("rounds: 20", f"rounds: 20, schedule: {schedule}")
    budget = experiment(text + "protocol: {quality_under_budget: {seconds: 90}}\n")
    found = standings(budget.drawn, tmp_path)
    console = Console(width=300, file=io.StringIO())
    print_forecasts([Forecast(found[0], Outlook(), Guess(60.0, SCALED), Guess(), Guess())], console)
    said = console.file.getvalue()
    assert ("say schedule: constant" in said) == warned
    assert "disk: nothing is known of it" in said


def test_of_a_run_that_was_begun_only_its_rounds_that_are_left_count():
    assert left(Guess(100.0, MEASURED, "1 run"), 5, 20) == Guess(75.0, MEASURED, "1 run; 5 of 20 rounds are done")
    assert left(Guess(), 5, 20) == Guess()


def test_the_total_says_at_least_where_a_part_is_not_known(experiment, tmp_path):
    two = experiment()
    found = standings(two.drawn, tmp_path)
    outlook = Outlook((Peak("pi", 90, 100), Peak("nano", 120, 100, "its budget is too small")), WORK)
    ahead = [Forecast(found[0], outlook, Guess(60.0, MEASURED), Guess(8.0, SCALED), Guess())]
    ahead += [Forecast(found[1], Outlook(error="no data"), Guess(), Guess(0.0), Guess())]
    content = json.loads(dry_run_to_json(two, found, ahead))
    assert content["total"]["seconds"] == {"value": 60.0, "at_least": True}
    assert content["total"]["bytes"] == {"value": 8.0, "at_least": False}
    assert [cell["title"] for cell in content["cells"]] == [cell.title for cell in two.drawn]
    first, second, third, _ = (cell["forecast"] for cell in content["cells"])
    assert (first["seconds"]["source"], first["peaks"][1]["refused"]) == (MEASURED, "its budget is too small")
    assert (second["error"], third) == ("no data", None)


# ── as a user meets it ──────────────────────────────────────────────────────────────────────────────────────────────
LAB = """\
name: tiny
inventories: [lab.yaml, poor.yaml]
models: [./model]
data: [{name: data.jsonl, text: body, label: kind}]
methods: {lora: {}}
run: {length: 16, rounds: 6, steps: 2, learning_rate: 0.02}
protocol: {quality_under_budget: {bytes: "500 KiB"}}
"""
ONE_DEVICE = """\
defaults: {kind: emulated, profile: raspberry_pi_5_4gb}
devices: {only: {budget: {memory: "640 MiB"}}}
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A tiny lab, and beside it one in which no device can take part."""
    folder = make_lab(tmp_path)
    (folder / "lab.yaml").write_text(ONE_DEVICE)
    (folder / "poor.yaml").write_text(ONE_DEVICE.replace("640 MiB", "80 MiB"))
    (folder / "tiny.yaml").write_text(LAB)
    monkeypatch.setenv("TESTBED_CACHE", str(folder / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
@pytest.mark.cgroup
@pytest.mark.timeout(300)
def test_a_dry_run_tells_what_is_ahead_and_a_run_that_was_killed_under_a_budget_counts_what_it_had_spent(lab, capsys):
    assert main(["experiment", "tiny.yaml", "--dry-run"]) == 1
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert "order: 1 block, one for each seed (0); within a block drawn by order_seed 0" in said
    assert ["lora,", "poor.yaml,", "seed", "0", *"–––––", "cannot", "be", "run"] in lines
    assert "cannot be run: lora, poor.yaml: no device can take part in this run" in said
    assert "bytes modelled: its budget, which ends it" in said
    assert "memory by the plan: lora, lab.yaml: at most" in said
    assert "disk: nothing is known of it" in said
    assert not (lab / "runs").exists()

    (lab / "tiny.yaml").write_text(LAB.replace(", poor.yaml", ""))
    words = [sys.executable, "-m", "testbed", "experiment", "tiny.yaml"]
    how = {"env": os.environ, "cwd": lab, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(words, **how, start_new_session=True) as process:
        while not list(lab.glob("runs/lora-*/checkpoint/round-00001")) and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    (path,) = lab.glob("runs/lora-*")
    assert RunFolder(path).status.state == "interrupted"
    done = subprocess.run(words, check=False, timeout=200, **how)
    assert done.returncode == 0, done.stdout
    run = RunFolder(path)
    stop, costs = run.status.facts[FACT], round_costs(run)
    assert [cost.round for cost in costs] == list(range(stop["round"] + 1))
    assert stop["by"] == "bytes"
    assert all(0 < record.evaluation_seconds < record.seconds for record in run.rounds()), "every round is evaluated"
    assert costs[-2].bytes < 500 * 1024 <= costs[-1].bytes == stop["reached"]
    assert (stop["counted"], stop["accuracy"]) == (stop["round"] - 1, costs[-2].accuracy)
    assert f"ended after round {stop['round'] + 1}: " in done.stdout
