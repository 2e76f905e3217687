"""Recording a board: what is kept can be worn again, and what identifies the board is not kept."""

from __future__ import annotations

import base64
import io
import shlex
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed import cli, record_script
from testbed.connection import LocalConnection, Ran
from testbed.errors import DeviceError, RightError, UsageError
from testbed.lab.kernel_line import memory_cgroup_on
from testbed.lab.persona import load_persona
from testbed.record import _place, record
from testbed.record_privacy import Privacy
from tests.lab.worn import Worn
from tests.ssh_server import SshServer, need_sshd

ORIN, PI = "jetson_orin_nano_8gb", "raspberry_pi_5_8gb"


class WornConnection:
    """A connection into a worn persona, as its user without rights or, by sudo, as root."""

    name = "orin-1"

    def __init__(self, worn: Worn, *, sudo: bool = True) -> None:
        self._worn, self._sudo = worn, sudo
        self.asked: list[bool] = []

    def attempt(self, command, patience_seconds=60.0, *, data=b"", become=False) -> Ran:
        self.asked.append(become)
        if become and not self._sudo:
            raise RightError("sudo asks for a password")
        done = self._worn.run(shlex.join(command), user=None if become else "someone")
        return Ran(done.returncode, done.stdout, done.stderr)


class Answering:
    """A connection that gives one answer to everything."""

    name = "board"

    def __init__(self, output: str, exit_code: int = 0, errors: str = "") -> None:
        self._ran = Ran(exit_code, output, errors)

    def attempt(self, command, patience_seconds=60.0, *, data=b"", become=False) -> Ran:
        return self._ran


