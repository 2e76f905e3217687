"""`testbed run-method` as a user meets it: real agents, real caps, one process that can be killed at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.tiny_lab import arguments, make_lab

pytestmark = [pytest.mark.slow, pytest.mark.cgroup]
PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def environment(lab):
    return {**os.environ, "TESTBED_CACHE": str(lab / "cache"), "COLUMNS": "200"}


@pytest.fixture(scope="module")
def testbed(lab, environment):
    def run(*words, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "testbed", *words],
            env=environment,
            cwd=lab,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr or done.stdout
        assert "Traceback" not in done.stderr
        return done

    return run


def only_run(lab, name):
    [folder] = (lab / name).glob("*-*")
    return folder


def status(folder):
    return json.loads((folder / "status.json").read_text())


def all_groups():
    """Of runs; those of a virtual lab's hosts are none."""
    found = {path for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory") for path in Path(root).glob("testbed*")}
    return {path for path in found if not path.name.startswith("testbed-lab-")}


#: What somebody whose agents were killed has left on this machine, before and not by these tests.
LEFT_BEFORE = all_groups()


def groups():
    return all_groups() - LEFT_BEFORE


@contextmanager
def started(environment, *words):
    """A run in the background; killed, whatever happens, when the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "testbed", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(what, process=None):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def rounds_done(folder):
    lines = folder / "rounds.jsonl"
    return len(lines.read_text().splitlines()) if lines.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(lab, testbed):
    """A whole run of fedpruner, and what it printed."""
    done = testbed("run-method", "fedpruner", *arguments(lab, "--runs", str(lab / "whole")))
    return only_run(lab, "whole"), done.stdout


def test_a_run_ends_with_every_job_measured_under_its_cap_and_nothing_left_behind(uninterrupted):
    folder, printed = uninterrupted
    assert status(folder)["state"] == "finished"
    results = [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]
    assert len(results) == 6
    for result in results:
        peak = max(phase["peak"]["estimate_bytes"] or 0 for phase in result["measurement"]["phases"])
        assert result["outcome"] == "finished"
        assert 100 << 20 < peak < result["measurement"]["limit_bytes"]
        assert result["measurement"]["bytes_down"] > 0
        assert result["tokens"] > 0
    assert not groups()
    assert "finished" in printed


def test_the_export_is_a_peft_folder(uninterrupted):
    folder, _ = uninterrupted
    assert (folder / "export" / "adapter_config.json").is_file()
    assert (folder / "export" / "adapter_model.safetensors").is_file()


def test_every_figure_of_it_is_derived_again_from_its_sealed_folder(lab, testbed, uninterrupted):
    folder, _ = uninterrupted
    (told,) = json.loads(testbed("verify", folder.name, "--runs", str(lab / "whole"), "--json").stdout)
    verdicts = {check["name"]: check["verdict"] for check in told["checks"]}
    derived = ("files", "results", "rounds", "times", "peaks", "energy", "state", "export", "base model", "data")
    assert [verdicts[name] for name in derived] == ["holds"] * len(derived)


def test_report_and_runs_show_it_and_csv_and_json_agree(lab, testbed, uninterrupted):
    folder, _ = uninterrupted
    assert folder.name in testbed("runs", "--runs", str(lab / "whole")).stdout
    shown = json.loads(testbed("report", folder.name, "--runs", str(lab / "whole"), "--json").stdout)
    assert folder.name in json.dumps(shown)
    assert "accuracy" in testbed("report", folder.name, "--runs", str(lab / "whole")).stdout
    assert testbed("report", folder.name, "--runs", str(lab / "whole"), "--csv").stdout.count("\n") >= 3


def test_a_controller_killed_in_mid_run_is_resumed_to_the_same_state_bit_for_bit(
    lab, testbed, environment, uninterrupted
):
    words = ["run-method", "fedpruner", *arguments(lab, "--runs", str(lab / "killed"))]
    with started(environment, *words) as process:
        wait_for(lambda: list((lab / "killed").glob("fedpruner-*/rounds.jsonl")), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    folder = only_run(lab, "killed")
    assert 1 <= rounds_done(folder) < 3
    testbed("run-method", "--resume", folder.name, "--runs", str(lab / "killed"))
    whole, _ = uninterrupted
    assert status(folder)["state"] == "finished"
    assert status(folder)["final_state"] == status(whole)["final_state"]
    testbed("verify", folder.name, "--runs", str(lab / "killed"), "--no-data")  # sealed at its own end, and holds


def test_agents_of_a_killed_controller_end_by_themselves(lab, environment):
    with started(environment, "run-method", "lora", *arguments(lab, "--runs", str(lab / "orphans"))) as process:
        wait_for(groups, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not groups())


def test_ctrl_c_leaves_nothing_behind_and_says_how_to_go_on(lab, environment):
    with started(environment, "run-method", "lora", *arguments(lab, "--runs", str(lab / "stopped"))) as process:
        wait_for(lambda: list((lab / "stopped").glob("lora-*/rounds.jsonl")), process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 130
        assert b"Traceback" not in said
    assert status(only_run(lab, "stopped"))["state"] == "interrupted"
    assert not groups()


def test_several_methods_are_run_in_blocks_each_with_every_method_once(lab, testbed):
    words = ("--repeats", "2", "--rounds", "1", "--steps", "1", "--only", "big", "--runs", str(lab / "blocks"))
    printed = testbed("run-method", "lora", "no_finetuning", *arguments(lab, *words)).stdout
    configs = [json.loads(path.read_text()) for path in (lab / "blocks").glob("*/config.json")]
    assert sorted((config["block"], config["method"]) for config in configs) == [
        (0, "lora"), (0, "no_finetuning"), (1, "lora"), (1, "no_finetuning"),
    ]  # fmt: skip
    assert "compare them with: testbed report" in printed


def test_a_metered_run_that_warms_up_ends_as_any_other_with_the_joules_of_its_phases(lab, testbed, uninterrupted):
    content = yaml.safe_load((lab / "lab.yaml").read_text())
    for device in content["devices"].values():
        device["meter"] = {"replay": {"trace": "jetson_orin_nano", "repeat": True}}
    (lab / "metered.yaml").write_text(yaml.safe_dump(content))
    more = ("--inventory", str(lab / "metered.yaml"), "--idle-seconds", "2", "--warm-up", "1")
    testbed("run-method", "fedpruner", *arguments(lab, "--runs", str(lab / "metered"), *more))
    folder = only_run(lab, "metered")
    assert status(folder)["final_state"] == status(uninterrupted[0])["final_state"]
    report = json.loads(testbed("report", folder.name, "--runs", str(lab / "metered"), "--json").stdout)["runs"][0]
    assert sum(device["jobs"] for device in report["devices"]) == 6
    assert report["energy"]["gross"]["replayed"] is True
    assert report["energy"]["gross"]["joules"] == pytest.approx(report["energy_joules"])
    assert {"load", "train"} <= set(report["energy"]["phases"])
    assert any(phase["joules"] for phase in report["energy"]["phases"].values())  # most last less than a sample does
    assert all(device["energy"]["idle"]["samples"] > 20 for device in report["devices"])
    assert "J ±" in testbed("report", folder.name, "--runs", str(lab / "metered")).stdout
    printed = testbed("report", uninterrupted[0].name, "--runs", str(lab / "whole")).stdout
    assert "J ±" not in printed


def test_without_a_cap_the_run_is_marked_uncapped(lab, testbed):
    runs = ("--runs", "uncapped", "--rounds", "1", "--only", "big")  # a relative folder, as the default is
    testbed("run-method", "lora", *arguments(lab, *runs, "--no-cap"))
    folder = only_run(lab, "uncapped")
    assert json.loads((folder / "config.json").read_text())["capped"] is False
    assert "uncapped" in testbed("report", folder.name, "--runs", str(lab / "uncapped")).stdout


def test_dry_run_settles_the_plan_and_touches_nothing(lab, testbed):
    done = testbed("run-method", "lora", *arguments(lab, "--runs", str(lab / "dry"), "--dry-run", "--json"))
    plan = json.loads(done.stdout)
    assert [client["device"] for client in plan["clients"]] == ["large", "small"]
    assert plan["clients"][0]["blocks"] == [0, 1, 2, 3]
    assert plan["clients"][0]["parts"]["train"]["activations"] > 0
    assert not (lab / "dry").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["fedprunner"], 2, 'there is no method "fedprunner"; did you mean "fedpruner"'),
        (["lora", "--set", "rnak=4"], 2, 'no setting "rnak"; did you mean "rank"'),
        (["lora", "--set", "rank=four"], 2, "rank"),
        (["lora", "--set", "targets=nowhere"], 2, "is no linear map"),
        (["lora", "--model", "/nowhere"], 1, "there is no /nowhere/config.json"),
        (["lora", "--data", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["lora", "--data-set", "text=bdoy"], 1, "body"),
        (["lora", "--partition", "dirichlet:lots"], 2, "expected a number"),
        (["lora", "--inventory", "nowhere.yaml"], 1, "nowhere.yaml"),
        (["lora", "--only", "nobody"], 2, "no device has the name, tag or profile 'nobody'"),
        (["lora", "--rounds", "0"], 2, "rounds=0: expected at least 1"),
        (["lora", "--repeats", "0"], 2, "--repeats 0: expected at least 1"),
        (["lora", "--idle-seconds", "-1"], 2, "idle-seconds=-1.0: expected 0 or more"),
        (["lora", "--metrics", "nonsense"], 2, "expected an address such as 9101"),
        (["lora", "fedprunner"], 2, 'there is no method "fedprunner"'),
        (["lora", "--data-set", "limit=1"], 1, "needs two classes or more"),
        (["--resume", "lora-20000101-000000-0000"], 1, "lora-20000101-000000-0000"),
        ([], 2, "which method?"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_message_and_a_non_zero_exit(words, code, message, lab, testbed):
    given = [] if "--resume" in words or not words else arguments(lab, "--runs", str(lab / "bad"))
    done = testbed("run-method", *given, *words, code=code)
    assert message in " ".join(done.stderr.split())
    assert not (lab / "bad").exists()


def test_a_budget_below_the_runtime_is_refused_with_the_bytes(lab, testbed, tmp_path):
    poor = tmp_path / "poor.yaml"
    poor.write_text((lab / "lab.yaml").read_text().replace("700 MiB", "90 MiB").replace("640 MiB", "80 MiB"))
    done = testbed("run-method", "lora", *arguments(lab, "--inventory", str(poor)), code=1)
    assert "below what the runtime takes without any model" in " ".join(done.stderr.split())


def test_truncated_weights_are_named(lab, testbed, tmp_path):
    broken = tmp_path / "model"
    broken.mkdir()
    for path in (lab / "model").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = testbed("run-method", "lora", *arguments(lab, "--model", str(broken)), code=1)
    assert "model.safetensors" in done.stderr
