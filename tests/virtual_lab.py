"""Virtual labs for tests: real hosts, each with an address, an SSH server, users and a memory cap of its own.

    pytestmark = pytest.mark.lab

    def test_something(plain_lab):            # three plain hosts, shared by the module: board-1, board-2, board-3
        ssh(plain_lab, "board-1", "true")

    def test_provisioning(boards):            # a Jetson Orin Nano, a Raspberry Pi 5 and a Raspberry Pi 4, likewise
        load_inventory(boards.inventory)

    def test_something_else(tmp_path):        # one's own
        with virtual_lab(tmp_path / "lab", devices=1, personas=("plain",)) as lab:
            lab.host("board-1").cut()

A host that a test has cut, frozen, stopped or shaped must be put right by that test (`as_new`).
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import LabError
from testbed.lab.host import NamespaceHost
from testbed.lab.lab import Lab
from testbed.lab.link import LinkShape
from testbed.lab.network import overlapping
from testbed.lab.preflight import check_machine
from testbed.lab.wish import PLAIN, LabWish
from tests.drills import wait_until

MIB = 1 << 20


@functools.cache
def why_no_lab() -> str | None:
    """None where a lab can be brought up, with every kind of link; else what is in the way."""
    everything = LinkShape(bits_per_second=10**6, delay_seconds=0.001)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            check_machine(Path(scratch), everything, free_subnet())
        except (LabError, OSError) as error:
            return str(error)
    return None


def free_subnet() -> str:
    """A network that nothing on this machine uses now; other test runs beside this one look elsewhere first."""
    first = os.getpid() % 200
    candidates = (f"10.{100 + (first + step) % 100}.{first}.0/24" for step in range(100))
    return next(subnet for subnet in candidates if overlapping(subnet) is None)


@contextmanager
def virtual_lab(folder: Path, **wish: Any) -> Iterator[Lab]:
    """A lab in a folder that is not there yet, with a quick reboot; `wish` as for LabWish."""
    with Lab.up(folder, LabWish(**{"subnet": free_subnet(), "boot_delay_seconds": 0.2, **wish})) as lab:
        yield lab


@pytest.fixture(scope="module")
def plain_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("plain") / "lab"
    with virtual_lab(folder, devices=3, personas=(PLAIN,), memory_bytes=512 * MIB) as lab:
        yield lab


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with virtual_lab(tmp_path_factory.mktemp("boards") / "lab") as lab:
        yield lab


def ssh_command(lab: Lab, host: str, *command: str, user: str | None = None) -> list[str]:
    who = () if user is None else ("-l", user)
    return ["ssh", "-F", str(lab.ssh_config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *who, host, *command]


def ssh(lab: Lab, host: str, *command: str, user: str | None = None, code: int | None = 0) -> str:
    """What a command says there over SSH, as `admin` or another user; its exit code must be `code` (None: any)."""
    done = subprocess.run(
        ssh_command(lab, host, *command, user=user),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert code in {None, done.returncode}, f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def as_new(host: NamespaceHost) -> None:
    """On, thawed, mended, unshaped and answering."""
    host.thaw()
    host.start()
    host.mend()
    host.shape(LinkShape())
    host.wait_up()


def wait_rebooted(host: NamespaceHost, boots_before: int) -> None:
    """Wait until a host that reboots by itself is up again."""
    wait_until(lambda: host.state().boots > boots_before)
    host.wait_up()
