"""The memory frontier: its searches, its predictions, its records, and one that real jobs confirm under a real cap."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from testbed.cli import main
from testbed.config import default_inventory, load_inventory
from testbed.errors import LimitError, StoreError, UsageError
from testbed.frontier.axes import Asked, Ground, Predicted, axis_of, predicted_point
from testbed.frontier.finding import Search, check_room, find_frontier
from testbed.frontier.record import (
    AXES,
    BATCH_SIZE,
    LENGTH,
    MEMORY,
    MODEL,
    SUBMODEL,
    Frontier,
    FrontierPoint,
    Trial,
    all_frontiers,
    load,
    path_of,
    save,
)
from testbed.frontier.search import MOST_TRIALS, bracket, largest, next_trial
from testbed.frontier.trials import filled_shard
from testbed.inventory import Budget, Inventory
from testbed.measurement import PeakMemory
from testbed.method import IMAGE_CLASSIFICATION, Workload
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.model.footprint import Baseline
from testbed.options import data_settings
from testbed.plan import fit
from testbed.plugins import restore_method
from testbed.prepare import prepare
from testbed.run import RunConfig
from tests.drills import MIB, device
from tests.tiny_lab import make_lab

BASELINE = Baseline(bytes=200 * MIB, library_bytes=20 * MIB, first_step_bytes=10 * MIB)


# ── the searches ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 33])
def test_the_largest_value_is_found_from_wherever_the_search_starts(count):
    values = [3 * index + 5 for index in range(count)]
    for able in range(count + 1):
        for start in (0, *values, 1000):
            found = largest(values, lambda value, able=able: value in values[:able], start)
            assert found == (values[able - 1] if able else None)


def simulated(values, able, guess):
    """The trials of a device that can do the first `able` values, and a prediction that says `guess` of them."""
    survived = {}

    def within(share):
        count = min(len(values), int(share * guess))
        return values[count - 1] if count else None

    while (value := next_trial(values, survived, within)) is not None:
        assert value not in survived, "the same value was tried twice"
        survived[value] = value in values[:able]
    return survived


def test_a_prediction_within_two_percent_is_confirmed_exactly():
    values = range(1, 401)
    for able in (1, 2, 50, 51, 199, 200, 399, 400):
        for guess in {able, round(able * 0.98), round(able * 1.02)}:
            survived = simulated(values, able, guess)
            low, high = bracket(values, survived)
            assert (low, high) == (able - 1, able), (able, guess, survived)


def test_whatever_the_prediction_trials_are_few_and_never_contradict_themselves():
    values = range(1, 200)
    for able in range(0, 200, 11):
        for guess in range(0, 400, 23):
            survived = simulated(values, able, guess)
            low, high = bracket(values, survived)
            assert 1 <= len(survived) <= MOST_TRIALS
            assert low < able <= high


def test_one_trial_tells_of_a_device_that_holds_all_there_is_or_nothing():
    assert simulated([12], 1, 1) == {12: True}
    assert simulated([12], 0, 0) == {12: False}


# ── the prediction, against asking for every value there is ──────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"), hidden_size=512)


@pytest.fixture(scope="module")
def base(lab):
    return BaseModel.open(lab / "model", ContentStore(lab / "content"), "sequence_classification", 4)


def ground(base, method, budget_bytes, **work):
    workload = Workload(labels=4, **{"batch_size": 4, "length": 16, **work})
    return Ground(restore_method(method, {}), base.shape, workload, device(memory_bytes=budget_bytes), BASELINE)


@pytest.mark.parametrize(
    ("axis_name", "budget_mib"),
    [(SUBMODEL, 0), (SUBMODEL, 245), (SUBMODEL, 285), (SUBMODEL, 2000), (LENGTH, 302)],
)
def test_what_is_predicted_is_the_largest_of_all_values(base, axis_name, budget_mib):
    about = ground(base, "fedpruner", budget_mib * MIB)
    axis = axis_of(axis_name, about)
    if axis_name == LENGTH:
        axis = replace(axis, values=range(12, 20))  # each of them is traced
    predicted = Predicted(about, axis)
    point = predicted_point(about, axis, predicted)
    admitted = [value for value in axis.values if predicted.of(value).bytes <= about.budget_bytes]
    edge = [value for value in axis.values if predicted.of(value).unreclaimable_bytes <= about.budget_bytes]
    assert point.predicted == max(admitted, default=None)
    assert point.edge == max(edge, default=None)
    assert (point.refusal is None) == bool(admitted)
    assert point.limited_by == (MODEL if point.predicted == point.limit else MEMORY)


def test_the_largest_batch_is_the_last_that_the_plan_admits(base):
    about = ground(base, "fedpruner", 330 * MIB)
    point = predicted_point(about, axis := axis_of(BATCH_SIZE, about), Predicted(about, axis))
    held = about.held_submodel()

    def admitted(batch):
        return about.footprint(Asked(held, replace(about.work, batch_size=batch))).bytes <= about.budget_bytes

    assert admitted(point.predicted)
    assert not admitted(point.predicted + 1)
    assert point.held == {"length": 16, "submodel": f"{len(held.blocks)} of 4 blocks"}


def test_the_largest_submodel_is_the_plans_own(base):
    about = ground(base, "fedpruner", 302 * MIB)
    planned = fit(about.method, about.shape, about.work, about.budget_bytes, about.baseline)
    point = predicted_point(about, axis := axis_of(SUBMODEL, about), Predicted(about, axis))
    assert 1 <= point.predicted < 4
    assert (point.predicted, point.predicted_bytes) == (len(planned.submodel.blocks), planned.predicted_bytes)


def test_choices_that_differ_in_more_than_blocks_are_numbered_and_told_in_words(base):
    axis = axis_of(SUBMODEL, ground(base, "fed_pilot", 2000 * MIB))
    assert (axis.unit, list(axis.values)) == ("choices", [1, 2, 3, 4])
    assert axis.words(2) == "4 of 4 blocks, 2 of them trained (choice 2 of 4)"


def test_a_length_ends_where_the_model_or_the_method_does(base):
    assert axis_of(LENGTH, ground(base, "lora", 2000 * MIB)).values[-1] == 32
    method = restore_method("fedprompt", {"tokens": 8})
    axis = axis_of(LENGTH, replace(ground(base, "lora", 2000 * MIB), method=method))
    assert (axis.values[-1], axis.limited_by) == (24, MODEL)


def test_images_have_no_length(base):
    with pytest.raises(UsageError, match="images have no length"):
        axis_of(LENGTH, ground(base, "lora", 2000 * MIB, task=IMAGE_CLASSIFICATION))


# ── the record ───────────────────────────────────────────────────────────────────────────────────────────────────────
def trial(value, outcome, estimate=90):
    return Trial(value, f"{value} tokens", outcome, 120, 100, PeakMemory(80, estimate, 95, {"upper": "cgroup2_peak"}))


def point_of(*trials, **changes):
    point = FrontierPoint(
        device="board", kind="emulated", profile="test", accelerator="cpu", threads=1, budget_bytes=100, axis=LENGTH,
        unit="tokens", held={"batch_size": 4, "submodel": "4 of 4 blocks"}, limit=512, limited_by=MEMORY, predicted=7,
        trials=trials,
    )  # fmt: skip
    return replace(point, **changes)


FRONTIER = Frontier(
    "lora-1", "2026-01-01", "lora", {"rank": 8}, "quickstart", "causal_lm", {"length": 64}, "lab.yaml", {}
)


def test_a_point_says_what_survived_below_what_did_not():
    point = point_of(trial(9, "finished"), trial(14, "out_of_memory"), trial(10, "finished"), trial(11, "over_budget"))
    assert (point.confirmed, point.refuted, point.measured_peak.estimate_bytes) == (10, 11, 90)
    assert point.bytes_error == pytest.approx(100 / 90 - 1)
    assert point_of(trial(9, "unreachable")).confirmed is None
    assert point_of(trial(9, "unreachable")).refuted is None


def test_a_record_comes_back_as_it_was_written(tmp_path):
    frontier = FRONTIER.with_point(point_of(trial(9, "finished"), trial(14, "out_of_memory", None)))
    path = save(frontier, tmp_path)
    assert load(path) == frontier
    assert all_frontiers(tmp_path) == [frontier]
    [plain] = json.loads(path.read_text())["points"]
    assert (plain["confirmed"], plain["refuted"], plain["measured_peak"]["upper_bytes"]) == (9, 14, 95)


def test_a_point_takes_the_place_of_the_devices_former_one():
    frontier = FRONTIER.with_point(point_of()).with_point(point_of(predicted=8)).with_point(point_of(axis=SUBMODEL))
    assert [(point.axis, point.predicted) for point in frontier.points] == [(LENGTH, 8), (SUBMODEL, 7)]
    assert [point.axis for point in frontier.only(["board", "other"], AXES).points] == [SUBMODEL, LENGTH]


@pytest.mark.parametrize("text", ["{", "[]", '{"id": "lora-1"}'])
def test_a_file_that_is_no_record_is_told_with_its_path(tmp_path, text):
    path = path_of(tmp_path, "lora-1")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(StoreError, match=str(path)):
        all_frontiers(tmp_path)


# ── a batch that is as full as it can be ─────────────────────────────────────────────────────────────────────────────
def config_of(lab, **changes):
    data = data_settings(str(lab / "data.jsonl"), ["text=body", "label=kind"])
    small = {"model": str(lab / "model"), "data": data, "batch_size": 4, "length": 16}
    return RunConfig(method="fedpruner", **{**small, **changes})


def inventory_of(*devices):
    return Inventory(devices, "lab.yaml")


@pytest.fixture
def cache(lab, monkeypatch):
    monkeypatch.setenv("TESTBED_CACHE", str(lab / "cache"))


def test_a_batch_is_filled_from_texts_that_are_shorter_and_fewer(lab, cache):
    data = prepare(config_of(lab), inventory_of(device(memory_bytes=8192 * MIB))).data
    assert max(len(example.ids) for example in data.train) < 30
    shard = filled_shard(data, 500, 30)
    batch = shard.batch(range(len(shard)), 30, 0)
    assert tuple(batch.input_ids.shape) == (500, 30)
    assert batch.attention_mask.sum() == 500 * 29 + 1  # padded, as batches are


# ── devices, asked through the command ───────────────────────────────────────────────────────────────────────────────
TWINS = """\
defaults: {kind: emulated, profile: raspberry_pi_5_4gb}
devices:
  one: {budget: {memory: "640 MiB"}}
  two: {budget: {memory: "640 MiB"}}
  tight: {budget: {memory: "100 MiB"}}
