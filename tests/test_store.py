from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from testbed import checkpoints
from testbed.durable import write_json
from testbed.environment import describe_environment
from testbed.errors import StoreError
from testbed.method import State
from testbed.model.combine import state_hash
from testbed.run_index import MIGRATIONS, RunIndex
from testbed.store import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    RunFolder,
    list_runs,
    new_run_id,
    reindex,
)
from tests.run_records import add_rounds, finished, out_of_memory, planned, quality, record


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", "lora-20260314-150926-5f3a", record())


def some_state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(6, 4, generator=generator)
    return State(
        tensors={"a": whole[:3], "b": whole.t(), "half": whole.bfloat16(), "b again": whole, "steps": torch.tensor(3)},
        scalars={"rate": 0.1, "chosen": [[0, 3], [1]], "name": "Ω"},
        blocks=("h0", "h1"),
    )


def assert_same(one: State, other: State) -> None:
    assert list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype
        assert torch.equal(tensor, other.tensors[name])
    assert (one.scalars, one.blocks) == (other.scalars, other.blocks)


def test_a_folder_stands_alone(folder, tmp_path):
    """What was written comes back equal, from a copy of the folder somewhere else."""
    results = [finished(0, 0, "orin-1", 735), out_of_memory(1, 0, "orin-1", 800)]
    for result in reversed(results):
        folder.record_result(result)
    add_rounds(folder, [None, 0.5])
    moved = folder.path.rename(tmp_path / "elsewhere")
    again = RunFolder.open(tmp_path / "nowhere", f"{moved}")
    assert again.results() == results
    assert [r.quality and r.quality["accuracy"] for r in again.rounds()] == [None, 0.5]
    assert again.record.plan["clients"][0]["blocks"] == list(range(12))
    assert again.record.inventory["devices"][0]["profile"]["name"] == "pi-4"
    assert again.config["seed"] == 7


def test_run_ids_sort_by_time_and_differ():
    ids = {new_run_id("lora") for _ in range(50)}
    assert all(re.fullmatch(r"lora-\d{8}-\d{6}-[0-9a-f]{4}", name) for name in ids)
    assert len(ids) > 1


def test_the_same_name_twice_is_refused(folder):
    with pytest.raises(StoreError, match=r"there is a run of this name already; continue it with `--resume"):
        RunFolder.create(folder.path.parent, folder.run_id, record())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("lora-20260314-150926-5f3b", r"there is no run 'lora-20260314-150926-5f3b'; did you mean lora-2026"),
        ("zzz", r"there is no run 'zzz'; the newest are lora-.*`testbed runs` lists all"),
        ("lora-", r"2 runs begin with 'lora-': lora-20260314-150926-5f3a, lora-20260315-000000-0000; say more"),
        ("../runs", r"there is no run '../runs'"),
        ("", r"there is no run ''"),
    ],
)
def test_a_run_that_does_not_exist_is_named_with_its_neighbours(folder, asked, message):
    RunFolder.create(folder.path.parent, "lora-20260315-000000-0000", record())
    with pytest.raises(StoreError, match=message):
        RunFolder.open(folder.path.parent, asked)


def test_no_runs_at_all(tmp_path):
    with pytest.raises(StoreError, match=r"there is no run 'x', and no other"):
        RunFolder.open(tmp_path / "runs", "x")


def test_a_unique_beginning_is_enough(folder):
    assert RunFolder.open(folder.path.parent, "lora-2026").run_id == folder.run_id


