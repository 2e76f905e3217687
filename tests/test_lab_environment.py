"""A board that has nothing but its system: the environment that provisioning makes is the one that a run trains in."""

from __future__ import annotations

import json
import os

import pytest

from testbed.job import FINISHED
from testbed.lab.lab import Lab
from testbed.node.spool import SETTINGS_FILE
from tests.lab_runs import FOLDER, Desk, console, outcomes_of
from tests.tiny_lab import make_lab
from tests.virtual_lab import free_subnet

pytestmark = [pytest.mark.slow, pytest.mark.lab]
BOARD = "board-1"
#: What is said where the package index, or torch in it, is out of reach.
OUT_OF_REACH = ("cannot be reached", "no wheel of torch")


@pytest.fixture
def lab(tmp_path):
    """One host without a face, and an inventory that names no interpreter."""
    desk, folder = Desk(tmp_path), tmp_path / "lab"
    desk.testbed("lab", "up", "--folder", folder, "--subnet", free_subnet(), "--persona", "plain", "--memory", "3 GiB")
    lab = Lab.open(folder)
    lines = lab.inventory.read_text().splitlines(keepends=True)
    lab.inventory.write_text("".join(line for line in lines if not line.startswith("  python:")))
    yield lab
    lab.down()


@pytest.mark.timeout(900)
def test_a_run_in_an_environment_of_downloaded_wheels(lab, tmp_path):
    """Real torch and the real lock, air-gapped; the wheels stay in the user's own cache for the next time."""
    desk = Desk(tmp_path)
    make_lab(tmp_path)
    cache = desk.variables.pop("TESTBED_CACHE")
    made = desk.testbed("provision", "--inventory", lab.inventory, "--air-gapped", code=None)
    if made.code and any(words in made.text for words in OUT_OF_REACH):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(made.text)
    assert made.code == 0, made.text
    assert "environment: none → torch" in made.text
    assert "nothing was changed" in desk.testbed("provision", "--inventory", lab.inventory, "--air-gapped").text
    desk.variables["TESTBED_CACHE"] = cache
    desk.process(
        "run-method", "fedpruner", "--inventory", lab.inventory, "--model", tmp_path / "model", "--data",
        tmp_path / "data.jsonl", "--data-set", "text=body", "--data-set", "label=kind", "--length", "16",
        "--batch-size", "4", "--steps", "1", "--rounds", "1", "--idle-seconds", "0.5",
    )  # fmt: skip
    [folder] = (tmp_path / "runs").glob("fedpruner-*")
    assert outcomes_of(folder) == {(0, BOARD): FINISHED}
    facts = json.loads((folder / "inventory.json").read_text())["facts"][BOARD]
    assert facts["environment"]["torch_cuda"] is None
    settings = console(lab.host(BOARD), f"cat {FOLDER}/runs/{folder.name}/spool/{SETTINGS_FILE}")
    assert json.loads(settings)["python"] == f"{FOLDER}/env/bin/python"
