"""The scripts of a Jetson's image, run for real: on a folder that looks like NVIDIA's, with stand-ins for what must not
happen here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace

import pytest

from testbed.device_images import catalogue
from testbed.device_images.render import IDENTITY, ROOTFS_OVERLAY, render, write
from testbed.package_data import data_folder
from tests.device_images.boards import GOLDEN, PUBLIC_KEY, WIFI_PASSWORD, board, profile

FLASHED = {name: image for name, image in catalogue.images().items() if image.flash is not None}
MODERN_SSHD = "Include /etc/ssh/sshd_config.d/*.conf\nUsePAM yes\n"
INITRD_FLASH = (
    "tools/kernel_flash/l4t_initrd_flash.sh --external-device nvme0n1p1 -c tools/kernel_flash/flash_l4t_t234_nvme.xml"
    " -p -c bootloader/generic/cfg/flash_t234_qspi.xml --showlogs --network usb0"
)
#: As NVIDIA's tool: an account with a password that it makes up.
CREATE_USER = """\
#!/bin/sh
echo "l4t_create_default_user.sh $*" >>"$LOG"
echo "ada:x:$(/usr/bin/id -u):$(/usr/bin/id -g):,,,:/home/ada:/bin/bash" >>rootfs/etc/passwd
echo 'ada:$1$made$up:20000:0:99999:7:::' >>rootfs/etc/shadow
mkdir -p rootfs/home/ada
"""


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def stand_in(tmp_path, log, monkeypatch):
    """Puts programs of a name before those of this machine; each logs how it was called."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(log))
    (tmp_path / "bin").mkdir()

    def made(*names, does="true"):
        for name in names:
            script(tmp_path / "bin" / name, f'#!/bin/sh\necho "{name} $*" >>"$LOG"\n{does}\n')

    return made


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(*words):
    return subprocess.run(["sh", *words], capture_output=True, text=True, check=False)


# ── the catalogue ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", FLASHED)
def test_every_jetson_of_the_catalogue_can_be_written(name):
    image = FLASHED[name]
    known = [file.stem for file in (data_folder("inventory") / "profiles").glob("*.yaml")]
    fitting = [each for each in known if name in catalogue.fitting(each)]
    assert fitting
    for each in fitting:
        ways = image.flash.ways_for(each, with_super_modes=False)
        assert ways, each
        assert len({way.medium for way in ways}) == len(ways)
        assert image.flash.release in profile(each).l4t


@pytest.mark.parametrize(
    ("of", "power_mode", "configuration"),
    [
        ("jetson_orin_nano_8gb", None, "jetson-orin-nano-devkit"),
        ("jetson_orin_nano_8gb", "15W", "jetson-orin-nano-devkit"),
        ("jetson_orin_nano_8gb", "25W", "jetson-orin-nano-devkit-super"),
        ("jetson_orin_nx_16gb", "25W", "jetson-orin-nano-devkit"),
        ("jetson_agx_orin_64gb", "MAXN", "jetson-agx-orin-devkit"),
        ("jetson_agx_orin_as_orin_nano_4gb", "10W", "jetson-agx-orin-devkit-as-nano4gb"),
        ("jetson_agx_orin_as_orin_nx_16gb", None, "jetson-agx-orin-devkit-as-nx-16gb"),
    ],
)
def test_board_and_power_mode_decide_the_flash_configuration(of, power_mode, configuration):
    made = board("jetson_orin_jetpack_6", profile(of), power_mode=power_mode)
    ways = FLASHED[made.image].flash.ways_for(of, with_super_modes=made.needs_super_modes)
    assert ways[0].configuration == configuration


# ── what is rendered ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_board_is_told_its_files_without_the_secret_ones():
    files = {file.path: file for file in render(GOLDEN["jetson_xavier_nx_jetpack_5_at_an_address"]())}
    there = {path.removeprefix(ROOTFS_OVERLAY): file for path, file in files.items() if path.startswith(ROOTFS_OVERLAY)}
    identity = json.loads(there.pop(IDENTITY).text)
    secret = {path for path, file in there.items() if file.secret}
    assert secret == {
        "/etc/ssh/edge-testbed_host_ed25519_key",
        "/etc/NetworkManager/system-connections/edge-testbed-wired.nmconnection",
    }
    assert identity["files"] == {path: file.sha256 for path, file in there.items() if path not in secret}


def test_the_wireless_password_stands_in_one_private_file():
    made = replace(GOLDEN["jetson_orin_jetpack_6_agx_as_nx_by_wifi"](), wifi_password=" a\\b c;d")
    (file,) = [file for file in render(made) if "psk=" in file.text]
    assert "psk=\\sa\\\\b c;d\n" in file.text
    assert "ssid=lab\\; net\n" in file.text
    assert file.mode == 0o600
    shown = [file for file in render(GOLDEN["jetson_orin_jetpack_6_agx_as_nx_by_wifi"]()) if WIFI_PASSWORD in file.text]
    assert [file.mode for file in shown] == [0o600]


