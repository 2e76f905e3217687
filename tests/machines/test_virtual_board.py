"""A virtual board, from the Debian recipe to a provisioned device: built, booted, attested, disturbed.

One board for the whole file, because each boot is emulated: the tests go on where the one before stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from testbed.lab.link import LinkShape
from testbed.programs import find, run

pytestmark = [pytest.mark.slow, pytest.mark.vm, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def desk(machine, tmp_path_factory):
    """Types `testbed …`, with runs and facts in a folder of its own."""
    folder = tmp_path_factory.mktemp("desk")

    def testbed(*words, code=0):
        command = [sys.executable, "-m", "testbed", *words]
        environment = {**os.environ, "NO_COLOR": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return testbed


def inside(machine, *command):
    done = machine.hosts[0].console(command)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_what_its_rendered_files_want(machine):
    [board] = machine.hosts
    assert (board.state().state, board.state().boots) == ("up", 1)
    assert inside(machine, "hostname") == "board-1"
    assert inside(machine, "cloud-id") == "nocloud"


def test_its_clock_was_wrong_and_the_labs_time_server_put_it_right(machine):
    """It starts in January 2025; chrony steps it."""
    assert "10.0.2.2" in inside(machine, "chronyc", "-n", "sources")
    seconds_off = float(inside(machine, "chronyc", "-c", "tracking").split(",")[4])
    assert abs(seconds_off) < 1


def test_provisioning_attests_it_and_lets_its_user_cap_memory(machine, desk):
    told = desk("provision", "--inventory", str(machine.inventory), "--no-environment")
    assert "attestation: debian_trixie: 7 of 7 hold" in told
    again = desk("provision", "--inventory", str(machine.inventory), "--no-environment")
    assert "1 device ready; nothing was changed" in again


def test_a_scope_of_its_users_manager_caps_memory_and_the_kernel_knows_the_peak(machine):
    """What an agent does on a board with cgroup v2, without sudo."""
    script = (
        "systemd-run --user --scope -q -p MemoryMax=64M -p MemorySwapMax=0 sh -c "
        "'head -c 30000000 /dev/zero | tail -c 30000000 >/dev/null; "
        "cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.peak "
        "/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.max'"
    )
    told = inside(machine, "su", "-", "testbed", "-c", f"XDG_RUNTIME_DIR=/run/user/1000 {script}")
    peak, limit = map(int, told.split())
    assert limit == 64 << 20
    assert 30_000_000 < peak <= limit


def test_the_kernels_netem_delays_both_directions(machine):
    [board] = machine.hosts
    board.shape(LinkShape(delay_seconds=0.01))  # the tests that follow do not mind
    told = json.loads(inside(machine, "tc", "-j", "qdisc", "show"))
    netem = {line["dev"]: line["options"] for line in told if line["kind"] == "netem"}
    assert len(netem) == 2
    assert "ifb0" in netem
    assert all(options["delay"]["delay"] == pytest.approx(0.01) for options in netem.values())


def test_a_cable_that_is_pulled_and_a_machine_that_is_frozen(machine):
    [board] = machine.hosts
    board.cut()
    assert board.state().connected is False
    board.mend()
    board.wait_up()
    board.freeze()
    assert board.state().state == "frozen"
    board.thaw()
    board.wait_up()


def test_what_was_changed_by_hand_is_shown_as_drift(machine, desk):
    inside(machine, "sh", "-c", "echo 'PasswordAuthentication yes' >/etc/ssh/sshd_config.d/05-by-hand.conf")
    inside(machine, "systemctl", "reload", "ssh.service")
    told = desk("provision", "--inventory", str(machine.inventory), "--no-environment", code=1)
    assert "drifted: password_login: refused → " in told


def test_a_disk_that_is_built_has_the_boards_files_where_cloud_init_looks(machine, desk, tmp_path):
    """`testbed image build` for the folder that the board was made from; the disk's own checker finds nothing wrong."""
    rendered = machine.hosts[0].folder.rendered
    disk, raw = tmp_path / "board-1.qcow2", tmp_path / "board-1.raw"
    told = desk("image", "build", str(rendered), "-o", str(disk))
    assert f"file={disk}" in told
    assert (disk.stat().st_mode & 0o777, sorted(path.name for path in tmp_path.iterdir())) == (0o600, ["board-1.qcow2"])
    run(["qemu-img", "convert", "-O", "raw", str(disk), str(raw)])
    run(["e2fsck", "-f", "-n", str(raw)])
    for name in ("user-data", "meta-data", "network-config"):
        words = [find("debugfs"), "-R", f"cat /var/lib/cloud/seed/nocloud/{name}", raw]
        seen = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert seen == (rendered / "seed" / name).read_text()
