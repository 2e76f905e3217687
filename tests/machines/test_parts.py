"""What a lab of virtual machines is put together from, without one: clock, link, disks, what is refused."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner

from testbed.cli import main
from testbed.commands.lab import command as lab_command
from testbed.config import load_image_settings, load_inventory
from testbed.errors import LabError, TestbedError
from testbed.lab.link import LinkShape
from testbed.lab.machines import link, time_server
from testbed.lab.machines.host import VirtualMachineHost
from testbed.lab.machines.lab import MachineLab, take_down
from testbed.lab.machines.preparation import prepare
from testbed.lab.machines.qemu import command
from testbed.lab.machines.qmp import QmpError, connected
from testbed.lab.machines.spec import MachineFolder, MachineLabSpec, MachineSpec
from testbed.lab.opened import open_lab
from testbed.lab.opened import take_down as remove
from tests.needed import need

_EPOCH = 2_208_988_800


@pytest.fixture
def spec(tmp_path):
    """A lab of two, whose image is an empty disk."""
    image = tmp_path / "image"
    image.mkdir()
    qemu_img = shutil.which("qemu-img")
    if qemu_img is not None:
        subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", image / "disk.qcow2", "1M"], check=True)
    hosts = tuple(
        MachineSpec(f"board-{number}", number, f"127.0.0.1:{2200 + number}", 1 << 30, "virtual_board_arm64")
        for number in (1, 2)
    )
    return MachineLabSpec(hosts, "arm64", str(image), cores=2, accelerated=False, time_port=12300)


# ── the lab's clock ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_client_is_told_this_machines_time_and_its_own_stamp():
    request = bytes([4 << 3 | 3, 0, 6, 0]) + bytes(36) + b"CLIENTTX"
    reply = time_server.answer(request, received=1_000_000_000.25, sent=1_000_000_000.5)
    mode, version, stratum = reply[0] & 7, reply[0] >> 3 & 7, reply[1]
    originate, received, sent = reply[24:32], struct.unpack("!II", reply[32:40]), struct.unpack("!II", reply[40:48])
    assert (len(reply), mode, version, stratum) == (48, 4, 4, time_server.STRATUM)
    assert originate == b"CLIENTTX"
    assert received == (1_000_000_000 + _EPOCH, 1 << 30)
    assert sent == (1_000_000_000 + _EPOCH, 1 << 31)


@pytest.mark.parametrize("noise", [b"", b"hello", bytes(48), bytes([4 << 3 | 4]) + bytes(47)])
def test_what_is_no_clients_request_has_no_answer(noise):
    assert time_server.answer(noise, 0.0, 0.0) is None


def test_it_answers_on_its_socket():
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind(("127.0.0.1", 0))
        threading.Thread(target=_serve_until_closed, args=(server,), daemon=True).start()
        client.settimeout(30)
        client.sendto(b"noise", server.getsockname())
        client.sendto(bytes([4 << 3 | 3]) + bytes(47), server.getsockname())
        assert len(client.recv(512)) == 48


def _serve_until_closed(server):
    with contextlib.suppress(OSError):
        time_server.serve(server)


# ── the link ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_link_is_shaped_in_both_directions_and_again_at_every_boot():
    text = link.script(LinkShape(bits_per_second=20_000_000, delay_seconds=0.05, loss=0.01))
    words = "root netem limit 10000 delay 50000us loss 1% rate 20000000bit"
    assert f"tc qdisc add dev ifb0 {words}" in text
    assert f'tc qdisc add dev "$link" {words}' in text
    assert f"systemctl -q enable {link.SERVICE}" in text


def test_a_lifted_shape_leaves_no_discipline():
    assert "qdisc add" not in link.script(LinkShape())


@pytest.mark.parametrize("shape", [LinkShape(), LinkShape(delay_seconds=0.05)])
def test_shellcheck_finds_nothing_in_the_script(shape, tmp_path):
    need("shellcheck")
    for name, text in (("outer", link.script(shape)), ("inner", link.shaping(shape))):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\n{text}")
        subprocess.run(["shellcheck", script], check=True)


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_qemu_is_told_processor_memory_port_and_a_clock_that_is_wrong(spec, tmp_path):
    words = " ".join(command(spec, spec.hosts[1], MachineFolder(tmp_path, "board-2")))
    assert "-cpu cortex-a76 -accel tcg -smp 2 -m 1024" in words
    assert "hostfwd=tcp:127.0.0.1:2202-:22" in words
    assert "-rtc base=2025-01-01T00:00:00" in words


def test_a_labs_folder_is_found_again(spec, tmp_path):
    spec.save(tmp_path)
    found = open_lab(tmp_path)
    assert isinstance(found, MachineLab)
    assert found.spec == spec
    assert [host.state().state for host in found.hosts] == ["off", "off"]
    assert "Memory: what QEMU takes of this machine's, not what the board uses" in found.how()


def test_boards_are_made_from_rendered_files(spec, tmp_path):
    need("qemu-img", "mformat")
    folder = tmp_path / "lab"
    prepare(folder, spec, lambda text: None)
    devices = list(load_inventory(folder / "inventory.yaml"))
    assert [device.name for device in devices] == ["board-1", "board-2"]
    assert load_image_settings(folder / "inventory.yaml")["board-1"].time_servers == ("10.0.2.2:12300",)
    board = MachineFolder(folder, "board-1")
    public = (board.rendered / "known_hosts").read_text().split()[1:]
    assert f"board-1,[127.0.0.1]:2201 {' '.join(public)}\n" in (folder / "known_hosts").read_text()
    seed = subprocess.run(["mtype", "-i", board.seed, "::user-data"], capture_output=True, text=True, check=True).stdout
    assert seed == (board.rendered / "seed" / "user-data").read_text()
    assert "server 10.0.2.2 port 12300 iburst" in seed
    assert (board.seed.stat().st_mode & 0o777, board.disk.is_file()) == (0o600, True)


def test_an_image_that_is_gone_is_told(spec, tmp_path):
    spec.save(tmp_path)
    with pytest.raises(LabError, match=r"board-1 cannot start: the image .* is gone"):
        open_lab(tmp_path).host("board-1").start()


def test_what_is_off_refuses_what_needs_it_on(spec, tmp_path):
    spec.save(tmp_path)
    host = open_lab(tmp_path).host("board-1")
    for verb in (host.freeze, host.thaw, host.reboot, lambda: host.shape(LinkShape())):
        with pytest.raises(LabError, match=r"board-1 is off, .*testbed lab start board-1"):
            verb()


@pytest.mark.parametrize(
    ("status", "connected", "told"),
    [
        ("paused", True, "board-1 is frozen, and cannot {}; first `testbed lab thaw board-1`"),
        ("running", False, "board-1 is cut, and cannot {}; first `testbed lab mend board-1`"),
        ("paused", False, "board-1 is frozen, and cannot {}; first `testbed lab thaw board-1`"),
    ],
)
def test_what_cannot_answer_is_not_asked_over_ssh(spec, tmp_path, monkeypatch, status, connected, told):
    spec.save(tmp_path)
    host = open_lab(tmp_path).host("board-1")
    host.folder.path.mkdir(parents=True)
    getattr(host, "mend" if connected else "cut")()
    monkeypatch.setattr(VirtualMachineHost, "alive", True)
    monkeypatch.setattr(host, "_ask", lambda what: {"status": status})
    monkeypatch.setattr(host, "console", None)
    for verb, words in ((host.reboot, "reboot"), (lambda: host.shape(LinkShape()), "be shaped")):
        with pytest.raises(LabError, match=re.escape(told.format(words))):
            verb()


def test_a_verb_tells_what_the_machine_is_afterwards(spec, tmp_path, capsys):
    spec.save(tmp_path)
    (tmp_path / "hosts" / "board-1").mkdir(parents=True)
    words = ["board-1", "--folder", str(tmp_path)]
    assert [main(["lab", verb, *words]) for verb in ("cut", "mend", "stop")] == [0, 0, 0]
    assert capsys.readouterr().out == "board-1: cut\nboard-1: mended\nboard-1: off\n"
    assert main(["lab", "reboot", *words]) == 1
    told = capsys.readouterr().err
    assert told.startswith("board-1: rebooting …\n")
    assert f"`testbed lab start --folder {tmp_path} board-1` starts it" in told


def test_half_a_lab_is_taken_down(spec, tmp_path):
    folder = tmp_path / "lab"
    folder.mkdir()
    spec.save(folder)
    take_down(folder)
    assert not folder.exists()
    with pytest.raises(LabError, match="there is no lab"):
        take_down(folder)


def test_a_lab_that_cannot_be_read_is_taken_down_all_the_same(tmp_path):
    folder = tmp_path / "lab"
    folder.mkdir()
    (folder / "lab.json").write_text('{"made_of": "virtual machines"}')
    with pytest.raises(LabError, match=r"not a lab's, or not yet .*testbed lab down"):
        open_lab(folder)
    remove(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--vm", "--persona", "plain"), "--persona is not for virtual machines"),
        (("--vm", "--subnet", "10.0.0.0/24"), "--subnet is not for virtual machines"),
        (("--architecture", "amd64"), "--architecture needs --vm"),
        (("--no-environment",), "--no-environment needs --vm"),
        (("--vm", "--memory", "64 MiB"), "--memory: expected at least 512 MiB for a virtual machine"),
        (("--vm", "--memory", "0 B"), "--memory: expected at least 512 MiB for a virtual machine, got 0 B"),
        (("--vm", "--memory", "3"), '--memory: expected bytes such as "4 GiB", got "3"'),
        (("--vm", "--devices", "3", "--memory", "900 GiB"), r"would have 2\.6 TiB together, and this machine has"),
    ],
)
def test_options_of_the_other_kind_are_refused(words, told, tmp_path):
    with pytest.raises(TestbedError, match=told):
        CliRunner().invoke(lab_command, ["up", *words, "--folder", str(tmp_path)], catch_exceptions=False)


# ── QEMU's own protocol ──────────────────────────────────────────────────────────────────────────────────────────────
def test_a_machine_without_a_system_answers(tmp_path):
    need("qemu-system-x86_64")
    words = [
        "qemu-system-x86_64",
        "-machine",
        "none",
        "-nodefaults",
        "-display",
        "none",
        "-qmp",
        "unix:qmp.sock,server=on,wait=off",
    ]
    subprocess.run([*words, "-daemonize", "-S"], cwd=tmp_path, check=True)
    with connected(tmp_path) as qmp:
        assert qmp.ask("query-status")["running"] is False
        with pytest.raises(QmpError, match="set_link"):
            qmp.ask("set_link", name="nothing", up=False)
        qmp.ask("quit")
    with pytest.raises((QmpError, FileNotFoundError)), connected(tmp_path):
        pass


def test_the_time_server_goes_on_by_itself():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "testbed.lab.machines.time_server", str(port)]
    pid = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(30)
            client.sendto(bytes([4 << 3 | 3]) + bytes(47), ("127.0.0.1", port))
            assert len(client.recv(512)) == 48
    finally:
        os.kill(pid, signal.SIGTERM)