"""


def words(lab, *more):
    return [
        "--inventory", str(lab / "twins.yaml"), "--model", str(lab / "model"), "--data", str(lab / "data.jsonl"),
        "--data-set", "text=body", "--data-set", "label=kind", "--length", "16", "--runs", str(lab / "twins"), *more,
    ]  # fmt: skip


def test_devices_that_are_alike_are_asked_once_and_one_that_holds_nothing_says_what_it_would_need(lab, cache, capsys):
    (lab / "twins.yaml").write_text(TWINS)
    assert main(["frontier", "fedpruner", *words(lab, "--vary", "submodel", "--json")]) == 0
    found = {point["device"]: point for point in json.loads(capsys.readouterr().out)["points"]}
    assert found["two"]["same_as"] == "one"
    assert found["two"]["predicted"] == found["one"]["predicted"] == 4
    tight = found["tight"]
    assert (tight["predicted"], tight["trials"]) == (None, [])
    assert tight["needed_bytes"] > 100 * MIB
    assert "the budget is 100 MiB" in tight["refusal"]
    assert main(["frontier", "fedpruner", *words(lab, "--vary", "submodel")]) == 0
    assert "two: as one, by profile and budget; asked once" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["lorra"], "lora"),
        (["lora", "--only", "moon"], "no device has the name, tag or profile 'moon'"),
        (["lora", "--vary", "width"], "'width' is not one of 'submodel', 'batch_size', 'length'"),
        (["lora", "--batch-size", "0"], "batch-size=0: expected at least 1"),
        (["lora", "--set", "rnak=3"], "rank"),
        ([], "Missing argument"),
    ],
)
def test_what_was_asked_wrongly_is_told_in_one_message(given, told, capsys):
    assert main(["frontier", *given]) == 2
    assert told in capsys.readouterr().err


def test_a_budget_beyond_what_is_free_here_is_not_filled():
    huge = device("huge", memory_bytes=1 << 50)
    with pytest.raises(LimitError, match="huge: emulated here with a budget beyond"):
        check_room(inventory_of(device(), huge))
    check_room(load_inventory(default_inventory()).select(["raspberry-pi-4"]))


def test_a_length_at_which_the_model_has_no_positions_is_refused_unless_it_varies(lab, cache, tmp_path):
    devices = inventory_of(device())
    with pytest.raises(UsageError, match="--length 999: this model takes up to 32 tokens"):
        find_frontier(config_of(lab, length=999), devices, tmp_path, Search(axes=(BATCH_SIZE,)))


# ── real jobs under a real cap ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.slow
@pytest.mark.cgroup
def test_real_jobs_confirm_the_frontier_and_an_interrupted_search_goes_on(lab, cache, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    devices = inventory_of(replace(device(), budget=Budget(480 * MIB)))
    made = []

    def interrupt(point):
        made.append(point.trials[-1].value)
        raise KeyboardInterrupt

    search = Search(axes=(BATCH_SIZE,), confirm=True, steps=3, tried=interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_frontier(config_of(lab, length=32), devices, tmp_path, search)
    [kept] = all_frontiers(tmp_path)
    assert [trial.value for trial in kept.points[0].trials] == made

    search = replace(search, tried=lambda point: made.append(point.trials[-1].value))
    [point] = find_frontier(config_of(lab, length=32), devices, tmp_path, search).points
    assert len(made) == len(set(made)) == len(point.trials) <= MOST_TRIALS
    assert point.confirmed < point.refuted
    assert point.trial_of(point.refuted).outcome in {"out_of_memory", "over_budget"}
    assert point.trial_of(point.refuted).limit_bytes == 480 * MIB
    peak = point.measured_peak
    assert 0 < peak.estimate_bytes <= 480 * MIB
    assert set(peak.sources) >= {"estimate", "upper"}
    assert abs(point.bytes_error) < 0.1
    assert point.predicted <= point.confirmed, "the plan admitted what the cap kills"
    assert not list((tmp_path / "frontiers").glob("*.trials"))

    find_frontier(
        config_of(lab, length=32), devices, tmp_path, replace(search, tried=lambda _: pytest.fail("it was known"))
    )
