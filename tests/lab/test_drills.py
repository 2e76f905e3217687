"""What can be done to a host, and what of it survives."""

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from testbed.errors import LabError
from testbed.lab.link import LinkShape
from testbed.process_identity import ProcessIdentity
from tests.drills import exists, wait_until
from tests.virtual_lab import as_new, ssh, ssh_command, wait_rebooted

pytestmark = pytest.mark.lab
#: How long nothing comes back from a host that cannot answer.
SILENCE_SECONDS = 0.3


@pytest.fixture
def host(plain_lab):
    yield plain_lab.host("board-1")
    as_new(plain_lab.host("board-1"))


class Echo:
    """An open connection that says everything again."""

    def __init__(self, lab, host):
        self._process = subprocess.Popen(
            ssh_command(lab, host.name, "cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.communicate()

    def say(self, text):
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def hear(self, patience_seconds=30.0):
        """What has come back; None when nothing does in that time."""
        ready, _, _ = select.select([self._process.stdout], [], [], patience_seconds)
        return os.read(self._process.stdout.fileno(), 4096) if ready else None

    def wait_end(self):
        assert self._process.wait(30.0) is not None


@pytest.mark.parametrize(("break_it", "put_right"), [("cut", "mend"), ("freeze", "thaw")])
def test_a_connection_lives_through_it(plain_lab, host, break_it, put_right):
    with Echo(plain_lab, host) as echo:
        echo.say(b"one")
        assert echo.hear() == b"one"
        getattr(host, break_it)()
        assert host.alive
        echo.say(b"two")
        assert echo.hear(SILENCE_SECONDS) is None
        getattr(host, put_right)()
        assert echo.hear() == b"two"


def test_a_connection_lives_through_another_shape_of_its_link(plain_lab, host):
    with Echo(plain_lab, host) as echo:
        for shape in (LinkShape(delay_seconds=0.01), LinkShape(10**7, 0.02), LinkShape(10**7), LinkShape()):
            host.shape(shape)
            echo.say(str(shape).encode())
            assert echo.hear() == str(shape).encode()
            assert host.state().shape == shape


def test_the_others_go_on_meanwhile(plain_lab, host):
    host.cut()
    assert ssh(plain_lab, "board-2", "echo here") == "here\n"
    assert [other.state().connected for other in plain_lab.hosts] == [False, True, True]


@pytest.mark.parametrize("how", ["reboot", "sudo reboot", "sudo shutdown -r now"])
def test_a_reboot_keeps_the_disk_and_nothing_else(plain_lab, host, how):
    before = ssh(
        plain_lab, host.name, "cat /proc/sys/kernel/random/boot_id; touch ~/kept /tmp/gone; sudo touch /run/gone"
    )
    boots = host.state().boots
    with Echo(plain_lab, host) as echo:
        echo.say(b"here")
        assert echo.hear() == b"here"
        if how == "reboot":
            host.reboot()
        else:
            ssh(plain_lab, host.name, how, code=None)
        echo.wait_end()
    wait_rebooted(host, boots)
    after = ssh(
        plain_lab,
        host.name,
        "cat /proc/sys/kernel/random/boot_id; ls ~/kept; ls /tmp/gone; ls /run/gone; pgrep -x cat",
        code=1,
    )
    assert after.split() == [after.split()[0], "/home/admin/kept"]
    assert after.split()[0] != before.strip()


def test_only_root_may_reboot_it(plain_lab, host):
    boots = host.state().boots
    assert "must be root" in ssh(plain_lab, host.name, "/usr/sbin/reboot 2>&1", user="tester", code=1)
    assert ssh(plain_lab, host.name, "echo here") == "here\n"
    assert host.state().boots == boots


def test_a_host_does_at_boot_what_its_administrator_says(plain_lab, host):
    script = "#!/bin/sh\ntouch /run/done\nexit 0\n"
    ssh(plain_lab, host.name, f"printf '{script}' | sudo tee /etc/rc.local")
    host.reboot()
    host.wait_up()
    ssh(plain_lab, host.name, "test -e /run/done")


def test_who_pulls_the_plug_says_no_goodbye(plain_lab, host):
    with Echo(plain_lab, host) as echo:
        echo.say(b"here")
        assert echo.hear() == b"here"
        host.stop()
        assert not host.alive
        assert echo.hear(SILENCE_SECONDS) is None
    with pytest.raises(LabError, match="`testbed lab start board-1` starts it"):
        host.console(["true"])
    host.start()
    host.wait_up()
    assert ssh(plain_lab, host.name, "echo again") == "again\n"


def test_a_frozen_host_can_be_stopped(plain_lab, host):
    host.freeze()
    with pytest.raises(LabError, match="first `testbed lab thaw board-1`"):
        host.reboot()
    host.stop()
    assert host.state().state == "off"


def test_the_console_works_where_the_network_does_not(plain_lab, host):
    host.cut()
    told = host.console(["sh", "-c", "id -un; hostname; cat /proc/self/cgroup"])
    assert told.stdout.split()[:2] == ["root", "board-1"]
    assert "testbed-lab" not in told.stdout


def test_a_host_ends_with_its_keeper_and_starts_with_another(plain_lab, host):
    state = host.state()
    init = state.init
    os.kill(state.keeper, signal.SIGKILL)
    wait_until(lambda: not exists(init))
    assert host.state().state == "gone"
    with pytest.raises(LabError, match="`testbed lab start board-1` starts it anew"):
        host.cut()
    ssh(plain_lab, "board-2", "true")
    host.start()
    host.wait_up()
    assert ssh(plain_lab, host.name, "echo again") == "again\n"


def test_a_keeper_is_known_by_more_than_its_number(plain_lab, host):
    """A file that names a living process which is not the keeper: as after a restart of this machine."""
    text = host.folder.state.read_text()
    other = text.replace(f'"pid": {host.state().keeper}', f'"pid": {os.getpid()}')
    host.folder.state.write_text(other)
    assert ProcessIdentity.own().alive
    assert host.state().state == "gone"
    host.folder.state.write_text(text)
    assert host.alive


def test_what_a_host_writes_is_on_its_disk_and_not_in_memory(plain_lab, host):
    where = ssh(plain_lab, host.name, "stat -f -c %T /home/admin /tmp /var/tmp").split()
    assert "tmpfs" not in where or Path("/tmp").stat().st_dev != Path("/").stat().st_dev