# ── rounds and results after a kill ─────────────────────────────────────────────────────────────────────────────────
def test_a_line_cut_off_by_a_kill_costs_that_line_alone(folder):
    add_rounds(folder, [0.1, 0.2])
    with (folder.path / "rounds.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"round": 2, "sec')
    assert [r.round for r in folder.rounds()] == [0, 1]
    folder.record_round(2, seconds=1.0, learning_rate=0.1, quality=quality(0.3))
    assert [r.round for r in folder.rounds()] == [0, 1, 2]


def test_a_round_run_again_counts_once_with_its_last_figures(folder):
    add_rounds(folder, [0.1, 0.2])
    folder.record_round(1, seconds=99.0, learning_rate=0.1)
    assert [(r.round, r.seconds) for r in folder.rounds()] == [(0, 10.0), (1, 99.0)]


def test_a_job_run_again_replaces_its_result(folder):
    folder.record_result(out_of_memory(0, 0, "orin-1", 800))
    folder.record_result(finished(0, 0, "orin-1", 700))
    assert [result.outcome for result in folder.results()] == ["finished"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"job": 1}', "null"])
def test_a_damaged_result_is_left_out_and_told(folder, caplog, content):
    folder.record_result(finished(0, 0, "orin-1", 700))
    (folder.path / "results" / "bad.json").write_text(content)
    assert len(folder.results()) == 1
    assert "bad.json: left out, it is not a readable result" in caplog.text


def test_a_damaged_record_is_an_error_that_names_the_file(folder):
    (folder.path / "plan.json").write_text("{")
    with pytest.raises(StoreError, match=r"plan.json: not valid JSON"):
        _ = folder.plan
    (folder.path / "plan.json").write_text("[1]")
    with pytest.raises(StoreError, match=r"plan.json: expected a JSON object, got list"):
        _ = folder.plan


def test_spooled_updates_are_forgotten_together(folder):
    folder.update_path("run-r0-c0").write_bytes(b"1")
    folder.payload_path("run-r0-c0").write_bytes(b"2")
    folder.forget_updates(0)
    assert not folder.update_path("run-r0-c0").exists()
    assert not folder.payload_path("run-r0-c0").exists()


# ── reference, refits ───────────────────────────────────────────────────────────────────────────────────────────────
def test_reference_values_come_together(folder):
    folder.record_reference(no_fine_tuning=0.14)
    folder.record_reference(no_fine_tuning_loss=2.1)
    expected = {"majority": 0.125, "bag_of_words": 0.81, "no_fine_tuning": 0.14, "no_fine_tuning_loss": 2.1}
    assert folder.reference == expected


def test_refits_are_kept_in_the_plan(folder):
    folder.record_refit(2, planned(0, "orin-1", 800, 600, 9))
    folder.record_refit(2, planned(0, "orin-1", 800, 600, 9))
    assert [refit["from_round"] for refit in folder.plan["refits"]] == [2]
    assert len(folder.plan["clients"]) == 2


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_checkpoint_comes_back_bit_for_bit(folder):
    state = some_state()
    folder.save_checkpoint(state, 4, {"kept": {"0": "abc"}})
    loaded, round_index, extra = folder.load_checkpoint() or pytest.fail("no checkpoint")
    assert_same(loaded, state)
    assert (round_index, extra) == (4, {"kept": {"0": "abc"}})
    assert state_hash(loaded.tensors, loaded.scalars) == state_hash(state.tensors, state.scalars)


def test_a_state_without_tensors_has_a_checkpoint_too(folder):
    folder.save_checkpoint(State(scalars={"n": 1}), 0)
    loaded, *_ = folder.load_checkpoint() or pytest.fail("no checkpoint")
    assert (dict(loaded.tensors), loaded.scalars) == ({}, {"n": 1})


def test_no_checkpoint_is_none(folder):
    assert folder.load_checkpoint() is None


def test_the_newest_two_stay_and_nothing_else(folder):
    (folder.path / "checkpoint" / ".partial-1").mkdir()  # of a controller that was killed
    for index in range(4):
        folder.save_checkpoint(some_state(index), index)
    folder.save_checkpoint(some_state(9), 3)
    assert sorted(path.name for path in (folder.path / "checkpoint").iterdir()) == ["round-00002", "round-00003"]
    assert_same((folder.load_checkpoint() or pytest.fail("none"))[0], some_state(9))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", [checkpoints.TENSORS, checkpoints.HEADER])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(folder, caplog, name, damage):
    folder.save_checkpoint(some_state(0), 0)
    folder.save_checkpoint(some_state(1), 1)
    damage(folder.path / "checkpoint" / "round-00001" / name)
    loaded, round_index, _ = folder.load_checkpoint() or pytest.fail("no checkpoint")
    assert round_index == 0
    assert_same(loaded, some_state(0))
    assert "round-00001: damaged" in caplog.text


def test_nothing_but_damaged_checkpoints_is_an_error(folder, caplog):
    caplog.set_level(logging.CRITICAL)
    folder.save_checkpoint(some_state(0), 0)
    _flip(folder.path / "checkpoint" / "round-00000" / checkpoints.TENSORS)
    with pytest.raises(StoreError, match=r"none of 1 checkpoints can be read; start the run anew"):
        folder.load_checkpoint()


_SAVE_FOR_EVER = """
import sys, torch
from pathlib import Path
from testbed.method import State
from testbed.store import RunFolder
folder = RunFolder(Path(sys.argv[1]))
index = 0
while True:
    folder.save_checkpoint(State({"w": torch.full((2000,), float(index))}, {"index": index}), index)
    print(index, flush=True)
    index += 1
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(folder):
    """Killed while it saves round after round: what is loaded is at least what was confirmed, and of one piece."""
    for confirmed in (1, 2, 5):
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVE_FOR_EVER, str(folder.path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        with process:
            while int(process.stdout.readline()) < confirmed:
                pass
            process.kill()
        state, round_index, _ = folder.load_checkpoint() or pytest.fail("no checkpoint")
        assert round_index >= confirmed
        assert state.scalars["index"] == round_index
        assert bool((state.tensors["w"] == round_index).all())
        shutil.rmtree(folder.path / "checkpoint")


# ── a disk that does not take it ────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def small_files():
    """A limit on the size of files: every larger write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_with_the_way_out_and_costs_nothing_stored(folder, small_files):
    folder.save_checkpoint(some_state(0), 0)
    folder.record_result(finished(0, 0, "orin-1", 700))
    big = State({"w": torch.zeros(100_000)})
    small_files(1000)
    with pytest.raises(StoreError, match=r"checkpoint: the disk is full \(.* free\); free some space, then continue"):
        folder.save_checkpoint(big, 1)
    with pytest.raises(StoreError, match=r"json: the disk is full"):
        folder.record_result(finished(1, 0, "orin-1", 700))
    small_files(resource.RLIM_INFINITY)
    assert (folder.load_checkpoint() or pytest.fail("none"))[1] == 0
    assert [result.round for result in folder.results()] == [0]
    assert not list(folder.path.rglob("*partial*"))


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StoreError, match=r"expected a folder, there is a file; .*choose another folder with `--runs`"):
        RunFolder.create(tmp_path / "runs", "x-1", record())