# ── flash.sh ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def tegra(tmp_path, stand_in):
    """NVIDIA's folder, and a PC with root and a Jetson in recovery mode on USB."""
    made = tmp_path / "Linux for Tegra"
    for tool in ("flash.sh", "l4t_initrd_flash.sh", "tools/kernel_flash/l4t_initrd_flash.sh"):
        script(made / tool, f'#!/bin/sh\necho "{tool} $*" >>"$LOG"\n')
    script(made / "tools/l4t_create_default_user.sh", CREATE_USER)
    for image in FLASHED.values():
        for way in image.flash.ways:
            for name in (*way.configurations.values(), *way.super_configurations.values()):
                (made / f"{name}.conf").touch()
    for folder in ("ssh", "sudoers.d", "systemd/system"):
        (made / "rootfs/etc" / folder).mkdir(parents=True)
    texts = {
        "ssh/sshd_config": MODERN_SSHD,
        "passwd": "root:x:0:0:root:/root:/bin/bash\n",
        "shadow": "root:*:20000:0:99999:7:::\n",
        "hosts": "127.0.0.1 localhost\n127.0.1.1 tegra-ubuntu\n",
    }
    for name, text in texts.items():
        (made / "rootfs/etc" / name).write_text(text)
    release(made, 36)
    stand_in("id", does="echo 0")
    stand_in("lsusb", does="echo 'Bus 001 Device 009: ID 0955:7523 NVIDIA Corp. APX'")
    return made


def release(tegra, major):
    (tegra / "rootfs/etc/nv_tegra_release").write_text(f"# R{major} (release), REVISION: 4.3, GCID: 1\n")


@pytest.fixture
def flash(tmp_path):
    """Renders a board into a folder of its own and runs its flash.sh."""

    def done(made, *words):
        folder = tmp_path / f"files of {made.host_name}"
        write(render(made), folder)
        return run(folder / "flash.sh", *words)

    return done


def calls(log):
    return [line for line in log.read_text().splitlines() if not line.startswith(("id ", "lsusb"))]


@pytest.mark.parametrize(
    ("name", "major", "words", "command"),
    [
        (
            "jetson_orin_jetpack_6_super", 36, [],
            f"{INITRD_FLASH} jetson-orin-nano-devkit-super internal",
        ),
        ("jetson_orin_jetpack_7", 39, ["nvme"], "l4t_initrd_flash.sh jetson-orin-nano-devkit internal"),
        (
            "jetson_orin_jetpack_7", 39, ["sd_card", "jetson-orin-nano-devkit-super"],
            "l4t_initrd_flash.sh --external-device mmcblk0p1 jetson-orin-nano-devkit-super internal",
        ),
        ("jetson_orin_jetpack_6_agx_as_nx_by_wifi", 36, [], "flash.sh jetson-agx-orin-devkit-as-nx-8gb internal"),
        ("jetson_xavier_nx_jetpack_5_at_an_address", 35, [], "flash.sh jetson-xavier-nx-devkit-emmc mmcblk0p1"),
        ("jetson_nano_jetpack_4", 32, [], "flash.sh jetson-nano-2gb-devkit mmcblk0p1"),
    ],
)  # fmt: skip
def test_a_board_is_written_by_nvidias_own_command(name, major, words, command, tegra, flash, log):
    release(tegra, major)
    done = flash(GOLDEN[name](), "--accept-license", tegra, *words)
    assert done.returncode == 0, done.stderr
    assert calls(log) == ["l4t_create_default_user.sh -u ada -n board-1 --accept-license", command]
    assert "done: board-1 is written" in done.stdout


def test_the_root_file_system_becomes_the_boards(tegra, flash):
    done = flash(GOLDEN["jetson_orin_jetpack_6_super"](), tegra)
    assert done.returncode == 0, done.stderr
    root = tegra / "rootfs"
    assert (root / "etc/hostname").read_text() == "board-1\n"
    assert (root / "etc/hosts").read_text() == "127.0.0.1 localhost\n127.0.1.1 board-1\n"
    assert "\nada:*:20000:" in (root / "etc/shadow").read_text()
    assert (root / "home/ada/.ssh/authorized_keys").read_text().strip() == PUBLIC_KEY.read_text().strip()
    assert (root / "home/ada/.ssh").stat().st_mode & 0o777 == 0o700
    assert (root / "etc/sudoers.d/90-edge-testbed").read_text() == "ada ALL=(ALL) NOPASSWD:ALL\n"
    assert (root / "etc/sudoers.d/90-edge-testbed").stat().st_mode & 0o777 == 0o440
    assert (root / "etc/ssh/edge-testbed_host_ed25519_key").stat().st_mode & 0o777 == 0o600
    assert (root / "usr/local/sbin/edge-testbed-first-boot").stat().st_mode & 0o777 == 0o755
    assert (root / "etc/systemd/system/multi-user.target.wants/edge-testbed-first-boot.service").exists()
    assert (root / "etc/ssh/sshd_config").read_text() == MODERN_SSHD


