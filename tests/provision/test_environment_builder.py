"""The builder on the device, as real processes: whoever comes later ends one that was left at work, with its pip."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.connection import LocalConnection
from testbed.errors import DeviceError
from testbed.inventory import Budget, Device, HardwareProfile
from testbed.provision import environment_builder
from testbed.provision.facts import FACTS_SCRIPT_PARTS
from testbed.provision.step import Change
from testbed.provision.visit import CHANGED, FAILED, Visit
from testbed.ssh import connect
from tests.ssh_server import SshServer

WANTED = {"torch": "2"}
#: In the place of pip: says that it is there, and never ends by itself.  What it starts holds `alive` open, too.
PIP = """
import os, subprocess, sys
alive = os.open({alive!r}, os.O_WRONLY)
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"], pass_fds=[alive])
os.write(alive, b"x")
child.wait()
"""


@pytest.fixture
def folder(tmp_path):
    """Of the testbed on a device, with a pip that hangs among the contents."""
    folder = tmp_path / "testbed"
    pip = folder / "content" / "hangs" / "pip"
    pip.mkdir(parents=True)
    os.mkfifo(tmp_path / "alive")
    (pip / "__main__.py").write_text(PIP.format(alive=str(tmp_path / "alive")))
    return folder


def command(verb):
    return [sys.executable, "-I", "-c", Path(environment_builder.__file__).read_text(), verb]


def build(verb, **arguments):
    done = subprocess.run(command(verb), input=json.dumps(arguments), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["answer"]


def hanging(folder):
    """What a builder is told so that its pip hangs."""
    stage = {"stage": "torch", "pip": "hangs", "requirements": [], "wheels": {}, "index": None}
    return json.dumps({"folder": str(folder), **stage}).encode()


@contextmanager
def installing(folder):
    """A builder whose pip is at work: the process, and what can be read until the last of them has ended."""
    build("begin", folder=str(folder), wanted=WANTED)
    with subprocess.Popen(command("install"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as builder:
        builder.stdin.write(hanging(folder))
        builder.stdin.close()
        with (folder.parent / "alive").open("rb", buffering=0) as alive:
            assert alive.read(1) == b"x"
            yield builder, alive


def test_a_builder_that_was_left_at_work_is_ended_by_the_next_and_what_it_did_is_kept(folder):
    with installing(folder) as (builder, alive):
        (folder / "env.partial" / "testbed-done" / "packages").touch()
        assert build("begin", folder=str(folder), wanted=WANTED) == ["packages"]
        assert alive.read() == b""  # nobody holds it open any more
        assert builder.wait() == 128 + signal.SIGKILL


def test_the_lock_is_held_for_as_long_as_pip_lives(folder):
    """Also where the builder itself is gone: the kernel may have ended it for want of memory."""
    with installing(folder) as (builder, alive):
        os.kill(int((folder / environment_builder.BUILDER_LOCK).read_text()), signal.SIGKILL)
        assert builder.wait() == 128 + signal.SIGKILL
        assert build("begin", folder=str(folder), wanted=WANTED) == []
        assert alive.read() == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_builder_that_is_told_to_end_ends_its_pip(folder, number):
    """As the time-out of its command does it."""
    with installing(folder) as (builder, alive):
        builder.send_signal(number)
        assert alive.read() == b""
        assert builder.wait() == 128 + signal.SIGKILL


@pytest.mark.sshd
def test_a_build_over_ssh_that_takes_too_long_is_ended_there(folder, tmp_path):
    with SshServer(tmp_path / "server") as server, ThreadPoolExecutor(1) as pool:
        connection = connect("board", server.access)
        build("begin", folder=str(folder), wanted=WANTED)
        alive = pool.submit((folder.parent / "alive").read_bytes)
        with pytest.raises(DeviceError, match="no end after 2 s; it was ended there"):
            connection.attempt(command("install"), 2.0, data=hanging(folder))
        assert alive.result() == b"x"
        connection.close()


def test_a_record_is_written_beside_a_builder_at_work(folder):
    with installing(folder) as (builder, alive):
        build("write", path=str(folder / "proof.json"), record={"key": 1})
        assert builder.poll() is None
        builder.terminate()
        assert alive.read() == b""


# ── in a visit ───────────────────────────────────────────────────────────────────────────────────────────────────────
class Link(LocalConnection):
    """A link that may break for good."""

    broken = False

    def attempt(self, *arguments, **more):
        if self.broken:
            raise DeviceError(f"{self.name}: the connection was lost")
        return super().attempt(*arguments, **more)


class Environment:
    """An environment whose build breaks off while `meanwhile` is done, and which is then built by one verb."""

    name = "environment"

    def __init__(self, folder, link, meanwhile):
        self.folder, self.link, self.meanwhile = folder, link, meanwhile
        self.built = False

    def check(self, facts, device):
        return None if self.built else Change(self.name, "none", "there", action=self._build)

    def _build(self, connection, say):
        if connection is self.link:
            self.meanwhile()
            raise DeviceError("box: the connection was lost")
        build("begin", folder=str(self.folder), wanted=WANTED)
        self.built = True


def visited(folder, link, meanwhile=lambda: None, steps=None):
    profile = HardwareProfile("box", "A box", 1 << 40, 1 << 20, 1)
    box = Device("box", "generic", profile, Budget(1), folder=str(folder))
    return Visit(box, steps or (Environment(folder, link, meanwhile),), FACTS_SCRIPT_PARTS, lambda: link).go()


def test_a_visit_that_lets_go_leaves_no_builder_at_work(folder):
    link = Link("box")
    with installing(folder) as (builder, alive):
        assert visited(folder, link).status == FAILED
        assert alive.read() == b""
        assert builder.wait() == 128 + signal.SIGKILL


def test_what_a_visit_without_a_link_left_at_work_is_ended_by_the_next(folder):
    first = Link("box")
    with installing(folder) as (builder, alive):
        assert visited(folder, first, lambda: setattr(first, "broken", True)).status == FAILED
        assert builder.poll() is None
        assert visited(folder, Link("box"), steps=(Environment(folder, first, None),)).status == CHANGED
        assert alive.read() == b""
        assert builder.wait() == 128 + signal.SIGKILL
