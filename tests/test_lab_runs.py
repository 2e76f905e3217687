"""A study on a virtual lab as a user does it: one command for each step, and nothing lost when something fails.

Real trainers on three boards.  What was trained, and with what result, is compared with emulated devices of the same
names, profiles and submodels: bit for bit.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
import time

import pytest
import yaml

from testbed.job import FINISHED, OUT_OF_MEMORY, UNREACHABLE
from testbed.method import IMAGE_CLASSIFICATION, SEQUENCE_CLASSIFICATION
from testbed.model.checkpoint import BaseModel
from testbed.model.content import ContentStore
from testbed.plugins import all_methods
from tests.contract.harness import CLASSES
from tests.contract.settings import make_pool
from tests.lab_runs import (
    BOARDS,
    FOLDER,
    ORIN,
    PI4,
    PI5,
    Desk,
    agent_pids,
    console,
    outcomes_of,
    phases_of,
    results_of,
    status_of,
    wait_for_jobs,
    wait_for_outcomes,
)
from tests.meters import plugs
from tests.virtual_lab import as_new

pytestmark = [pytest.mark.slow, pytest.mark.lab, pytest.mark.usefixtures("boards_put_right")]
ALL_FINISHED = {(index, name): FINISHED for index in (0, 1) for name in BOARDS}


def final_state(folder):
    status = status_of(folder)
    assert (status["state"], status["error"]) == ("finished", None)
    return status["final_state"]


def blocks_in_plan(folder):
    clients = json.loads((folder / "plan.json").read_text())["clients"]
    return {client["device"]: len(client["blocks"]) for client in clients}


# ── one command each ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_fresh_lab_is_made_ready_by_one_command_and_then_left_alone(study):
    first, second = study.provisioned
    assert "3 devices: 3 changed" in first
    assert "3 devices ready; nothing was changed" in second


def test_a_link_that_is_cut_for_thirty_seconds_costs_the_round_nothing_but_time(request, study, undisturbed):
    host = study.lab.host(PI5)
    with study.desk.started("run-method", "fedpruner", *study.words("cut")) as process:
        folder = wait_for_jobs(study, "cut", process)
        host.cut()
        mend_at = time.monotonic() + 30.0
        waiting = wait_for_outcomes(study, folder.name, [PI5])
        request.getfixturevalue("on_this_machine")  # a run for another test: the time is there
        while time.monotonic() < mend_at:
            assert process.poll() is None
            time.sleep(0.1)  # the cut itself is what is waited for
        host.mend()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, f"{out}{err}"
    assert f"link lost: {PI5} is looked for again" in out
    assert phases_of(results_of(folder)[0, PI5]) == phases_of(waiting[PI5])
    assert final_state(folder) == final_state(undisturbed)


def test_a_run_ends_in_the_same_state_as_on_emulated_devices_bit_for_bit(undisturbed, on_this_machine):
    assert blocks_in_plan(undisturbed) == blocks_in_plan(on_this_machine) == {ORIN: 4, PI5: 4, PI4: 2}
    assert outcomes_of(undisturbed) == outcomes_of(on_this_machine) == ALL_FINISHED
    assert final_state(undisturbed) == final_state(on_this_machine)


def test_devices_emulated_on_a_host_of_the_lab_end_in_the_same_state_too(study, undisturbed, tmp_path):
    """Of the three boards one becomes the server that all three are emulated on."""
    defaults = yaml.safe_load(study.inventory.read_text())["defaults"]
    content = {"defaults": defaults, "devices": study.emulated(host=PI5)}
    there = study.write_inventory("on_a_host.yaml", content)
    other = Desk(tmp_path)  # who has provisioned other devices of these names
    other.variables["TESTBED_CACHE"] = study.desk.variables["TESTBED_CACHE"]
    other.testbed("provision", "--inventory", there)
    fitted = study.fitted(other, there.name, content)
    other.process("run-method", "fedpruner", *study.words("on-a-host", inventory=fitted))
    folder = study.only_run("on-a-host")
    assert outcomes_of(folder) == ALL_FINISHED
    assert final_state(folder) == final_state(undisturbed)
    assert agent_pids(study.lab.host(PI5)) == []


def test_the_report_shows_every_board_with_what_was_measured_on_it(study, undisturbed):
    report = study.desk.testbed("report", undisturbed.name, "--runs", undisturbed.parent).text
    assert all(name in report for name in (*BOARDS, "boards, capped"))
    facts = json.loads((undisturbed / "inventory.json").read_text())["facts"]
    assert [facts[name]["board"]["model"].split()[0] for name in BOARDS] == ["NVIDIA", "Raspberry", "Raspberry"]


def test_nothing_is_left_at_work_on_a_board_after_a_run(study, undisturbed):
    for host in study.lab.hosts:
        assert agent_pids(host) == []
        assert console(host, f"ls {FOLDER}/lock.json 2>/dev/null", code=None) == ""


# ── what fails in the middle ─────────────────────────────────────────────────────────────────────────────────────────
def test_a_controller_that_is_killed_collects_what_the_boards_did_meanwhile(study, undisturbed):
    with study.desk.started("run-method", "fedpruner", *study.words("killed")) as process:
        folder = wait_for_jobs(study, "killed", process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert outcomes_of(folder) == {}
    waiting = wait_for_outcomes(study, folder.name)
    agents = {name: agent_pids(study.lab.host(name)) for name in BOARDS}
    study.desk.process("run-method", "--resume", folder.name, "--runs", folder.parent)
    collected = results_of(folder)
    for name in BOARDS:
        assert len(agents[name]) == 1
        assert phases_of(collected[0, name]) == phases_of(waiting[name])
    assert final_state(folder) == final_state(undisturbed)


def test_a_board_that_reboots_in_mid_round_begins_its_job_again_and_the_others_go_on(study, undisturbed):
    host = study.lab.host(PI5)
    with study.desk.started("run-method", "fedpruner", *study.words("rebooted")) as process:
        folder = wait_for_jobs(study, "rebooted", process)
        host.reboot()
        host.wait_up()
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, f"{out}{err}"
    assert re.findall(r"link lost: (\S+) is looked for again", out) == [PI5]
    assert outcomes_of(folder) == ALL_FINISHED
    assert final_state(folder) == final_state(undisturbed)


class Mains(plugs.Tasmota):
    """A plug that a board of the lab hangs on: when it gets power again, what had hung is gone, and it boots."""

    def __init__(self, host):
        super().__init__()
        self.board = host

    def answer(self, path, query):
        was_on, told = self.on, super().answer(path, query)
        if self.on and not was_on:
            threading.Thread(target=self.boot).start()
        return told

    def boot(self):
        self.board.thaw()
        self.board.reboot()


def test_a_board_that_hangs_is_switched_off_and_on_by_its_plug_and_begins_its_job_again(study, undisturbed):
    host = study.lab.host(PI5)
    with Mains(host) as plug:
        content = yaml.safe_load(study.inventory.read_text())
        content["devices"][PI5]["meter"] = {"rpi_pmic": {}, "tasmota": {"host": plug.host}}
        inventory = study.write_inventory("plugged.yaml", content)
        words = study.words("cycled", "--power-cycle", "--reconnect-seconds", "15", inventory=inventory)
        with study.desk.started("run-method", "fedpruner", *words) as process:
            folder = wait_for_jobs(study, "cycled", process)
            host.freeze()
            out, err = process.communicate(timeout=250)
    assert process.returncode == 0, f"{out}{err}"
    assert f"power cycle: {PI5} does not come back, and is switched off and on" in out
    assert outcomes_of(folder) == ALL_FINISHED
    assert final_state(folder) == final_state(undisturbed)


def test_the_sensors_of_the_boards_tell_what_a_run_took(study, undisturbed):
    """A persona's sensors stand still: what its rails say, for as long as the jobs took."""
    report = study.desk.json("report", undisturbed.name, "--runs", undisturbed.parent)["runs"][0]
    told = {board["device"]: board["energy"] for board in report["devices"]}
    assert told[PI4] is None
    orin, pi = told[ORIN]["gross"], told[PI5]["gross"]
    assert (orin["meter"], orin["point"]) == ("ina3221", "module_rail")
    assert (pi["meter"], pi["point"]) == ("rpi_pmic", "soc_pmic")
    assert orin["joules"] == pytest.approx(4.541 * orin["seconds"], rel=0.02)
    assert told[ORIN]["idle"]["watts"] == pytest.approx(4.541, rel=0.02)
    assert set(told[ORIN]["rails"]) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    assert report["energy"] is None


