"""`testbed verify`: every figure derived again; whatever is changed afterwards is found, and by which check."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.cli import main
from testbed.job import FAILED, OUT_OF_MEMORY, Result
from testbed.manifest import MANIFEST, SEALED, differences, seal
from testbed.measurement import Measurement, PeakMemory, PhaseMeasurement
from testbed.node.memory import PhaseMeter
from testbed.run_record import INTERRUPTED, RUNNING
from testbed.store import RunFolder
from testbed.verification.checks import FAILS, HOLDS, UNKNOWN
from testbed.verification.peaks import check_peaks, rows_kept
from testbed.verification.run import verify
from tests.node.unified_board import UnifiedBoard
from tests.whole_runs import base_model, make_run, work_of_devices

RUN = "lora-20260101-000000-abcd"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A sealed run, made once."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_CACHE", str(folder / "cache"))
        make_run(folder / "runs", RUN, base_model(folder / "model"), work_of_devices(folder))
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A copy of it that a test may change."""
    monkeypatch.setenv("TESTBED_CACHE", str(made / "cache"))
    shutil.copytree(made / "runs", tmp_path / "runs")
    return RunFolder(tmp_path / "runs" / RUN)


def verdicts(folder):
    return {check.name: check.verdict for check in verify(folder, data=False).checks}


def failing(folder):
    return {check.name: check.failures for check in verify(folder, data=False).checks if check.verdict == FAILS}


def test_a_run_as_it_was_sealed_holds(run):
    found = verdicts(run)
    assert set(found.values()) == {HOLDS}
    assert list(found) == [
        "files", "results", "rounds", "times", "peaks", "energy", "state", "export", "base model", "versions",
    ]  # fmt: skip


def test_a_window_that_was_not_valid_when_the_run_ended_is_told_and_is_no_failure(run):
    (energy,) = [check for check in verify(run, data=False).checks if check.name == "energy"]
    assert energy.verdict == HOLDS
    assert any("at least 10 are needed" in note for note in energy.notes)


# ── what is changed afterwards ──────────────────────────────────────────────────────────────────────────────────────
def lines_of(path):
    return path.read_text().splitlines()


def change_line(path, choose, column, by):
    """Change one number on the line that `choose` finds: the number of a line among those with numbers."""
    lines = lines_of(path)
    first = next(number for number, line in enumerate(lines) if line.startswith(("phase,", "seconds,"))) + 1
    number = first + choose([line.split(",") for line in lines[first:]])
    words = lines[number].split(",")
    words[column] = str(type(by)(words[column]) + by)
    path.write_text("\n".join([*lines[:number], ",".join(words), *lines[number + 1 :]]) + "\n")


def largest(column):
    return lambda rows: max(range(len(rows)), key=lambda index: int(rows[index][column]))


def most_resident(rows):
    return max(range(len(rows)), key=lambda index: int(rows[index][4]) + int(rows[index][5]))


def samples(folder, suffix=".csv", job="run-r1-c0"):
    return folder.path / "samples" / f"{job}{suffix}"


def a_sample_of_memory_more(folder):
    change_line(samples(folder), largest(6), 6, 4096)


def another_file_size(folder):
    change_line(samples(folder), most_resident, 5, 4096)


def a_higher_mark(folder):
    change_line(samples(folder), largest(3), 3, 4096 << 10)


def no_last_sample_of_memory(folder):
    samples(folder).write_text("\n".join(lines_of(samples(folder))[:-1]) + "\n")


def no_samples_of_memory(folder):
    samples(folder).unlink()


