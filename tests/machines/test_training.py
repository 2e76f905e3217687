"""Rounds on a virtual Raspberry Pi 5: arm64, cgroup v2, its kernel's own netem, a clock that jumps, a reboot.

    python -m pytest tests/machines/test_training.py --long -s

An hour and a quarter where every instruction is emulated, and half an hour more for an image that is not in the cache.
"""

from __future__ import annotations

import json
import re
import time

import pytest

from testbed.lab.folder import PROFILES
from testbed.lab.link import LinkShape
from testbed.lab.machines.lab import MachineLab, MachineWish
from testbed.store import RunFolder
from tests.drills import wait_until
from tests.lab_runs import Desk
from tests.machines.machine_lab import MIB, why_not_whole
from tests.tiny_lab import make_lab

pytestmark = [pytest.mark.slow, pytest.mark.vm, pytest.mark.long, pytest.mark.timeout(3 * 3600)]
ARCHITECTURE = "arm64"
ROUNDS = 1
PATIENCE_SECONDS = 3600.0


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    made = Desk(folder)
    del made.variables["TESTBED_CACHE"]  # the image and its packages are kept for the next time
    make_lab(folder)
    return made


@pytest.fixture(scope="module")
def timings():
    """What each step took here, printed at the end for the documentation."""
    told = {}
    yield told
    print("\n" + json.dumps({name: round(seconds) for name, seconds in told.items()}, indent=1))


@pytest.fixture(scope="module")
def lab(tmp_path_factory, timings):
    if reason := why_not_whole(ARCHITECTURE):
        pytest.skip(reason)
    begun = time.monotonic()
    wish = MachineWish(memory_bytes=2048 * MIB, architecture=ARCHITECTURE)
    with MachineLab.up(tmp_path_factory.mktemp("machines") / "lab", wish, print) as lab:
        timings["image, environment disk, boot, cloud-init"] = time.monotonic() - begun
        yield lab


@pytest.fixture(scope="module")
def provisioned(lab, desk, timings):
    begun = time.monotonic()
    said = desk.testbed("provision", "--inventory", lab.inventory)
    timings["provision"] = time.monotonic() - begun
    return said


def words(lab, desk, *more):
    folder = desk.folder
    return [
        "--inventory", lab.inventory, "--model", folder / "model", "--data", folder / "data.jsonl", "--data-set",
        "text=body", "--data-set", "label=kind", "--length", "16", "--batch-size", "4", "--steps", "2", "--rounds",
        ROUNDS, "--evaluate-every", ROUNDS, "--learning-rate", "0.02", "--idle-seconds", "0", "--runs",
        folder / "runs", "--job-timeout-seconds", 3600, *more,
    ]  # fmt: skip


def the_run(desk, method):
    [path] = (desk.folder / "runs").glob(f"{method}-*")
    return RunFolder(path)


def test_it_is_attested_and_provisioned_without_installing_anything(provisioned, lab, desk, timings):
    assert "attestation: debian_trixie: 7 of 7 hold" in provisioned.text
    begun = time.monotonic()
    again = desk.testbed("provision", "--inventory", lab.inventory)
    timings["provision again"] = time.monotonic() - begun
    assert "1 device ready; nothing was changed" in again.text


@pytest.mark.parametrize("method", ["lora", "fedpruner"])
def test_a_run_keeps_its_cap_and_the_kernel_tells_the_peak(provisioned, lab, desk, timings, method):
    """Behind a link of 20 ms each way."""
    [board] = lab.hosts
    board.shape(LinkShape(delay_seconds=0.02))
    begun = time.monotonic()
    desk.process("run-method", method, *words(lab, desk))
    timings[f"{method}, a round and an evaluation"] = time.monotonic() - begun
    board.shape(LinkShape())
    expect_capped(the_run(desk, method).results())


def expect_capped(results):
    assert results
    assert {result.outcome for result in results} == {"finished"}
    for result in results:
        measured = [phase.peak for phase in result.measurement.phases if phase.peak.upper_bytes is not None]
        assert {peak.sources["upper"] for peak in measured} == {"cgroup2_peak"}
        assert all(peak.lower_bytes <= peak.upper_bytes <= result.measurement.limit_bytes for peak in measured)


def test_a_straggler_is_held_back_by_the_kernels_quota(provisioned, lab, desk, timings):
    """cpu.max of the device's own group, in the scope of its user's manager."""
    begun = time.monotonic()
    runs = desk.folder / "slowed"
    desk.process("run-method", "lora", *words(lab, desk, "--disturb", "straggler=2", "--runs", runs))
    timings["lora, a round of a straggler"] = time.monotonic() - begun
    [path] = runs.glob("lora-*")
    told = [result.measurement.disturbances["straggler"] for result in RunFolder(path).results() if result.finished]
    assert told
    assert {each["by"] for each in told} == {"cpu_quota"}


def test_a_clock_that_jumps_and_a_reboot_in_the_middle_are_survived(provisioned, lab, desk, timings):
    """The board's clock goes back a day, then the board reboots while a job is there: the run ends all the same."""
    [board] = lab.hosts
    runs = desk.folder / "disturbed"
    begun = time.monotonic()
    with desk.started(
        "run-method", "lora", *words(lab, desk, "--rounds", 2, "--reconnect-seconds", 1800, "--runs", runs)
    ) as process:
        wait_until(lambda: trains(board), PATIENCE_SECONDS)
        assert board.console(["date", "--set", "-1 day"]).returncode == 0
        board.reboot()
        board.wait_up()
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    timings["lora with a reboot"] = time.monotonic() - begun
    assert process.returncode == 0, out + err
    [path] = runs.glob("lora-*")
    results = RunFolder(path).results()
    assert any(result.outcome == "finished" for result in results)
    assert all(0 < result.measurement.seconds < 3600 for result in results if result.finished)


def test_pip_makes_the_environment_in_a_board_of_its_own(desk, timings, tmp_path):
    """Without a second disk: the wheels of PyPI are sent there, and its own Python installs them."""
    if reason := why_not_whole(ARCHITECTURE):
        pytest.skip(reason)
    wish = MachineWish(memory_bytes=2048 * MIB, architecture=ARCHITECTURE, environment=False)
    with MachineLab.up(tmp_path / "lab", wish, print) as lab:
        [profile] = (lab.folder / PROFILES).glob("*.yaml")
        text = re.sub("torch_source: .*", "torch_source: https://pypi.org/simple", profile.read_text())
        profile.write_text(text)
        begun = time.monotonic()
        desk.process("provision", "--inventory", lab.inventory, "--air-gapped")
        timings["provision by pip in the board"] = time.monotonic() - begun
        runs = desk.folder / "by_pip"
        desk.process("run-method", "lora", *words(lab, desk, "--runs", runs))
        [path] = runs.glob("lora-*")
        expect_capped(RunFolder(path).results())


def trains(board):
    return board.console(["pgrep", "-f", "[t]estbed.node.trainer"]).returncode == 0