def test_an_old_sshd_gets_its_lines_where_they_count_and_once(tegra, flash):
    release(tegra, 32)
    (tegra / "rootfs/etc/ssh/sshd_config").write_text("PermitRootLogin yes\nUsePAM yes\n")
    for _ in range(2):
        assert flash(GOLDEN["jetson_nano_jetpack_4"](), tegra).returncode == 0
    words = [line for line in (tegra / "rootfs/etc/ssh/sshd_config").read_text().splitlines() if line[0] != "#"]
    assert words == [
        "PasswordAuthentication no", "KbdInteractiveAuthentication no", "ChallengeResponseAuthentication no",
        "PermitRootLogin no", "HostKey /etc/ssh/edge-testbed_host_ed25519_key", "PermitRootLogin yes", "UsePAM yes",
    ]  # fmt: skip


def test_what_an_earlier_board_left_goes(tegra, flash, log):
    release(tegra, 35)
    first = GOLDEN["jetson_xavier_nx_jetpack_5_at_an_address"]()
    assert flash(first, tegra).returncode == 0
    network = tegra / "rootfs/etc/NetworkManager/system-connections/edge-testbed-wired.nmconnection"
    assert network.exists()
    second = replace(board(first.image, first.profile), host_name="board-2")
    assert flash(second, tegra).returncode == 0
    assert not network.exists()
    assert (tegra / "rootfs/etc/hostname").read_text() == "board-2\n"
    assert [line for line in calls(log) if "create" in line] == ["l4t_create_default_user.sh -u ada -n board-1"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda tegra: (tegra / "flash.sh").unlink(), "is not NVIDIA's Linux_for_Tegra"),
        (lambda tegra: (tegra / "rootfs/etc/nv_tegra_release").unlink(), "is not ready: unpack"),
        (lambda tegra: release(tegra, 35), "is of release R35, and this board's files are for R36"),
        (lambda tegra: (tegra / "jetson-orin-nano-devkit-super.conf").unlink(), "has no jetson-orin-nano-devkit-super"),
        (
            lambda tegra: (tegra / "rootfs/etc/sudoers.d/90-edge-testbed").write_text("eve ALL=(ALL) NOPASSWD:ALL\n"),
            "was made for a board whose user is eve",
        ),
    ],
)
def test_a_folder_that_is_wrong_is_refused_and_left_alone(break_it, message, tegra, flash, log):
    break_it(tegra)
    done = flash(GOLDEN["jetson_orin_jetpack_6_super"](), tegra)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tegra / "rootfs/etc/hostname").exists()
    assert not log.exists() or calls(log) == []


@pytest.mark.parametrize(
    ("program", "does", "message"),
    [
        ("id", "echo 1000", "only root may write"),
        ("lsusb", "echo 'Bus 001 Device 009: ID 0955:7020 NVIDIA Corp. L4T running on Tegra'", "in recovery mode"),
        ("lsusb", "true", "in recovery mode"),
    ],
)
def test_without_root_or_board_nothing_is_changed(program, does, message, tegra, flash, log, stand_in):
    stand_in(program, does=does)
    done = flash(GOLDEN["jetson_orin_jetpack_6_super"](), tegra)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tegra / "rootfs/etc/hostname").exists()
    assert calls(log) == []