def test_a_folder_where_none_can_be_made_is_told_without_a_promise():
    with pytest.raises(StoreError, match=r"/proc/x.*none can be made there; name another one"):
        RunFolder.create(Path("/proc/x"), "x-1", record())


@pytest.mark.parametrize("by_path", [True, False])
def test_a_run_without_its_plan_is_called_so(folder, by_path, caplog):
    (folder.path / "plan.json").unlink()
    runs_dir = folder.path.parent
    with pytest.raises(StoreError, match=r"this folder is a run without plan\.json"):
        RunFolder.open(runs_dir, str(folder.path) if by_path else folder.run_id)
    assert list_runs(runs_dir) == []
    assert "left out, it is a run without plan.json" in caplog.text


def test_other_folders_are_no_runs_that_lack_something(tmp_path, caplog):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    list_runs(tmp_path)
    with pytest.raises(StoreError, match="there is no run 'mine'"):
        RunFolder.open(tmp_path, "mine")
    assert caplog.text == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_ours_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match=r"not writable \(Permission denied\); change its owner"):
        RunFolder.create(tmp_path / "runs", "x-1", record())


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "status.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text().split() == ["{", '"a":', "1", "}"]
    assert list(tmp_path.iterdir()) == [path]


# ── status ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_status_keeps_its_start_and_its_facts(folder):
    assert folder.status.state == RUNNING
    assert folder.status.alive
    started = folder.status.started
    folder.record_initial_state(some_state())
    final = folder.record_final_state(some_state(1))
    folder.set_status(FAILED, "the cause", note="a fact")
    status = folder.status
    assert (status.state, status.error, status.started, status.pid) == (FAILED, "the cause", started, None)
    assert (status.final_state, status.facts) == (final, {"note": "a fact"})
    assert final == state_hash(some_state(1).tensors, some_state(1).scalars)


def test_initial_states_of_methods_with_other_scalars_compare(folder):
    one = folder.record_initial_state(State({"w": torch.ones(2)}, {"mine": 1}))
    assert one == folder.record_initial_state(State({"w": torch.ones(2)}))


def _python(code: str, *arguments: object) -> subprocess.Popen[str]:
    head = "import sys; from pathlib import Path; from testbed.store import *\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_run_whose_controller_died_is_interrupted(folder):
    folder.set_status(INTERRUPTED)
    with _python("RunFolder(Path(sys.argv[1])).set_status('running')", folder.path) as other:
        assert other.wait() == 0
    assert folder.status.state == INTERRUPTED
    assert folder.status.error == "the controller that ran it is gone"
    assert list_runs(folder.path.parent)[0].state == INTERRUPTED
    folder.set_status(RUNNING)
    assert folder.status.alive