def a_watt_more(folder):
    change_line(samples(folder, ".replay.power.csv"), lambda rows: len(rows) // 2, 2, 1.0)


def power_cut_off(folder):
    path = samples(folder, ".replay.power.csv")
    path.write_text("\n".join(lines_of(path)[:-1]) + "\n")


def no_power(folder):
    samples(folder, ".replay.power.csv").unlink()


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def result_file(folder, job="run-r1-c0"):
    return folder.path / "results" / f"{job}.json"


def another_outcome(folder):
    edit_json(result_file(folder), lambda content: content.update(outcome=FAILED))


def another_peak(folder):
    def edit(content):
        for phase in content["measurement"]["phases"]:
            if phase["name"] == "train":
                phase["peak"]["estimate_bytes"] -= 4096

    edit_json(result_file(folder), edit)


def a_faster_phase(folder):
    edit_json(result_file(folder), lambda content: content["measurement"]["phases"][-1].update(seconds=0.0))


def another_device(folder):
    edit_json(result_file(folder), lambda content: content.update(device="orin"))


def fewer_bytes(folder):
    edit_json(
        result_file(folder),
        lambda content: content["tensors"].append({"name": "b", "dtype": "F32", "shape": [9999], "ranges": None}),
    )


def another_loss(folder):
    edit_json(result_file(folder), lambda content: content["scalars"].update(loss=0.1))


def no_result(folder):
    result_file(folder).unlink()


def a_result_twice(folder):
    shutil.copy(result_file(folder), folder.path / "results" / "again.json")


def half_a_result(folder):
    path = result_file(folder)
    path.write_text(path.read_text()[:100])


def change_round(edit):
    def change(folder):
        path = folder.path / "rounds.jsonl"
        rounds = [json.loads(line) for line in lines_of(path)]
        edit(rounds)
        path.write_text("".join(json.dumps(record) + "\n" for record in rounds))

    return change


no_first_round = change_round(lambda rounds: rounds.pop(0))
no_last_round = change_round(lambda rounds: rounds.pop())
a_better_quality = change_round(lambda rounds: rounds[1]["quality"].update(accuracy=0.99))
an_impossible_quality = change_round(lambda rounds: rounds[1]["quality"].update(accuracy=1.5))
a_loss_that_is_no_number = change_round(lambda rounds: rounds[1]["quality"].update(loss=float("nan")))


def newest(folder):
    return folder.path / "checkpoint" / "round-00002"


def a_weight_in_the_checkpoint(folder):
    path = newest(folder) / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def an_older_checkpoint_only(folder):
    shutil.rmtree(newest(folder))


def a_weight_in_the_export(folder):
    path = folder.path / "export" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def half_an_export(folder):
    path = folder.path / "export" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def another_rank_in_the_export(folder):
    edit_json(folder.path / "export" / "adapter_config.json", lambda content: content.update(r=4))


def a_further_file(folder):
    (folder.path / "samples" / "more.csv").write_text("1\n")


def another_setting(folder):
    edit_json(folder.path / "config.json", lambda content: content.update(seed=9))


@pytest.mark.parametrize(
    ("change", "found_by"),
    [
        (a_sample_of_memory_more, {"peaks"}),
        (another_file_size, {"peaks"}),
        (a_higher_mark, {"peaks"}),
        (no_last_sample_of_memory, {"peaks"}),
        (no_samples_of_memory, {"peaks"}),
        (a_watt_more, {"energy"}),
        (power_cut_off, {"energy"}),
        (no_power, {"energy"}),
        (another_outcome, {"rounds"}),
        (another_peak, {"peaks"}),
        (a_faster_phase, {"times", "energy"}),
        (another_device, {"results"}),
        (fewer_bytes, {"results"}),
        (another_loss, {"rounds"}),
        (no_result, {"rounds", "energy"}),
        (a_result_twice, {"results", "rounds"}),
        (half_a_result, {"results", "rounds", "energy"}),
        (no_first_round, {"rounds", "state"}),
        (no_last_round, {"rounds", "state"}),
        (a_better_quality, set()),
        (an_impossible_quality, {"rounds"}),
        (a_loss_that_is_no_number, {"rounds"}),
        (a_weight_in_the_checkpoint, {"state"}),
        (an_older_checkpoint_only, {"state"}),
        (a_weight_in_the_export, {"export"}),
        (half_an_export, {"export"}),
        (another_rank_in_the_export, {"export"}),
        (a_further_file, set()),
        (another_setting, set()),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_was_changed_is_found_by_its_hash_and_by_what_is_derived_from_it(run, change, found_by):
    change(run)
    assert failing(run).keys() == {"files", *found_by}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (a_watt_more, "samples/run-r1-c0.replay.power.csv has changed"),
        (no_result, "results/run-r1-c0.json is missing"),
        (a_further_file, "samples/more.csv was added"),
    ],
)
def test_the_file_is_named(run, change, word):
    change(run)
    assert failing(run)["files"] == (word,)


def test_a_manifest_that_was_made_anew_is_not_the_one_of_the_status(run):
    a_better_quality(run)
    edit_json(run.path / MANIFEST, lambda content: content.update({"rounds.jsonl": "0" * 64}))
    assert failing(run) == {"files": ("manifest.json is not the one whose hash the status has",)}


def test_a_message_names_job_phase_and_both_figures(run):
    a_sample_of_memory_more(run)
    (message,) = failing(run)["peaks"]
    lower = max(phase.peak.lower_bytes or 0 for phase in run.results()[1].measurement.phases)
    assert message.startswith("run-r1-c0, phase ")
    assert f"({lower + 4096} B) as the lower bound, the result says" in message
    assert message.endswith(f"({lower} B)")


# ── what cannot be checked ──────────────────────────────────────────────────────────────────────────────────────────
def test_a_run_from_before_there_were_seals_says_so_and_fails_nothing(run):
    (run.path / MANIFEST).unlink()
    (run.path / "energy.json").unlink()
    run.note(**{SEALED: None})
    found = verdicts(run)
    assert {name for name, verdict in found.items() if verdict == UNKNOWN} == {"files", "energy"}
    assert verify(run, data=False).holds


def test_a_run_without_its_status_does_not_hold_and_is_compared_with_its_manifest(run):
    a_better_quality(run)
    (run.path / "status.json").unlink()
    assert failing(run)["files"] == ("status.json is missing", "rounds.jsonl has changed")


def test_a_run_with_neither_status_nor_manifest_does_not_hold(run):
    (run.path / "status.json").unlink()
    (run.path / MANIFEST).unlink()
    assert failing(run)["files"][0] == "status.json is missing"


def test_a_manifest_counts_where_its_hash_was_taken_out_of_the_status(run):
    a_better_quality(run)
    edit_json(run.path / "status.json", lambda content: content["facts"].pop(SEALED))
    assert failing(run)["files"] == ("rounds.jsonl has changed",)


def test_what_older_records_have_of_a_group_that_nothing_was_charged_to_is_no_failure(run):
    def edit(content):
        for phase in content["measurement"]["phases"]:
            if phase["name"] == "train":
                phase["peak"].update(lower_bytes=0, upper_bytes=0)

    edit_json(result_file(run), edit)
    (result,) = [each for each in run.results() if each.job == "run-r1-c0"]
    path = samples(run)
    lines = [line.split(",") for line in lines_of(path)]
    path.write_text("".join(",".join([*w[:6], "0"] if w[1] == "train" else w) + "\n" for w in lines))
    assert check_peaks(run, [result]).failures == ()


def test_a_missing_sample_file_is_called_missing(run):
    no_samples_of_memory(run)
    (failure,) = failing(run)["peaks"]
    assert failure.endswith("run-r1-c0.csv: missing; the run folder is not complete")


def test_an_unreadable_result_is_told_once_and_no_loss_is_called_none(run, caplog):
    for job in ("run-r0-c0", "run-r1-c0"):
        path = result_file(run, job)
        path.write_text(path.read_text()[:100])
    found = failing(run)
    assert len(caplog.records) == 2
    assert any("the results give no training loss" in failure for failure in found["rounds"])


def test_a_run_that_goes_on_is_not_sealed_until_it_ends_again(run):
    run.set_status(RUNNING, **{SEALED: None})
    run.record_reference(majority=0.41)
    run.set_status(INTERRUPTED)
    assert verdicts(run)["files"] == UNKNOWN
    assert seal(run)
    assert verdicts(run)["files"] == HOLDS


def test_another_process_at_work_is_left_alone(run):
    run.set_status(RUNNING)
    (check,) = verify(run).checks
    assert (check.verdict, check.name) == (UNKNOWN, "run")
    assert f"process {os.getpid()} is running it" in check.found


def test_what_is_measured_of_the_model_afterwards_does_not_break_the_seal(run):
    (run.path / "evaluations").mkdir()
    (run.path / "evaluations" / "mine.json").write_text("{}")
    (run.path / "nodes").mkdir(exist_ok=True)
    (run.path / "nodes" / "left").write_text("")
    assert differences(run.path).none


def test_a_base_model_that_is_gone_or_another_is_told(run, made):
    edit_json(run.path / "config.json", lambda content: content.update(model=str(made / "nowhere")))
    assert verdicts(run)["base model"] == UNKNOWN
    assert verdicts(run)["export"] == HOLDS  # its files are well-formed; more cannot be said without the base


def test_an_installation_that_is_another_one_is_a_note(run):
    edit_json(run.path / "versions.json", lambda content: content["packages"].update(torch="1.0"))
    (versions,) = [check for check in verify(run, data=False).checks if check.name == "versions"]
    assert versions.verdict == HOLDS
    assert any(note.startswith("torch: 1.0 then, ") for note in versions.notes)


def test_data_that_cannot_be_read_again_cannot_be_checked(run, tmp_path):
    rows = "".join(f'{{"text": "words {index} of {index % 2}", "label": "{index % 2}"}}\n' for index in range(40))
    (tmp_path / "mine.jsonl").write_text(rows)
    edit_json(run.path / "config.json", lambda content: content.update(data={"name": str(tmp_path / "mine.jsonl")}))
    (data,) = [check for check in verify(run).checks if check.name == "data"]
    assert data.verdict == UNKNOWN  # the tiny model has no tokenizer
    assert "tokenizer" in data.found


# ── peaks, against the node's own derivation ────────────────────────────────────────────────────────────────────────
def stored(folder, phases, outcome="finished"):
    made = tuple(
        PhaseMeasurement(
            phase["name"], phase["seconds"], PeakMemory(**phase["peak"]), tuple(map(tuple, phase["trace"]))
        )
        for phase in phases
    )
    result = Result("job-1", 0, 0, outcome, "board", measurement=Measurement(made))
    (folder.path / "samples").mkdir(parents=True)
    (folder.path / "results").mkdir()
    folder.record_result(result)
    return folder.results()


def status(folder, *, high, anonymous, file):
    (folder / "7").mkdir(exist_ok=True)
    (folder / "7" / "clear_refs").touch()
    (folder / "7" / "status").write_text(
        f"VmHWM:\t{high} kB\nVmRSS:\t{anonymous + file} kB\nRssAnon:\t{anonymous} kB\nRssFile:\t{file} kB\n"
    )


@pytest.mark.parametrize("count", [999, 1000, 1001, 2000, 2500, 4100])
def test_as_many_samples_are_expected_as_an_agent_keeps(tmp_path, count):
    status(tmp_path, high=100, anonymous=60, file=40)
    meter = PhaseMeter(7, None, tmp_path)
    meter.begin("train")
    for number in range(count - 2):
        if number == count // 3:
            status(tmp_path, high=500, anonymous=300, file=50)
        meter.sample()
    phase = meter.end()
    assert phase["peak"]["samples"] == count
    assert len(phase["trace"]) == rows_kept(count)
    folder = RunFolder(tmp_path / "run")
    assert check_peaks(folder, stored(folder, [phase])).verdict == HOLDS


def test_a_trainer_that_died_may_have_had_a_higher_mark_than_any_sample_saw(tmp_path):
    status(tmp_path, high=100, anonymous=60, file=40)
    meter = PhaseMeter(7, None, tmp_path)
    meter.begin("train")
    phase = meter.end(dead=900 << 10)
    folder = RunFolder(tmp_path / "run")
    results = stored(folder, [phase], OUT_OF_MEMORY)
    assert check_peaks(folder, results).verdict == HOLDS
    assert check_peaks(folder, [replace(results[0], outcome="finished")]).verdict == FAILS


moments = st.fixed_dictionaries({name: st.integers(0, 1000) for name in ("anonymous", "file", "kernel", "held")})


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    version=st.sampled_from(["v1", "v2", None]),
    charges=st.booleans(),
    knows=st.booleans(),
    table=st.booleans(),
    reserved=st.sampled_from([None, 300 << 10]),
    timeline=st.lists(st.lists(moments, min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_peaks_of_a_board_with_an_accelerator_are_derived_again(version, charges, knows, table, reserved, timeline):
    with TemporaryDirectory() as folder:
        board = UnifiedBoard(Path(folder), version=version, charges=charges, table=table)
        meter = board.meter(charges if knows else None, 0)
        phases = []
        for name, moves in enumerate(timeline):
            meter.begin(f"phase {name}")
            for move in moves:
                board.moves_to(**move)
                meter.sample()
            phases.append(meter.end(reserved=reserved))
        run = RunFolder(Path(folder) / "run")
        check = check_peaks(run, stored(run, phases))
        assert check.verdict == HOLDS, check.failures


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_command_ends_with_0_when_all_holds_and_with_1_when_anything_does_not(run, capsys):
    runs = ["--runs", str(run.path.parent), "--no-data"]
    assert main(["verify", "lora", *runs]) == 0
    assert f"run {RUN} (finished): holds" in capsys.readouterr().out
    a_watt_more(run)
    assert main(["verify", "lora", *runs]) == 1
    printed = capsys.readouterr().out
    assert f"run {RUN} (finished): does not hold" in printed
    assert "- samples/run-r1-c0.replay.power.csv has changed" in printed


def test_the_command_as_json_has_every_check_with_its_failures(run, capsys):
    a_watt_more(run)
    assert main(["verify", "lora", "--json", "--no-data", "--runs", str(run.path.parent)]) == 1
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["run"], told["verdict"]) == (RUN, FAILS)
    files = next(check for check in told["checks"] if check["name"] == "files")
    assert files["failures"] == ["samples/run-r1-c0.replay.power.csv has changed"]


def test_an_unknown_run_is_told_with_those_that_there_are(run, capsys):
    assert main(["verify", "lara", "--runs", str(run.path.parent)]) == 1
    assert f"did you mean {RUN}" in capsys.readouterr().err
