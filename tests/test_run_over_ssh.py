"""`testbed run-method` on devices that are reached over SSH, as a user meets it: the same end as on emulated ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict

import pytest

from testbed.node.baseline import measure_here
from tests.contract.settings import words_of
from tests.drills import wait_until
from tests.ssh_server import SshServer
from tests.tiny_lab import arguments, make_lab

pytestmark = [pytest.mark.slow, pytest.mark.sshd, pytest.mark.cgroup]
BUDGETS = {"large": "700 MiB", "small": "640 MiB"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The tiny lab, with an inventory over.yaml of the same two devices behind servers of their own."""
    folder = make_lab(tmp_path_factory.mktemp("lab"))
    with ExitStack() as servers:
        entries = []
        baseline = asdict(measure_here(1))
        for name, memory in BUDGETS.items():
            server = servers.enter_context(SshServer(folder / f"server-{name}", alias=name))
            entries.append(
                f'  {name}: {{budget: {{memory: "{memory}"}}, ssh_config: "{server.ssh_config}", '
                f'folder: "{server.folder / "device"}"}}\n'
            )
            facts = folder / "data" / "facts" / f"{name}.json"
            facts.parent.mkdir(parents=True, exist_ok=True)
            sheet = {"device": name, "host": name, "baseline": baseline, "memory_cgroup": {"parent": None}}
            facts.write_text(json.dumps(sheet))
        defaults = f'defaults: {{kind: generic, profile: raspberry_pi_5_4gb, python: "{sys.executable}"}}\ndevices:\n'
        (folder / "over.yaml").write_text(defaults + "".join(entries))
        yield folder


@pytest.fixture(scope="module")
def environment(lab):
    return {
        **os.environ, "TESTBED_CACHE": str(lab / "cache"), "TESTBED_DATA": str(lab / "data"), "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.fixture(scope="module")
def testbed(lab, environment):
    def run(*words, code=0):
        command = [sys.executable, "-m", "testbed", *words]
        done = subprocess.run(command, env=environment, cwd=lab, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr or done.stdout
        assert "Traceback" not in done.stderr
        return done

    return run


def over(lab, runs, *more):
    return arguments(lab, "--inventory", str(lab / "over.yaml"), "--runs", str(lab / runs), *more)


def only_run(lab, name):
    [folder] = (lab / name).glob("*-*")
    return folder


def status(folder):
    return json.loads((folder / "status.json").read_text())


def rounds(folder):
    lines = folder / "rounds.jsonl"
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


@pytest.fixture(scope="module")
def emulated(lab, testbed):
    testbed("run-method", "fedpruner", *arguments(lab, "--runs", str(lab / "emulated")))
    return only_run(lab, "emulated")


def test_deploy_says_what_would_travel_and_sends_it_once(lab, testbed):
    options = arguments(lab)[:-2]  # all but the folder of the runs
    words = ["deploy", "fedpruner", *options, "--inventory", str(lab / "over.yaml"), "--json"]
    told = json.loads(testbed(*words, "--dry-run").stdout)
    assert [cargo["device"] for cargo in told] == ["large", "small"]
    assert all(min(cargo["code_bytes"], cargo["model_bytes"], cargo["shard_bytes"]) > 0 for cargo in told)
    assert not list(lab.glob("server-*/device/*"))
    assert json.loads(testbed(*words).stdout) == told
    assert [cargo["bytes"] for cargo in json.loads(testbed(*words, "--dry-run").stdout)] == [0, 0]
    assert not list(lab.glob("server-*/device/lock.json"))
    assert "model" in testbed(*words[:-1], "--dry-run").stdout


def test_what_a_method_reads_beside_the_model_is_sent_beforehand_too(lab, testbed):
    pool = words_of("smartfed")
    testbed("deploy", "smartfed", *arguments(lab)[:-2], *pool, "--inventory", str(lab / "over.yaml"))
    testbed("run-method", "smartfed", *over(lab, "experts", "--rounds", "1", *pool))
    folder = only_run(lab, "experts")
    assert status(folder)["state"] == "finished"
    assert [record["deployed_bytes"] for record in rounds(folder)] == [0]


def test_a_run_ends_in_the_same_state_as_on_emulated_devices_bit_for_bit(lab, testbed, emulated):
    testbed("run-method", "fedpruner", *over(lab, "first"))
    first = only_run(lab, "first")
    assert status(first)["final_state"] == status(emulated)["final_state"]
    inventory = json.loads((first / "inventory.json").read_text())
    assert set(inventory["facts"]) == {"large", "small"}
    for result in [json.loads(path.read_text()) for path in (first / "results").glob("*.json")]:
        assert result["measurement"]["limit_bytes"] in (640 << 20, 700 << 20)
    assert [record["deployed_bytes"] for record in rounds(first)] == [0, 0, 0]  # it was all sent before
    assert not list(lab.glob("server-*/device/lock.json"))


def test_a_controller_that_was_killed_is_resumed_to_the_same_state(lab, testbed, environment, emulated):
    words = [sys.executable, "-m", "testbed", "run-method", "fedpruner", *over(lab, "killed")]
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        wait_until(lambda: process.poll() is not None or list((lab / "killed").glob("*/rounds.jsonl")), 120)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    folder = only_run(lab, "killed")
    assert 1 <= len(rounds(folder)) < 3
    assert len(list(lab.glob("server-*/device/lock.json"))) == 2
    refused = testbed("run-method", "fedpruner", *over(lab, "other"), code=1)
    assert f"testbed stop {folder.name}" in " ".join(refused.stderr.split())
    testbed("run-method", "--resume", folder.name, "--runs", str(lab / "killed"))
    assert status(folder)["final_state"] == status(emulated)["final_state"]
    assert not list(lab.glob("server-*/device/lock.json"))


def test_without_a_fact_sheet_the_way_out_is_provisioning(lab, testbed, environment, tmp_path):
    words = [sys.executable, "-m", "testbed", "run-method", "lora", *over(lab, "none"), "--dry-run"]
    nowhere = {**environment, "TESTBED_DATA": str(tmp_path)}
    done = subprocess.run(words, env=nowhere, cwd=lab, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    way_out = f"testbed provision --inventory {lab / 'over.yaml'} --only large --only small"
    assert way_out in " ".join(done.stderr.split())