def test_what_cannot_look_for_the_board_is_named_with_its_package(tegra, flash, tmp_path, monkeypatch):
    (tmp_path / "bin/lsusb").unlink()
    for name in ("sh", "dirname", "sed"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    done = flash(GOLDEN["jetson_orin_jetpack_6_super"](), tegra)
    assert done.returncode == 1
    assert "lsusb is not installed" in done.stderr
    assert "apt install usbutils" in done.stderr
    assert not (tegra / "rootfs/etc/hostname").exists()


def test_words_that_are_wrong_are_told(tegra, flash):
    made = GOLDEN["jetson_orin_jetpack_6_super"]()
    assert "usage: sudo ./flash.sh" in flash(made).stderr
    assert "usage: sudo ./flash.sh" in flash(made, "--help").stderr
    assert "nvme or sd_card or usb, not to floppy" in flash(made, tegra, "floppy").stderr
    assert "is no folder" in flash(made, tegra / "none").stderr


def test_a_flash_that_fails_is_no_success(tegra, flash):
    script(tegra / "tools/kernel_flash/l4t_initrd_flash.sh", "#!/bin/sh\nexit 3\n")
    done = flash(GOLDEN["jetson_orin_jetpack_6_super"](), tegra)
    assert done.returncode == 3
    assert "done:" not in done.stdout


# ── the first boot ───────────────────────────────────────────────────────────────────────────────────────────────────
MODES = "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
FOUND_MODE = 'case $1 in -q) echo "NV Power Mode: {found}" ;; *) echo "{said}" ;; esac'


@pytest.fixture
def target(tmp_path, stand_in):
    """A pretend root of a board, whose programs only log."""
    stand_in("timedatectl", "swapoff", "usermod", "apt-get", "sync")
    stand_in("dpkg", does="exit 1")
    stand_in("getent", does='[ "$2" != gpio ]')
    stand_in("systemctl", does='[ "$1" != get-default ] || echo graphical.target')
    stand_in("nvpmodel", does=FOUND_MODE.format(found="15W", said="Reboot required for changing to this power mode"))
    (tmp_path / "target/etc/chrony").mkdir(parents=True)
    (tmp_path / "target/etc/nvpmodel.conf").write_text(MODES)
    (tmp_path / "target/etc/chrony/chrony.conf").write_text("confdir /etc/chrony/conf.d\n")
    return tmp_path / "target"


@pytest.fixture
def first_boot(tmp_path, target):
    def done(name="jetson_orin_jetpack_6_super"):
        write(render(GOLDEN[name]()), tmp_path / "rendered")
        return run(tmp_path / "rendered/rootfs_overlay/usr/local/sbin/edge-testbed-first-boot", target)

    return done


def test_the_first_boot_sets_the_board_up_and_restarts_it_once(first_boot, target, log):
    done = first_boot()
    assert done.returncode == 0, done.stderr
    said = log.read_text().splitlines()
    for line in (
        "timedatectl set-timezone Europe/Berlin", "systemctl set-default multi-user.target",
        "systemctl disable --now nvzramconfig.service", "swapoff -a", "usermod -a -G i2c ada", "nvpmodel -m 2",
        "apt-get install -y -q -o DPkg::Lock::Timeout=600 chrony python3-venv",
    ):  # fmt: skip
        assert line in said
    assert "usermod -a -G gpio ada" not in said
    assert said[-1] == "systemctl --no-block reboot"
    assert (target / "var/lib/nvpmodel/status").read_text() == "pmode:0002\n"
    assert (target / "var/lib/edge-testbed/first-boot-done").exists()
    log.unlink()
    assert first_boot().returncode == 0
    assert "systemctl --no-block reboot" not in log.read_text()


def test_what_is_so_already_is_left(first_boot, target, log, stand_in):
    stand_in("dpkg")
    stand_in("systemctl", does='[ "$1" != get-default ] || echo multi-user.target')
    stand_in("nvpmodel", does=FOUND_MODE.format(found="MAXN_SUPER", said=""))
    assert first_boot().returncode == 0
    said = log.read_text()
    assert not any(word in said for word in ("set-default", "nvpmodel -m", "apt-get", "reboot"))
    assert (target / "etc/chrony/chrony.conf").read_text() == "confdir /etc/chrony/conf.d\n"


def test_without_a_network_the_rest_is_done_and_the_next_boot_tries_again(first_boot, target, log, stand_in):
    stand_in("apt-get", does="exit 100")
    done = first_boot()
    assert done.returncode == 1
    assert "chrony python3-venv cannot be installed; this is tried again at the next boot" in done.stdout
    assert not (target / "var/lib/edge-testbed/first-boot-done").exists()
    assert log.read_text().endswith("systemctl --no-block reboot\n")


@pytest.mark.parametrize(
    ("modes", "said", "message"),
    [
        ("", "", "this board has no power mode MAXN_SUPER"),
        (MODES, "NVPM ERROR: unknown", "power mode MAXN_SUPER cannot be set: NVPM ERROR: unknown"),
    ],
)
def test_a_power_mode_that_cannot_be_had_is_told(modes, said, message, first_boot, target, stand_in):
    (target / "etc/nvpmodel.conf").write_text(modes)
    stand_in("nvpmodel", does=FOUND_MODE.format(found="15W", said=said))
    done = first_boot()
    assert done.returncode == 0
    assert message in done.stdout


def test_an_old_chrony_includes_the_files_by_name_and_once(first_boot, target):
    (target / "etc/chrony/chrony.conf").write_text("pool ntp.ubuntu.com iburst\n")
    (target / "etc/chrony/conf.d").mkdir()
    (target / "etc/chrony/conf.d/edge-testbed.conf").touch()
    for _ in range(2):
        assert first_boot("jetson_xavier_nx_jetpack_5_at_an_address").returncode == 0
    assert (target / "etc/chrony/chrony.conf").read_text() == (
        "pool ntp.ubuntu.com iburst\ninclude /etc/chrony/conf.d/edge-testbed.conf\n"
    )