def archive(**entries: str) -> str:
    """An answer of the script that holds these files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return base64.b64encode(packed.getvalue()).decode()


#: Of an answer that breaks off nowhere.
WHOLE = {"end": "", "links": ""}
Wear = Callable[[str | Path], Worn]


@pytest.fixture
def wear(tmp_path: Path) -> Iterator[Wear]:
    worn: list[Worn] = []

    def put_on(name: str | Path) -> Worn:
        worn.append(Worn(load_persona(name), tmp_path / f"worn-{len(worn)}"))
        return worn[-1]

    yield put_on
    for each in worn:
        each.close()


# --- what identifies a board ---------------------------------------------------------------------------------------

#: What a board of somebody's knows about itself and its owner; nothing of it may be in the recording.
SECRETS = {
    "serial": "1425021088888",
    "machine id": "5f2f7ad04ae54c0c9b0a6f0d3a1c77aa",
    "host name": "fritz-lab-orin7",
    "user": "gretaexample",
    "full name": "Greta Beispiel",
    "network": "FritzBox 7590 XY",
    "hardware address": "2C:CF:67:11:22:33",
    "address": "10.93.41.7",
    "address 6": "fd00:1234:5678::17",
    "partition": "1a2b3c4d-01",
    "file system": "8ee022d3-6e8b-4ecf-9e37-1946eacdc6f6",
    "serial on the kernel's line": "0323719AB77C1",
    "country": "regdom=DE",
}
#: Puts them where boards have them.
PLANT = """
set -e
printf '1425021088888\\000' >/sys/firmware/devicetree/base/serial-number
echo 5f2f7ad04ae54c0c9b0a6f0d3a1c77aa >/etc/machine-id
echo fritz-lab-orin7 >/etc/hostname
useradd -c 'Greta Beispiel,Room 3' gretaexample
mkdir -p /etc/NetworkManager/system-connections
printf '[wifi]\\nssid=FritzBox 7590 XY\\n' >/etc/NetworkManager/system-connections/home.nmconnection
sed -i '1i # by gretaexample on FRITZ-LAB-ORIN7, board 1425021088888, for Greta Beispiel' /etc/nvpmodel.conf
more='root=PARTUUID=1a2b3c4d-01 macaddr=2C:CF:67:11:22:33 nfsroot=10.93.41.7:/srv x=fd00:1234:5678::17'
more="$more y=8ee022d3-6e8b-4ecf-9e37-1946eacdc6f6 androidboot.serialno=0323719AB77C1 cfg80211.ieee80211_regdom=DE"
sed -i "s|^\\( *APPEND.*\\)$|\\1 $more|" /boot/extlinux/extlinux.conf
printf 'PROFILE /home/gretaexample/fan on "FritzBox 7590 XY"\\n' >/etc/nvfancontrol.conf
"""


def everything_in(folder: Path) -> str:
    """All names and all content, as text."""
    paths = sorted(folder.rglob("*"))
    texts = [path.read_bytes().decode("utf-8", "replace") for path in paths if path.is_file()]
    return "\n".join([*(str(path.relative_to(folder)) for path in paths), *texts])


@pytest.mark.lab
def test_nothing_that_identifies_a_board_is_kept(wear, tmp_path):
    board = wear(ORIN)
    planted = board.run(PLANT)
    assert planted.returncode == 0, planted.stderr
    board.boot()
    line = board.read("/proc/cmdline")
    assert SECRETS["address"] in line
    recording = record(WornConnection(board), tmp_path / "recorded", profile="raspberry_pi_5_8gb")
    kept = everything_in(recording.folder).lower()
    for what, secret in SECRETS.items():
        assert secret.lower() not in kept, what
    assert "someone" not in kept  # who was logged in
    expected = {"serial numbers", "host names", "user names", "network names", "hardware addresses"}
    assert expected | {"network addresses", "disk identifiers", "places"} <= set(recording.removed)
    assert recording.removed["user names"] >= 2
    cleaned = (recording.folder / "proc/cmdline").read_text()
    assert len(cleaned.split()) == len(line.split())
    assert "root=PARTUUID=00000000-01 macaddr=00:00:00:00:00:00 nfsroot=192.0.2.1:/srv" in cleaned


CLEANED = [
    ("eth0 2c-cf-67-11-22-33 up", "eth0 00:00:00:00:00:00 up"),
    ("10.93.1.2 and 127.0.0.1", "192.0.2.1 and 127.0.0.1"),
    ("5.15.148-tegra 36.4.3 21.1.2.0.0 10:54:05", "5.15.148-tegra 36.4.3 21.1.2.0.0 10:54:05"),
    ("fe80::1 ::1 0x3ec00000", "2001:db8::1 ::1 0x3ec00000"),
    ("0A5D0102,10.93.1.2,3", "C0000201,192.0.2.1,3"),
    ("PARTUUID=12345678-02", "PARTUUID=00000000-02"),
    ("Timezone=Europe/Berlin", "Timezone=Etc/UTC"),
    ("ds=nocloud;i=rpi-imager-1786770245730", "ds=nocloud;i=rpi-imager-0"),
    ("mark runs on Mark-2, markings of mark_up", "user runs on Mark-2, markings of mark_up"),
    ("raspberrypi,5-model-b by pi", "raspberrypi,5-model-b by pi"),
    ("host Lab7.example.org or lab7", "host board or board"),
]


@pytest.mark.parametrize(("text", "expected"), CLEANED)
def test_private_words_are_replaced_by_neutral_ones_of_their_shape(text, expected):
    private = {"user names": ["mark", "pi", ""], "host names": ["lab7", "lab7.example.org", "raspberrypi"]}
    assert Privacy(private).cleaned(text) == expected


def test_names_are_not_looked_for_in_the_kernels_trees():
    privacy = Privacy({"host names": ["cpu"], "serial numbers": ["1425021088888"]})
    assert privacy.cleaned("cpu 1425021088888", of_kernel=True) == "cpu 0000000000000000"
    assert privacy.removed == {"serial numbers": 1}


def test_every_private_word_is_counted_once_by_kind():
    privacy = Privacy({"user names": ["ada"]})
    privacy.cleaned("ada ada 10.0.0.1 10.0.0.2 10.0.0.1")
    assert privacy.removed == {"network addresses": 2, "user names": 1}


def test_what_was_cleaned_stays_as_it_is():
    privacy = Privacy({"user names": ["ada"]})
    once = privacy.cleaned("\n".join(text for text, _ in CLEANED))
    assert Privacy({"user names": ["ada"]}).cleaned(once) == once


REPEATED = [
    "nvpmodel -q",
    "nvpmodel -q --verbose",
    "jetson_clocks --show",
    "uname -a",
    "uname -m",
    "systemctl is-enabled ssh",
    "systemctl is-active jtop",
    "timedatectl show -p NTPSynchronized",
    "cat /etc/nv_tegra_release /etc/nvpmodel.conf /var/lib/nvpmodel/status /boot/extlinux/extlinux.conf",
    "cat /proc/cmdline /proc/swaps",
    "tr '\\0' ' ' </sys/firmware/devicetree/base/compatible",
    "cat /sys/class/hwmon/hwmon1/in1_label /sys/bus/i2c/devices/1-0040/hwmon/hwmon1/curr3_input",
    "cat /sys/devices/system/cpu/cpu5/cpufreq/scaling_max_freq /sys/class/thermal/thermal_zone0/temp",
]


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.lab
def test_a_recorded_board_says_again_what_the_board_said(wear, tmp_path):
    board = wear(ORIN)
    connection = WornConnection(board)
    recording = record(connection, tmp_path / "recorded", profile="raspberry_pi_5_8gb")
    assert connection.asked == [True]
    persona = load_persona(recording.folder)
    assert persona.without_source() == []
    assert (persona.kind, persona.profile, persona.memory_bytes) == ("jetson", ORIN, 7620 << 20)
    assert persona.title.startswith("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super, Ubuntu 22.04")
    assert recording.as_root
    again = wear(recording.folder)
    for command in REPEATED:
        first, second = board.run(command), again.run(command)
        assert (second.returncode, second.stdout) == (first.returncode, first.stdout), command
    assert again.run("tegrastats --interval 500").stdout.count("VDD_IN") >= 2


@pytest.mark.lab
def test_a_recording_has_no_state_and_says_what_it_does_not_know(wear, tmp_path):
    record(WornConnection(wear(ORIN)), tmp_path / "recorded", profile=ORIN)
    again = wear(tmp_path / "recorded")
    done = again.run("nvpmodel -m 0")
    assert done.returncode == 64
    assert done.stderr == "nvpmodel: this persona is a recording, and has no answer to: nvpmodel -m 0\n"
    assert again.run("uname -n").returncode == 0
    assert "They have no state." in (tmp_path / "recorded/SOURCES").read_text()


@pytest.mark.lab
def test_without_sudo_it_is_recorded_what_the_user_may_read(wear, tmp_path):
    connection = WornConnection(wear(ORIN), sudo=False)
    recording = record(connection, tmp_path / "recorded", profile=ORIN)
    assert connection.asked == [True, False]
    assert not recording.as_root
    assert "as a user without rights" in (tmp_path / "recorded/SOURCES").read_text()
    again = wear(tmp_path / "recorded")
    assert again.run("jetson_clocks --show").returncode == 1
    assert again.run("nvpmodel -q").stdout == "NV Power Mode: 25W\n1\n"


@pytest.mark.lab
def test_where_sudo_is_not_wanted_it_is_not_asked_for(wear, tmp_path):
    connection = WornConnection(wear(PI))
    record(connection, tmp_path / "recorded", profile=PI, may_become=False)
    assert connection.asked == [False]


@pytest.mark.lab
def test_a_recorded_raspberry_pi_turns_its_memory_cgroup_on_as_the_board_does(wear, tmp_path):
    board = wear(PI)
    recording = record(WornConnection(board), tmp_path / "recorded", profile=PI)
    persona = load_persona(recording.folder)
    assert persona.memory_cgroup == "needs_cmdline"
    assert persona.profile.startswith("raspberry_pi_5_")
    again = wear(recording.folder)
    assert again.read("/proc/cmdline") == board.read("/proc/cmdline")
    assert again.run("vcgencmd pmic_read_adc").stdout == board.run("vcgencmd pmic_read_adc").stdout
    again.run("sed -i '1s/$/ cgroup_enable=memory/' /boot/firmware/cmdline.txt")
    again.boot()
    assert memory_cgroup_on(again.read("/proc/cmdline"))


@pytest.mark.lab
def test_nothing_is_left_on_the_board(wear, tmp_path):
    board = wear(PI)
    before = board.written()
    record(WornConnection(board), tmp_path / "recorded", profile=PI)
    assert before
    assert board.written() == before


# --- when it cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.lab
@pytest.mark.parametrize(
    ("room", "said"),
    [
        ("nr_inodes=1", "No space left on device"),
        ("size=4k", "there is no room in /tmp"),
        ("size=600k", "there is no room in /tmp"),  # in the middle of it: some answers are whole, one is cut off
    ],
)
def test_a_board_whose_tmp_is_full_is_not_half_recorded(wear, tmp_path, room, said):
    board = wear(ORIN)
    assert board.run(f"mount -t tmpfs -o {room},mode=1777 tmpfs /tmp").returncode == 0
    with pytest.raises(DeviceError) as caught:
        record(WornConnection(board), tmp_path / "recorded", profile=ORIN)
    assert said in str(caught.value)
    assert "that takes a few MiB in /tmp there" in str(caught.value)
    assert not (tmp_path / "recorded").exists()
    assert board.run("ls -A /tmp").stdout == ""


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    with pytest.raises(UsageError, match="is there already; name another folder with -o"):
        record(Answering(""), tmp_path, profile=ORIN)


@pytest.mark.parametrize(
    ("connection", "message"),
    [
        (Answering("", 1, "sh: mktemp: not found\n"), "board: it cannot be recorded: sh: mktemp: not found"),
        (Answering(""), "board: it cannot be recorded: it said nothing"),
        (Answering("Welcome!\n"), "board: its answer cannot be read"),
        (Answering(base64.b64encode(b"no archive").decode()), "board: its answer cannot be read"),
        (Answering(archive()), "board: its answer cannot be read: it breaks off; record it again"),
        (Answering(archive(end="")), "board: its answer cannot be read: links is not in it; record it again"),
        (Answering(archive(**WHOLE, **{"said/0/program": "/bin/uname"})), "read: said/0/code is not in it; record it"),
        (Answering(archive(**WHOLE, **{"said/0/program": "", "said/0/code": ""})), "read: invalid literal for int()"),
    ],
)
def test_an_answer_that_is_none_is_said_and_leaves_nothing(tmp_path, connection, message):
    with pytest.raises(DeviceError) as caught:
        record(connection, tmp_path / "recorded", profile=ORIN)
    assert message in str(caught.value)
    assert not (tmp_path / "recorded").exists()


def test_this_machine_can_be_recorded_in_one_round_trip(tmp_path):
    recording = record(LocalConnection("here"), tmp_path / "recorded", profile=ORIN, may_become=False)
    persona = load_persona(recording.folder)
    assert persona.without_source() == []
    assert persona.memory_bytes > 0
    assert "getconf GNU_LIBC_VERSION" in persona.expected


@pytest.mark.parametrize("told", ["/usr/../../../etc/cron.d/tool", "tool", "../tool", ""])
def test_a_place_that_leads_out_of_the_persona_is_not_followed(told):
    assert _place("tool", told) == "usr/bin/tool"


def test_the_script_fits_into_one_argument_and_is_shell(tmp_path):
    script = record_script.script()
    assert len(script.encode()) < 90 << 10
    assert LocalConnection().attempt(["sh", "-n", "-c", script]).exit_code == 0


INVENTORY = """\
devices:
  board:
    kind: generic
    profile: raspberry_pi_5_8gb
    host: {host}
    ssh_config: {ssh_config}
    budget: {{memory: "1 GiB"}}
    become: false
"""


@pytest.mark.sshd
def test_the_command_records_over_ssh(tmp_path, monkeypatch, capsys):
    need_sshd()
    monkeypatch.chdir(tmp_path)
    with SshServer(tmp_path / "server") as server:
        access = server.access
        Path("lab.yaml").write_text(INVENTORY.format(host=access.host, ssh_config=access.ssh_config))
        assert cli.main(["record", "board", "--inventory", "lab.yaml"]) == 0
    said = capsys.readouterr().out
    assert "Wear it: testbed lab up --persona board-persona" in said
    assert "Recorded without sudo" in said
    assert load_persona("board-persona").profile == "raspberry_pi_5_8gb"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("jetson-nano", "device jetson-nano is emulated on this machine: there is no board to record"),
        ("jetson", '"jetson" is no device; it selects jetson-orin-nano, jetson-nano'),
        ("nothing", "no device has the name, tag or profile 'nothing'"),
    ],
)
def test_only_a_real_board_can_be_recorded(device, message, capsys):
    assert cli.main(["record", device]) == 2
    assert message in capsys.readouterr().err
