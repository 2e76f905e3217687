"""What a host of the lab is, seen from inside and over SSH."""

import json
import sys
import time
from pathlib import Path

import pytest

from testbed.cli import main
from testbed.config import load_inventory
from testbed.lab.link import LinkShape
from testbed.node.kernel_file import KernelFile
from tests.virtual_lab import MIB, as_new, ssh, virtual_lab

pytestmark = pytest.mark.lab


def test_every_host_is_a_machine_of_its_own(plain_lab):
    told = [
        ssh(plain_lab, host.name, "hostname; cat /etc/hostname /etc/machine-id").split() for host in plain_lab.hosts
    ]
    assert [names[:2] for names in told] == [[f"board-{number}"] * 2 for number in (1, 2, 3)]
    assert len({machine_id for _, _, machine_id in told}) == 3
    keys = {ssh(plain_lab, host.name, "cat /etc/ssh/ssh_host_ed25519_key.pub") for host in plain_lab.hosts}
    assert len(keys) == 3


def test_hosts_reach_each_other_by_name_and_nothing_else(plain_lab):
    knock = "exec 3<>/dev/tcp/{}/22 && head -c 4 <&3"
    assert ssh(plain_lab, "board-1", knock.format("board-2")) == "SSH-"
    assert "Network is unreachable" in ssh(plain_lab, "board-1", f"{{ {knock.format('192.0.2.1')}; }} 2>&1", code=1)


def test_admin_may_use_sudo_and_tester_may_not(plain_lab):
    assert ssh(plain_lab, "board-1", "id -un; sudo -n id -un").split() == ["admin", "root"]
    assert ssh(plain_lab, "board-1", "id -un; sudo -n id -un", user="tester", code=1).split() == ["tester"]


def test_root_and_passwords_do_not_get_in(plain_lab):
    ssh(plain_lab, "board-1", "true", user="root", code=255)
    settings = ssh(plain_lab, "board-1", "sudo /usr/sbin/sshd -T -f /etc/ssh/sshd_config").splitlines()
    assert {"passwordauthentication no", "permitrootlogin no", "kbdinteractiveauthentication no"} <= set(settings)


def test_what_a_host_writes_stays_on_it(plain_lab):
    ssh(plain_lab, "board-1", "sudo touch /usr/local/written; sudo rm -r /etc/skel; touch /tmp/written ~/written")
    assert not Path("/usr/local/written").exists()
    assert not Path("/tmp/written").exists()
    assert Path("/etc/skel").exists()
    ssh(plain_lab, "board-2", "test -d /etc/skel && ! test -e /usr/local/written -o -e /tmp/written -o -e ~/written")


def test_what_is_personal_on_this_machine_is_not_seen(plain_lab):
    secrets = f"ls -A /root /home {plain_lab.folder} {Path.home()}/.ssh"
    seen = set(ssh(plain_lab, "board-1", f"sudo {secrets} 2>/dev/null", code=None).split())
    assert {"admin", "tester"} <= seen
    assert not seen & {"id_ed25519", "lab.json", "authorized_keys", ".gitconfig", ".bash_history"}


def test_root_of_a_host_does_not_change_this_machine(plain_lab):
    ssh(plain_lab, "board-1", "sudo date -s 2001-01-01", code=1)
    ssh(plain_lab, "board-1", "sudo sh -c 'echo 1 >/proc/sys/vm/drop_caches'", code=2)
    ssh(plain_lab, "board-1", "sudo mknod /tmp/disk b 254 0", code=1)
    before = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    wanted = "sudo sh -c 'echo never >/sys/kernel/mm/transparent_hugepage/enabled'"
    assert ssh(plain_lab, "board-1", f"{wanted}; cat /sys/kernel/mm/transparent_hugepage/enabled") == "never\n"
    assert Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text() == before


def test_a_host_sees_its_own_memory_clock_and_processes(plain_lab):
    told = ssh(plain_lab, "board-1", "grep MemTotal /proc/meminfo; cat /proc/uptime; ls -d /proc/[0-9]* | wc -l")
    memory, uptime, processes = told.splitlines()
    assert memory.split()[1] == str(512 << 10)
    assert float(uptime.split()[0]) < time.clock_gettime(time.CLOCK_BOOTTIME)
    assert int(processes) < 20
    boots = {ssh(plain_lab, host.name, "cat /proc/sys/kernel/random/boot_id") for host in plain_lab.hosts}
    assert len(boots) == 3


def test_the_controllers_interpreter_is_there_for_everybody(plain_lab):
    program = "import numpy, sys; print(sys.prefix)"
    command = f"{sys.executable} -c '{program}'"
    assert ssh(plain_lab, "board-1", command, user="tester").strip() == sys.prefix


def test_torch_computes_behind_the_face_of_a_board(tmp_path):
    with virtual_lab(tmp_path / "lab", personas=("raspberry_pi_5_8gb",), memory_bytes=1024 * MIB) as lab:
        program = "import torch; print(int((torch.ones(64, 64) @ torch.ones(64, 64)).sum()))"
        assert ssh(lab, "raspberry-pi-5", f"OMP_NUM_THREADS=1 {sys.executable} -c '{program}'").strip() == str(64**3)