def test_a_board_that_hangs_and_one_that_runs_out_of_memory_are_in_the_record(study, tmp_path):
    """What an empty trainer takes on the smallest one has grown since it was provisioned; the kernel keeps the cap."""
    desk = Desk(tmp_path)
    desk.variables["TESTBED_CACHE"] = study.desk.variables["TESTBED_CACHE"]
    shutil.copytree(study.desk.folder / "data", tmp_path / "data")
    sheet = tmp_path / "data" / "facts" / f"{PI4}.json"
    sheet.write_text(json.dumps(json.loads(sheet.read_text()) | {"baseline": {"bytes": 20 << 20}}))
    content = yaml.safe_load(study.inventory.read_text())
    content["devices"][PI4]["budget"]["memory"] = "200 MiB"
    tight = study.write_inventory("tight.yaml", content)
    words = study.words("hangs", "--reconnect-seconds", "1", inventory=tight)
    with desk.started("run-method", "fedpruner", *words) as process:
        folder = wait_for_jobs(study, "hangs", process, [ORIN, PI5])
        study.lab.host(PI5).freeze()
        out, err = process.communicate(timeout=200)
    study.lab.host(PI5).thaw()
    assert process.returncode == 0, f"{out}{err}"
    assert outcomes_of(folder) == {
        (0, ORIN): FINISHED, (0, PI5): UNREACHABLE, (0, PI4): OUT_OF_MEMORY,
        (1, ORIN): FINISHED, (1, PI5): UNREACHABLE, (1, PI4): OUT_OF_MEMORY,
    }  # fmt: skip
    killed = results_of(folder)[0, PI4]
    assert killed["measurement"]["limit_bytes"] == 200 << 20
    assert "the kernel killed the trainer" in killed["error"]
    assert "its agent has not answered for" in results_of(folder)[0, PI5]["error"]
    report = desk.json("report", folder.name, "--runs", folder.parent)["runs"][0]
    assert (report["state"], len(report["failures"])) == ("finished", 4)


