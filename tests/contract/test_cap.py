"""Every method found keeps its budget under a real cap: trainers are given exactly what the plan predicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from testbed.plugins import all_methods
from tests.tiny_lab import arguments, make_lab

pytestmark = [pytest.mark.slow, pytest.mark.cgroup]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


def run_testbed(lab, *words):
    environment = {**os.environ, "TESTBED_CACHE": str(lab / "cache")}
    command = [sys.executable, "-m", "testbed", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_a_trainer_capped_at_its_prediction_is_never_killed(method, lab):
    runs = ("--rounds", "2", "--only", "big", "--runs", str(lab / method))
    plan = json.loads(run_testbed(lab, "run-method", method, *arguments(lab, *runs, "--dry-run", "--json")))
    exact = lab / f"{method}.yaml"
    exact.write_text((lab / "lab.yaml").read_text().replace("700 MiB", f"{plan['clients'][0]['predicted_bytes']} B"))
    run_testbed(lab, "run-method", method, *arguments(lab, *runs, "--inventory", str(exact)))
    [folder] = (lab / method).glob(f"{method}-*")
    results = [json.loads(path.read_text()) for path in (folder / "results").glob("*.json")]
    assert [result["outcome"] for result in results] == ["finished"] * 2