def test_the_cap_kills_a_hog_and_leaves_the_server_alive(tmp_path):
    with virtual_lab(tmp_path / "lab", personas=("plain",), memory_bytes=192 * MIB) as lab:
        assert ssh(lab, "board-1", f"{sys.executable} -c 'bytearray(400 << 20)' 2>&1; echo $?").split()[-1] == "137"
        assert ssh(lab, "board-1", "echo alive") == "alive\n"
        group = lab.host("board-1").groups().memory
        events = group / ("memory.oom_control" if (group / "memory.oom_control").exists() else "memory.events")
        assert KernelFile(events).table()["oom_kill"] == 1


def test_a_user_can_be_given_a_memory_group(plain_lab):
    """What provisioning does: root makes a group for a user, who caps a process of its own in it."""
    if not Path("/sys/fs/cgroup/memory").exists():
        pytest.skip("on cgroup v2 this takes a service manager")
    group = "/sys/fs/cgroup/memory/delegated"
    ssh(plain_lab, "board-1", f"sudo mkdir {group} && sudo chown -R tester {group}")
    limit = f"mkdir {group}/own && echo $((64 << 20)) >{group}/own/memory.limit_in_bytes"
    hog = f"(echo $BASHPID >{group}/own/cgroup.procs && exec {sys.executable} -c 'bytearray(200 << 20)')"
    assert ssh(plain_lab, "board-1", f"{limit}; {hog} 2>&1; echo $?", user="tester").split()[-1] == "137"
    assert "oom_kill 1" in ssh(plain_lab, "board-1", f"cat {group}/own/memory.oom_control")


def test_a_board_without_its_word_on_the_kernel_line_has_no_memory_cgroup(boards):
    host = boards.host("raspberry-pi-5")
    ssh(
        boards, host.name, "grep -q ':memory:\\|^0::' /proc/self/cgroup && ! test -e /sys/fs/cgroup/memory/cgroup.procs"
    )
    ssh(boards, host.name, "sudo sed -i '1s/$/ cgroup_enable=memory/' /boot/firmware/cmdline.txt")
    host.reboot()
    host.wait_up()
    ssh(boards, host.name, "test -e /sys/fs/cgroup/memory/cgroup.procs -o -e /sys/fs/cgroup/memory.max")
    ssh(boards, "jetson-orin-nano", "test -e /sys/fs/cgroup/memory/cgroup.procs -o -e /sys/fs/cgroup/memory.max")


def test_the_inventory_works_at_once(plain_lab, boards):
    plain, faces = load_inventory(plain_lab.inventory), load_inventory(boards.inventory)
    assert [device.kind for device in plain] == ["generic"] * 3
    assert [device.kind for device in faces] == ["jetson", "raspberry_pi", "raspberry_pi"]
    [device, *_] = plain
    assert device.budget.memory_bytes == 384 * MIB
    assert device.profile.usable_memory_bytes == 512 * MIB
    assert device.access.ssh_config == str(plain_lab.ssh_config)
    assert device.python == sys.executable


def test_the_link_is_as_fast_as_it_is_told_to_be(plain_lab):
    """Four times the bandwidth, a quarter of the time: a ratio, because this machine may be busy."""
    host = plain_lab.host("board-3")

    def seconds(bits_per_second):
        host.shape(LinkShape(bits_per_second))
        start = time.monotonic()
        ssh(plain_lab, host.name, "head -c 1500000 /dev/zero | tee >(cat >&2)")
        return time.monotonic() - start

    slow, fast = seconds(8_000_000), min(seconds(32_000_000) for _ in range(3))
    as_new(host)
    assert slow > 3.0  # twice 1.5 MB through 1 MB/s cannot take less
    assert 2.0 < slow / fast < 8.0


def test_a_delay_is_added_in_each_direction(plain_lab):
    host = plain_lab.host("board-3")
    host.shape(LinkShape(delay_seconds=0.05))
    start = time.monotonic()
    ssh(plain_lab, host.name, "true")
    elapsed = time.monotonic() - start
    as_new(host)
    assert elapsed > 5 * 0.1  # the key exchange alone has more round trips


def test_what_a_lossy_link_carries_arrives_whole(plain_lab):
    host = plain_lab.host("board-3")
    host.shape(LinkShape(loss=0.05))
    told = ssh(plain_lab, host.name, "seq 20000")
    as_new(host)
    assert told.split() == [str(number) for number in range(1, 20001)]


def test_status_tells_all_in_base_units(plain_lab, capsys):
    assert main(["lab", "status", "--json", "--folder", str(plain_lab.folder)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["delay_by"] in {"netem", "relay"}
    assert [host["state"] for host in told["hosts"]] == ["up"] * 3
    assert told["hosts"][0]["memory_bytes"] == 512 * MIB
    assert told["hosts"][0]["shape"] == {"bits_per_second": None, "delay_seconds": 0.0, "loss": 0.0}
    assert told["inventory"] == str(plain_lab.inventory)
