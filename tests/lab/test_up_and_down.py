"""A lab comes up whole or not at all, and goes without a trace."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from testbed.cli import main
from testbed.errors import LabError, UsageError
from testbed.lab import furnish, preflight
from testbed.lab.host import keepers_of
from testbed.lab.lab import Lab, take_down
from testbed.lab.link import LinkShape
from testbed.lab.spec import lab_id
from testbed.lab.wish import LabWish
from tests.drills import processes_below
from tests.virtual_lab import MIB, free_subnet, ssh, virtual_lab

lab_marker = pytest.mark.lab
PLAIN = {"personas": ("plain",), "memory_bytes": 256 * MIB}


def namespaces(pid):
    return {str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for kind in ("net", "mnt", "pid", "uts", "ipc")}


def all_namespaces():
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            found |= namespaces(path.name)
    return found


def left_of(folder):
    """Links, cgroups, mounts, processes and files of a lab."""
    identity = lab_id(folder)
    links = [path.name for path in Path("/sys/class/net").iterdir() if identity in path.name]
    groups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/testbed-lab-{identity}")]
    groups += [str(path) for path in Path("/sys/fs/cgroup").glob(f"testbed-lab-{identity}")]
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line]
    return [*links, *groups, *mounts, *keepers_of(folder), *processes_below(folder), *folder.parent.glob(folder.name)]


@lab_marker
def test_down_leaves_nothing(tmp_path):
    folder = tmp_path / "lab"
    with virtual_lab(folder, devices=2, shape=LinkShape(10**7, 0.001), **PLAIN) as lab:
        inside = set().union(*(namespaces(host.state().init) for host in lab.hosts)) - namespaces(os.getpid())
        assert len(inside) == 10
        ssh(lab, "board-1", "setsid sleep 1000 >/dev/null 2>&1 &")
        lab.host("board-2").freeze()
        assert left_of(folder)
    assert left_of(folder) == []
    assert not inside & all_namespaces()


@lab_marker
def test_down_finds_what_is_left_of_half_a_lab(tmp_path):
    folder = tmp_path / "lab"
    with virtual_lab(folder, devices=2, **PLAIN) as lab:
        first, second = lab.hosts
        os.kill(first.state().keeper, signal.SIGKILL)
        subprocess.run(["ip", "link", "del", lab.spec.bridge], check=True)
        second.freeze()
        shutil.rmtree(folder)
    assert left_of(folder) == []
    with pytest.raises(LabError, match="there is no lab in"):
        take_down(folder)


@lab_marker
def test_down_spares_what_is_not_the_labs(tmp_path):
    folder = tmp_path / "lab"
    with virtual_lab(folder, devices=1, **PLAIN):
        (folder / "notes").write_text("mine")
    assert [path.name for path in folder.iterdir()] == ["notes"]
    with pytest.raises(LabError, match=r"holds other files \(notes\) and no lab: name a new folder"):
        Lab.up(folder, LabWish(subnet=free_subnet(), **PLAIN))


@lab_marker
def test_a_second_up_says_that_there_is_one_and_two_labs_live_side_by_side(tmp_path):
    with virtual_lab(tmp_path / "one", devices=1, **PLAIN) as one:
        with pytest.raises(LabError, match=r"there is a lab in .*`testbed lab status`"):
            Lab.up(one.folder, LabWish(subnet=free_subnet(), **PLAIN))
        with pytest.raises(LabError, match=f"overlaps with {one.spec.subnet}.*--subnet"):
            Lab.up(tmp_path / "two", LabWish(subnet=one.spec.subnet, **PLAIN))
        with virtual_lab(tmp_path / "two", devices=1, **PLAIN) as two:
            assert [ssh(lab, "board-1", "hostname -I").split() for lab in (one, two)] == [
                [one.hosts[0].address],
                [two.hosts[0].address],
            ]
        assert ssh(one, "board-1", "echo here") == "here\n"


@lab_marker
def test_a_lab_that_fails_half_way_is_taken_away(tmp_path, monkeypatch):
    """A host whose SSH server cannot start: its bridge, groups and files are there by then."""
    broken = tmp_path / "sshd"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("testbed.lab.lab.find", lambda name: str(broken))
    folder = tmp_path / "lab"
    with pytest.raises(LabError, match="board-1"):
        Lab.up(folder, LabWish(devices=1, subnet=free_subnet(), **PLAIN))
    assert left_of(folder) == []


@lab_marker
def test_an_interrupted_up_is_taken_away(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("testbed.lab.lab.launch", interrupt)
    folder = tmp_path / "lab"
    with pytest.raises(KeyboardInterrupt):
        Lab.up(folder, LabWish(devices=1, subnet=free_subnet(), **PLAIN))
    assert left_of(folder) == []


@lab_marker
def test_the_command_line_brings_up_drills_and_takes_down(tmp_path, capsys):
    folder = ["--folder", str(tmp_path / "lab")]
    assert main(["lab", "up", "--devices", "1", "--persona", "plain", "--boot-delay", "0.1s",
                 "--bandwidth", "100mbit", "--subnet", free_subnet(), *folder]) == 0  # fmt: skip
    told = capsys.readouterr().out
    assert "100 Mbit/s" in told
    assert f"inventory: {tmp_path}/lab/inventory.yaml" in told
    told_of = {
        "cut": "cut", "mend": "mended", "freeze": "frozen", "thaw": "thawed",
        "reboot": "up", "stop": "off", "start": "up",
    }  # fmt: skip
    for verb, condition in told_of.items():
        assert main(["lab", verb, "board-1", *folder]) == 0
        assert capsys.readouterr().out == f"board-1: {condition}\n"
    assert main(["lab", "cut", "board-1", *folder]) == 0
    assert main(["lab", "start", "board-1", *folder]) == 0
    assert capsys.readouterr().out.endswith("board-1: up, and its cable is pulled\n")
    assert main(["lab", "mend", "board-1", *folder]) == 0
    capsys.readouterr()
    assert main(["lab", "shape", "board-1", "--delay", "1ms", *folder]) == 0
    assert capsys.readouterr().out == "board-1: 1 ms each way\n"
    assert main(["lab", "status", "--json", *folder]) == 0
    [host] = json.loads(capsys.readouterr().out)["hosts"]
    assert (host["state"], host["connected"], host["boots"]) == ("up", True, 3)
    assert host["shape"]["delay_seconds"] == pytest.approx(0.001)
    assert main(["lab", "cut", "board-2", *folder]) == 2
    assert 'the lab has no host "board-2"; did you mean "board-1"?' in capsys.readouterr().err
    assert main(["lab", "down", *folder]) == 0
    assert left_of(tmp_path / "lab") == []


def test_without_a_lab_every_command_says_so(tmp_path, capsys):
    for words in (["status"], ["down"], ["cut", "board-1"]):
        assert main(["lab", *words, "--folder", str(tmp_path / "none")]) == 1
        assert f"there is no lab in {tmp_path}/none" in capsys.readouterr().err


def test_all_that_is_lacking_is_told_at_once_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("testbed.programs.SEARCH_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(LabError) as error:
        Lab.up(tmp_path / "lab", LabWish(**PLAIN))
    told = str(error.value)
    for package in ("iproute2", "openssh-server", "openssh-client", "sudo", "util-linux"):
        assert f"install the package {package}" in told
    assert "run it with sudo" in told
    assert list(tmp_path.iterdir()) == []


@lab_marker
def test_what_the_kernel_lacks_is_told(tmp_path, monkeypatch):
    lacking = "echo overlay ok; echo sysfs ok; echo bridge ok; echo veth ok"
    monkeypatch.setattr(preflight, "_TRIALS", lacking)
    with pytest.raises(LabError) as error:
        Lab.up(tmp_path / "lab", LabWish(shape=LinkShape(10**6, 0.1), subnet=free_subnet(), **PLAIN))
    assert "no tbf, which --bandwidth needs" in str(error.value)
    assert "neither netem nor TAP devices" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@lab_marker
def test_a_folder_that_cannot_be_written_is_told():
    with pytest.raises(LabError, match=r"/proc cannot be written .*--folder"):
        preflight.check_machine(Path("/proc/lab"), LinkShape(), free_subnet())


@lab_marker
def test_a_folder_that_no_overlay_can_be_made_in_is_told(tmp_path, monkeypatch):
    """As on the overlay that is a container's root."""
    monkeypatch.setattr(preflight, "_TRIALS", "echo netem ok; echo wrong fs type >&2")
    with pytest.raises(LabError, match=r"no overlay file system can be laid over / .*wrong fs type.*--folder"):
        Lab.up(tmp_path / "lab", LabWish(subnet=free_subnet(), **PLAIN))


def test_wrong_wishes_exit_with_2(tmp_path, capsys):
    for words in (["--persona", "toaster"], ["--delay", "soon"], ["--subnet", "here"], ["--devices", "0"]):
        assert main(["lab", "up", "--folder", str(tmp_path / "lab"), *words]) == 2
        assert capsys.readouterr().err
    assert not (tmp_path / "lab").exists()


def test_a_host_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UsageError, match="there is no persona"):
        Lab.up(tmp_path / "lab", LabWish(personas=("toaster",)))


@lab_marker
def test_a_service_of_this_machine_is_not_seen_on_a_host(tmp_path, monkeypatch):
    monkeypatch.setattr(furnish, "_LEFT_OUT", ("/usr/bin/yes", "/usr/bin/not-there"))
    with virtual_lab(tmp_path / "lab", **PLAIN) as lab:
        seen = lab.hosts[0].console(["sh", "-c", "command -v yes; command -v env"])
    assert seen.stdout.split() == ["/usr/bin/env"]