def test_boards_that_are_lost_cost_their_own_results_and_the_record_is_complete(study):
    """One is cut off for good, the agent of another is killed; the third goes on, and the run ends."""
    words = study.words("lost", "--reconnect-seconds", "1", inventory=study.attentive())
    with study.desk.started("run-method", "fedpruner", *words) as process:
        folder = wait_for_jobs(study, "lost", process)
        study.lab.host(ORIN).cut()
        [agent] = agent_pids(study.lab.host(PI4))
        console(study.lab.host(PI4), f"kill -KILL {agent}")
        out, err = process.communicate(timeout=120)
    as_new(study.lab.host(ORIN))
    assert process.returncode == 0, f"{out}{err}"
    assert outcomes_of(folder) == {
        (0, ORIN): UNREACHABLE, (0, PI5): FINISHED, (0, PI4): UNREACHABLE,
        (1, ORIN): UNREACHABLE, (1, PI5): FINISHED, (1, PI4): FINISHED,
    }  # fmt: skip
    told = results_of(folder)
    assert told[0, PI4]["error"] == f"device {PI4}: its agent was killed while it had the job"
    assert told[0, ORIN]["error"].startswith(f"device {ORIN}: ")
    assert f"{ORIN}: no connection to" in told[0, ORIN]["error"]
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [(each["participants"], each["finished"]) for each in rounds] == [(3, 1), (3, 2)]
    report = study.desk.json("report", folder.name, "--runs", folder.parent)["runs"][0]
    assert report["state"] == "finished"
    assert [(lost["device"], lost["round"], lost["outcome"]) for lost in report["failures"]] == [
        (ORIN, 0, UNREACHABLE), (PI4, 0, UNREACHABLE), (ORIN, 1, UNREACHABLE),
    ]  # fmt: skip
    assert {board["device"]: (board["jobs"], board["finished"]) for board in report["devices"]} == {
        ORIN: (2, 0), PI5: (2, 2), PI4: (2, 1),
    }  # fmt: skip
    shown = study.desk.testbed("report", folder.name, "--runs", folder.parent).text
    assert f"unreachable: client 0 on {ORIN}, round 1" in shown
    assert f"left behind: {ORIN}: no connection" in " ".join(out.split())
    assert f"{ORIN}: its agent was ended" in study.desk.testbed("stop", folder.name, "--runs", folder.parent).out
    assert agent_pids(study.lab.host(ORIN)) == []


# ── every method ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def pool(study, tmp_path_factory):
    """Adapters for the study's model."""
    contents = ContentStore(tmp_path_factory.mktemp("contents"))
    base = BaseModel.open(study.desk.folder / "model", contents, SEQUENCE_CLASSIFICATION, CLASSES)
    return make_pool(tmp_path_factory.mktemp("pool"), base)


#: Beside fedpruner, one for each thing that travels: whole tensors, fused blocks, a probe, files by hash, no base,
#: pieces with ranges, stacks, private state with evaluations on the board, gradients, scalars.
TRAVELLERS = (
    "lora", "devft", "chainfed", "smartfed", "scalefl", "hetlora", "flora", "fedsa_lora", "fwdllm", "fedkseed",
)  # fmt: skip


@pytest.mark.parametrize("method", TRAVELLERS)
def test_a_round_of_methods_that_send_other_things_goes_through(study, method, pool):
    words = ["--rounds", 1, "--evaluate-every", 1, *(["--set", f"pool={pool}"] if method == "smartfed" else [])]
    if all_methods()[method].default_task == IMAGE_CLASSIFICATION:
        study.desk.testbed("run-method", method, "--inventory", study.inventory, "--idle-seconds", "0.5",
                           "--runs", study.desk.folder / method,
                           "--steps", 2, *words)  # fmt: skip
    else:
        study.desk.testbed("run-method", method, *study.words(method, *words))
    [folder] = (study.desk.folder / method).glob(f"{method}-*")
    assert status_of(folder)["state"] == "finished"
    results = results_of(folder).values()
    assert results
    assert {result["outcome"] for result in results} == {FINISHED}
    assert all(result["measurement"]["limit_bytes"] for result in results)