def test_a_run_that_another_controller_runs_is_left_to_it(folder):
    with _python("RunFolder(Path(sys.argv[1])).set_status('running')", folder.path) as other:
        said = other.stderr.read()
    assert f"StoreError: {folder.run_id}: process {os.getpid()} is running it; stop that" in said


# ── index ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_index_follows_the_folders(folder):
    runs = folder.path.parent
    add_rounds(folder, [0.3, 0.6])
    folder.record_result(finished(0, 0, "orin-1", 700))
    assert [(row.state, row.rounds_done, row.accuracy) for row in list_runs(runs)] == [(RUNNING, 2, 0.6)]
    folder.set_status(FINISHED)
    other = RunFolder.create(runs, "fedpruner-20260314-160000-aaaa", record("fedpruner"))
    assert {row.method for row in list_runs(runs)} == {"lora", "fedpruner"}
    assert [job.peak_bytes for job in RunIndex(runs).jobs(folder.run_id)] == [700 << 20]
    shutil.rmtree(other.path)
    (row,) = list_runs(runs)
    assert (row.run, row.state, row.data, row.model, row.seed) == (
        folder.run_id, FINISHED, "docstrings", "quickstart", 7,
    )  # fmt: skip


@pytest.mark.parametrize("loss", [b"", b"this is no database, whatever its name says" * 100])
def test_an_index_that_was_lost_or_damaged_is_built_again(folder, loss):
    folder.set_status(FINISHED)
    runs = folder.path.parent
    for path in runs.glob("index.sqlite*"):
        path.unlink()
    if loss:
        (runs / "index.sqlite").write_bytes(loss)
    assert reindex(runs) == 1
    assert [row.run for row in list_runs(runs)] == [folder.run_id]


def test_a_run_goes_on_without_its_index(folder, caplog):
    for path in folder.path.parent.glob("index.sqlite*"):
        path.unlink()
    (folder.path.parent / "index.sqlite").write_bytes(b"no database" * 100)
    folder.set_status(FINISHED)
    assert folder.status.state == FINISHED
    assert "the run is stored, its line in the index is not" in caplog.text


def test_migrations_have_a_record_each_and_are_applied_once(folder):
    runs = folder.path.parent
    RunIndex(runs)
    connection = sqlite3.connect(runs / "index.sqlite")
    names = [name for (name,) in connection.execute("SELECT name FROM migrations ORDER BY rowid")]
    assert names == [migration.__name__ for migration in MIGRATIONS]
    connection.execute("INSERT INTO migrations VALUES ('of_tomorrow', '2030')")
    connection.commit()
    connection.close()
    with pytest.raises(StoreError, match=r"newer version of the testbed \(migration 'of_tomorrow'\); update"):
        RunIndex(runs)


def test_an_index_of_the_first_version_is_brought_up_to_date(tmp_path):
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    connection.execute("CREATE TABLE migrations (name TEXT PRIMARY KEY, applied TEXT NOT NULL)")
    MIGRATIONS[0](connection)
    connection.execute("INSERT INTO migrations VALUES (?, '2026')", (MIGRATIONS[0].__name__,))
    connection.execute("INSERT INTO runs (run, method, state, rounds_done) VALUES ('old-1', 'lora', 'finished', 3)")
    connection.commit()
    connection.close()
    index = RunIndex(tmp_path)
    assert [row.run for row in index.rows()] == ["old-1"]
    assert index.jobs("old-1") == []


_CREATE_RUNS = """
empty = {"clients": []}
for number in range(5):
    run = f"{sys.argv[2]}-{number}"
    RunFolder.create(Path(sys.argv[1]), run, RunRecord(empty, {"method": "lora"}, {}, {})).set_status(FINISHED)
"""


def test_four_controllers_share_an_index(tmp_path):
    names = ("one", "two", "three", "four")
    with ExitStack() as stack:
        processes = [stack.enter_context(_python(_CREATE_RUNS, tmp_path, name)) for name in names]
        assert [process.stderr.read() for process in processes] == [""] * 4
    assert {row.run for row in RunIndex(tmp_path).rows()} == {f"{n}-{k}" for n in names for k in range(5)}


# ── environment ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_environment_names_versions_commit_and_machine():
    found = describe_environment("model-hash", "data-hash")
    assert found["packages"]["torch"] == torch.__version__
    assert (found["model"], found["data"]) == ("model-hash", "data-hash")
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory_bytes"] > 1 << 28
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", found["commit"])
    assert (found["commit"] is None) == (found["dirty"] is None)
