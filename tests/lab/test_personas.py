"""Personas: complete, sourced, without secrets; and their programs, run for real in a root of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed.config import load_profile
from testbed.errors import ConfigError, UsageError
from testbed.lab.kernel_line import memory_cgroup_on
from testbed.lab.persona import PERSONAS, Persona, load_persona, personas
from testbed.package_data import data_folder
from testbed.record_privacy import Privacy
from tests.lab.worn import Worn

ORIN, NANO, XAVIER = "jetson_orin_nano_8gb", "jetson_nano_4gb", "jetson_xavier_nx_8gb"
PI5, PI4 = "raspberry_pi_5_8gb", "raspberry_pi_4b_4gb"

PERSONA_YAML = """\
title: A board
kind: generic
profile: raspberry_pi_5_8gb
memory: "1 GiB"
memory_cgroup: always
"""


@pytest.fixture(params=personas())
def persona(request) -> Persona:
    return load_persona(request.param)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The folder of a persona of one's own."""
    folder = tmp_path / "own"
    (folder / "root/etc").mkdir(parents=True)
    (folder / "root/etc/name").write_text("mine\n")
    (folder / "persona.yaml").write_text(PERSONA_YAML)
    (folder / "SOURCES").write_text("root/*: made up\n  for a test\n")
    return folder


# --- the files -----------------------------------------------------------------------------------------------------


def test_the_personas_that_come_with_the_package():
    assert {ORIN, NANO, XAVIER, PI5, PI4} <= set(personas())


def test_every_value_has_a_source(persona):
    assert persona.without_source() == []


def test_no_source_is_left_over(persona):
    from fnmatch import fnmatchcase

    from testbed.lab.persona import read_sources

    for layer in persona.layers:
        files = [str(path.relative_to(layer)) for path in layer.rglob("*") if path.is_file()]
        for pattern in read_sources(layer):
            assert any(fnmatchcase(file, pattern) for file in files), f"{layer}/SOURCES: {pattern} fits nothing"


def test_the_device_tree_is_that_of_the_profile(persona, tmp_path):
    face = persona.unfold(tmp_path / "face")
    profile = load_profile(data_folder("inventory") / "profiles" / f"{persona.profile}.yaml")
    tree = face.sys / "firmware/devicetree/base"
    compatible = (tree / "compatible").read_bytes()
    assert compatible.endswith(b"\0")
    assert (tree / "model").read_bytes().endswith(b"\0")
    entries = compatible.decode().rstrip("\0").split("\0")
    assert any(word in entry for word in profile.compatible for entry in entries)
    assert persona.memory_bytes == profile.usable_memory_bytes
    assert persona.kind == ("jetson" if profile.accelerator else "raspberry_pi")


def test_the_rails_of_the_profile_are_there(persona, tmp_path):
    face = persona.unfold(tmp_path / "face")
    profile = load_profile(data_folder("inventory") / "profiles" / f"{persona.profile}.yaml")
    labels = {path.read_text().strip() for path in face.sys.glob("bus/i2c/devices/*/hwmon/hwmon*/in*_label")}
    labels |= {path.read_text().strip() for path in face.sys.glob("bus/i2c/devices/*/iio:device*/rail_name_*")}
    assert {rail.name for rail in profile.rails if rail.source.startswith("ina")} <= labels


def test_nothing_in_it_identifies_a_board(persona):
    privacy = Privacy({})
    for source in persona.files().values():
        text = source.read_bytes().decode("utf-8", "replace")
        assert privacy.cleaned(text) == text or "203.0.113.7" in text, source  # an address of documentation
    assert set(privacy.removed) <= {"network addresses"}


def test_programs_can_be_run_and_are_shell_scripts(persona):
    for path, source in persona.files().items():
        if not source.read_bytes().startswith(b"#!"):
            continue
        assert source.stat().st_mode & 0o111, path
        assert source.read_text().startswith("#!/bin/sh\n"), path
        done = subprocess.run(["sh", "-n", str(source)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_program_whose_mode_was_lost_can_be_run_again(own, tmp_path):
    (own / "root/etc/name").write_text("#!/bin/sh\n")
    (own / "root/etc/name").chmod(0o600)
    face = load_persona(own).unfold(tmp_path / "face")
    assert (face.root / "etc/name").stat().st_mode & 0o777 == 0o755


def test_links_lead_somewhere(persona, tmp_path):
    face = persona.unfold(tmp_path / "face")
    for path in persona.links:
        assert (tmp_path / "face" / path).exists(), path
    assert face.boot is not None


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_persona_of_ones_own(own):
    found = load_persona(own)
    assert (found.name, found.memory_bytes, found.memory_cgroup) == ("own", 1 << 30, "always")
    assert found.without_source() == []


def test_a_file_without_a_source_is_named(own):
    (own / "proc").mkdir()
    (own / "proc/cmdline").write_text("quiet\n")
    assert load_persona(own).without_source() == [str(own / "proc/cmdline")]


def test_a_later_layer_hides_an_earlier_one(own, tmp_path):
    below = own.parent / "_below"
    (below / "root/etc").mkdir(parents=True)
    (below / "root/etc/name").write_text("below\n")
    (below / "root/etc/other").write_text("other\n")
    (below / "SOURCES").write_text("root/*: made up\n")
    (own / "persona.yaml").write_text(PERSONA_YAML + "extends: [_below]\nlinks: {root/etc/link: name}\n")
    face = load_persona(own).unfold(tmp_path / "face")
    assert (face.root / "etc/name").read_text() == "mine\n"
    assert (face.root / "etc/other").read_text() == "other\n"
    assert (face.root / "etc/link").readlink() == Path("name")
    assert face.boot is None


def test_a_link_in_the_hosts_root_is_replaced_not_written_through(own, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("not ours\n")
    (tmp_path / "host/etc").mkdir(parents=True)
    (tmp_path / "host/etc/name").symlink_to(outside)
    load_persona(own).unfold(tmp_path / "face").put_on(tmp_path / "host")
    assert outside.read_text() == "not ours\n"
    assert (tmp_path / "host/etc/name").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("profile: raspberry_pi_5_8gb -> profile: raspberry_pi_5_8bg", 'did you mean "raspberry_pi_5_8gb"?'),
        ('memory: "1 GiB" -> memory: 1', 'memory: expected bytes such as "7620 MiB", got 1'),
        ("memory_cgroup: always -> memory_cgroup: sometimes", 'expected "always" or "needs_cmdline"'),
        ("kind: generic -> kind: generic\nextends: [_nothing]", "extends: expected a folder beside this persona"),
        ("kind: generic -> kind: generic\nlinks: {../x: y}", "links: expected paths that start with root, proc, sys"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(own, change, message):
    before, after = change.split(" -> ")
    (own / "persona.yaml").write_text(PERSONA_YAML.replace(before, after))
    with pytest.raises(ConfigError) as caught:
        load_persona(own)
    assert message in str(caught.value)
    assert str(own / "persona.yaml") in str(caught.value)


def test_without_sources_there_is_no_persona(own):
    (own / "SOURCES").unlink()
    with pytest.raises(ConfigError, match="where a persona's values come from, got none"):
        load_persona(own)


def test_an_unknown_name_gets_the_right_one():
    with pytest.raises(UsageError, match='did you mean "jetson_orin_nano_8gb"'):
        load_persona("jetson_orin_nano")


@pytest.mark.parametrize(
    ("cmdline", "on"),
    [
        ("quiet", False),
        ("cgroup_disable=memory", False),
        ("cgroup_disable=memory root=/dev/x cgroup_enable=memory", True),
        ("cgroup_enable=memory cgroup_disable=memory", False),
        ("cgroup_disable=memory cgroup_enable=cpuset,memory", True),
    ],
)
def test_the_last_word_decides_about_the_memory_cgroup(cmdline, on):
    assert memory_cgroup_on(cmdline) is on


# --- the programs --------------------------------------------------------------------------------------------------

UNIT = """\
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'for a in 1 2; do echo "$a" >>/ran; done'

[Install]
WantedBy=multi-user.target
"""
Wear = Callable[[str], Worn]


@pytest.fixture
def wear(tmp_path: Path) -> Iterator[Wear]:
    worn: list[Worn] = []

    def put_on(name: str) -> Worn:
        worn.append(Worn(load_persona(name), tmp_path / f"worn-{len(worn)}"))
        return worn[-1]

    yield put_on
    for each in worn:
        each.close()


#: persona, user, command, exit code, what it prints (a part of both outputs)
ANSWERS = [
    (ORIN, None, "uname -m", 0, "aarch64\n"),
    (ORIN, None, "uname -a", 0, "PREEMPT Tue Jan 7 17:14:38 PST 2025 aarch64 aarch64 aarch64 GNU/Linux\n"),
    (PI5, None, "uname -sr", 0, "Linux 6.12.47+rpt-rpi-2712\n"),
    (PI5, None, "uname --version", 0, "coreutils"),
    (ORIN, None, "nvpmodel -q", 0, "NV Power Mode: 25W\n1\n"),
    (ORIN, "someone", "nvpmodel -q", 0, "NV Power Mode: 25W\n1\n"),
    (NANO, None, "nvpmodel -q", 0, "NVPM WARN: fan mode is not set!\nNV Power Mode: MAXN\n0\n"),
    (NANO, "someone", "nvpmodel -q", 0, "NVPM ERROR: Error opening /sys/kernel/nvpmodel_emc_cap/emc_iso_cap: 13"),
    (XAVIER, None, "nvpmodel -q", 0, "NV Fan Mode:quiet\nNV Power Mode: MODE_15W_6CORE\n2\n"),
    (XAVIER, None, "nvpmodel -p --verbose", 0, "NVPM VERB: POWER_MODEL: ID=8 NAME=MODE_20W_6CORE\n"),
    (ORIN, None, "nvpmodel -q --verbose", 0, "max_freq: REAL_VAL: 918000000 CONF_VAL: 918000000"),
    (ORIN, None, "nvpmodel -m 9", 255, "NVPM ERROR"),
    (ORIN, "someone", "nvpmodel -m 0", 0, "NVPM ERROR: failed to set power mode!"),
    (ORIN, "someone", "jetson_clocks --show", 1, "Error: Run this script(/usr/bin/jetson_clocks) as a root user"),
    (ORIN, None, "jetson_clocks --show", 0, "EMC MinFreq=204000000 MaxFreq=3199000000"),
    (ORIN, None, "jetson_clocks --restore /nothing", 1, "Error: /nothing file not found !"),
    (NANO, None, "timeout 0.2 tegrastats", 124, "SWAP 0/1977MB (cached 0MB)"),
    (PI5, None, "vcgencmd get_throttled", 0, "throttled=0x0\n"),
    (PI5, "someone", "vcgencmd get_throttled", 255, "Can't open device file: /dev/vcio"),
    (PI5, None, "vcgencmd pmic_read_adc", 0, "  VDD_CORE_A current(7)=0.75012000A\n"),
    (PI5, None, "vcgencmd pmic_read_adc EXT5V_V", 0, "EXT5V_V volt(24)=5.06788000V\n"),
    (PI4, None, "vcgencmd pmic_read_adc", 255, 'error=1 error_msg="Command not registered"'),
    (PI4, None, "vcgencmd measure_volts core", 0, "volt=0.8400V\n"),
    (PI4, None, "vcgencmd measure_volts nothing", 255, 'error=2 error_msg="Invalid arguments"'),
    (PI4, None, "nvpmodel -q", 127, "not found"),
    (PI5, None, "chronyc tracking", 127, "not found"),
    (PI5, None, "systemctl is-active ssh", 0, "active\n"),
    (PI5, None, "systemctl is-active nothing", 4, "inactive\n"),
    (ORIN, None, "systemctl is-active nothing", 3, "inactive\n"),
    (PI5, None, "systemctl is-enabled nothing", 4, "not-found\n"),
    (ORIN, None, "systemctl is-enabled nothing", 1, "Failed to get unit file state for nothing.service"),
    (ORIN, None, "systemctl start nothing", 5, "Failed to start nothing.service: Unit nothing.service not found."),
    (ORIN, None, "systemctl stop nothing", 5, "Failed to stop nothing.service: Unit nothing.service not loaded."),
    (ORIN, None, "systemctl enable nothing", 1, "Failed to enable unit: Unit file nothing.service does not exist."),
    (ORIN, "someone", "systemctl stop ssh", 1, "Failed to stop ssh.service: Interactive authentication required."),
    (ORIN, None, "systemctl show -p LoadState,ActiveState nothing", 0, "LoadState=not-found\nActiveState=inactive\n"),
    (ORIN, None, "systemctl show -p ActiveState --value ssh", 0, "active\n"),
    (ORIN, None, "systemctl get-default", 0, "graphical.target\n"),
    (PI5, None, "timedatectl show -p NTPSynchronized --value", 0, "yes\n"),
    (PI5, None, "apt-get install -y nothing", 100, "E: Unable to locate package nothing"),
    (PI5, "someone", "apt-get install -y chrony", 100, "are you root?"),
    (PI5, None, "dpkg-query -W -f='${Status}' python3-venv", 0, "install ok installed"),
    (PI5, None, "dpkg-query -W chrony", 1, "no packages found matching chrony"),
    (PI5, None, "dpkg-query -W -f='${Package} ' coreutils", 0, "coreutils "),
    (PI5, None, "loginctl show-user nobody-there", 1, "Failed to look up user nobody-there"),
    (PI5, "someone", "swapoff -a", 1, "swapoff: Not superuser."),
    (PI5, None, "swapoff /dev/nothing", 4, "swapoff: /dev/nothing: swapoff failed: Invalid argument"),
    (PI5, None, "swapon --show=NAME,SIZE --noheadings --bytes", 0, "/dev/zram0 2147467264\n"),
]  # fmt: skip


@pytest.mark.lab
@pytest.mark.parametrize("name", [ORIN, NANO, XAVIER, PI5, PI4])
def test_programs_answer_as_documented(wear, name):
    worn = wear(name)
    for user, command, code, part in [answer[1:] for answer in ANSWERS if answer[0] == name]:
        done = worn.run(command, user=user)
        assert (done.returncode, part in done.stdout + done.stderr) == (code, True), (command, done)


@pytest.mark.lab
def test_a_power_mode_of_the_same_gpu_parts_is_set_at_once(wear):
    worn = wear(ORIN)
    done = worn.run("nvpmodel -m 0")
    assert (done.returncode, done.stdout) == (0, "")
    assert worn.read("/var/lib/nvpmodel/status") == "pmode:0000\n"
    assert worn.read("/sys/devices/system/cpu/cpu5/cpufreq/scaling_max_freq") == "1497600\n"
    assert worn.read("/sys/class/devfreq/17000000.gpu/max_freq") == "612000000\n"
    worn.boot()
    assert worn.read("/sys/class/devfreq/17000000.gpu/max_freq") == "612000000\n"


@pytest.mark.lab
@pytest.mark.parametrize("answer", ["no\n", "", "perhaps\n"])
def test_a_power_mode_that_needs_a_reboot_is_refused_without_a_yes(wear, answer):
    worn = wear(ORIN)
    done = worn.run("nvpmodel -m 3", given=answer)
    assert done.returncode == 255
    assert "NVPM WARN: Reboot required for changing to this power mode: 3" in done.stdout
    assert "NVPM ERROR: optMask is 1, no request for power mode" in done.stdout
    assert worn.read("/var/lib/nvpmodel/status") == "pmode:0001\n"
    assert worn.run("ls /rebooting").returncode != 0


@pytest.mark.lab
def test_a_power_mode_that_needs_a_reboot_holds_from_the_reboot_on(wear):
    worn = wear(ORIN)
    assert worn.run("nvpmodel -m 3", given="yes\n").returncode == 0
    worn.read("/rebooting")
    assert worn.read("/sys/devices/system/cpu/online") == "0-5\n"
    worn.boot()
    assert worn.run("nvpmodel -q").stdout == "NV Power Mode: 7W\n3\n"
    assert worn.read("/sys/devices/system/cpu/online") == "0-3\n"
    assert worn.read("/sys/devices/platform/gpu.0/tpc_pg_mask") == "252\n"


@pytest.mark.lab
def test_clocks_are_locked_stored_restored_and_forgotten_by_a_boot(wear):
    worn = wear(ORIN)
    worn.run("jetson_clocks --store /clocks && jetson_clocks --fan")
    shown = worn.run("jetson_clocks --show").stdout
    assert "MinFreq=1344000 MaxFreq=1344000 CurrentFreq=1344000 IdleStates: WFI=0 c7=0" in shown
    assert "GPU MinFreq=918000000 MaxFreq=918000000" in shown
    assert "hwmon0_pwm1=255" in shown
    worn.run("jetson_clocks --restore /clocks")
    assert "GPU MinFreq=306000000 MaxFreq=918000000" in worn.run("jetson_clocks --show").stdout
    worn.run("jetson_clocks")
    worn.boot()
    assert worn.read("/sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq") == "729600\n"


@pytest.mark.lab
def test_zram_of_a_jetson_goes_with_its_unit_and_stays_away(wear):
    worn = wear(ORIN)
    assert worn.read("/proc/swaps").count("/dev/zram") == 6
    assert worn.run("test -L /etc/systemd/system/multi-user.target.wants/nvzramconfig.service").returncode == 0
    assert worn.run("systemctl disable --now nvzramconfig").returncode == 0
    assert "/dev/zram" not in worn.read("/proc/swaps")
    assert worn.run("test -L /etc/systemd/system/multi-user.target.wants/nvzramconfig.service").returncode == 1
    worn.boot()
    assert "/dev/zram" not in worn.read("/proc/swaps")
    worn.run("systemctl enable nvzramconfig")
    worn.boot()
    assert worn.read("/proc/swaps").count("/dev/zram") == 6
    assert "SwapTotal:       3901416 kB" in worn.read("/proc/meminfo")


@pytest.mark.lab
def test_swapoff_lasts_until_the_next_boot(wear):
    worn = wear(PI4)
    assert worn.run("swapoff -a").returncode == 0
    assert worn.run("swapon --show").stdout == ""
    worn.boot()
    assert "/dev/zram0" in worn.read("/proc/swaps")


@pytest.mark.lab
def test_swap_of_raspberry_pi_os_is_what_its_configuration_says_at_boot(wear):
    worn = wear(PI5)
    worn.run("mkdir /etc/rpi/swap.conf.d && printf '[Main]\\nMechanism=none\\n' >/etc/rpi/swap.conf.d/90-off.conf")
    assert "/dev/zram0" in worn.read("/proc/swaps")
    worn.boot()
    assert "/dev/zram0" not in worn.read("/proc/swaps")
    assert worn.run("systemctl is-active dev-zram0.swap").returncode == 4


@pytest.mark.lab
def test_the_kernel_line_of_a_raspberry_pi_is_cmdline_txt_behind_the_firmwares_words(wear):
    worn = wear(PI5)
    assert not memory_cgroup_on(worn.read("/proc/cmdline"))
    worn.run("sed -i '1s/$/ cgroup_enable=memory/' /boot/firmware/cmdline.txt")
    assert not memory_cgroup_on(worn.read("/proc/cmdline"))
    worn.boot()
    line = worn.read("/proc/cmdline")
    assert line.startswith("reboot=w ")
    assert memory_cgroup_on(line)


@pytest.mark.lab
def test_the_kernel_line_of_a_jetson_is_the_default_entry_of_extlinux(wear):
    worn = wear(NANO)
    worn.run("sed -i 's/^\\( *APPEND.*\\)$/\\1 mem=2G/' /boot/extlinux/extlinux.conf")
    worn.boot()
    line = worn.read("/proc/cmdline")
    assert line.startswith("tegraid=21.1.2.0.0 ")
    assert line.endswith(" mem=2G\n")


@pytest.mark.lab
def test_chrony_is_installed_replaces_timesyncd_and_finds_the_time(wear):
    worn = wear(ORIN)
    assert worn.run("apt-get install -y -q chrony").returncode == 0
    assert worn.run("systemctl is-active chrony systemd-timesyncd").stdout == "active\ninactive\n"
    assert worn.run("systemctl is-enabled chrony").stdout == "enabled\n"
    done = worn.run("chronyc waitsync 30 0 0 0.1")
    assert done.returncode == 0
    assert "refid: CB007107" in done.stdout
    assert worn.run("chronyc -c tracking").stdout.rstrip().endswith(",Normal")
    assert "Leap status     : Normal" in worn.run("chronyc -n tracking", user="someone").stdout
    assert worn.run("timedatectl show -p NTPSynchronized").stdout == "NTPSynchronized=yes\n"
    worn.run("systemctl stop chronyd")
    done = worn.run("chronyc tracking")
    assert (done.returncode, done.stdout) == (1, "506 Cannot talk to daemon\n")
    worn.boot()
    assert worn.run("systemctl is-active chrony").returncode == 0


@pytest.mark.lab
def test_a_unit_of_the_administrators_runs_at_every_boot_once_it_is_enabled(wear):
    worn = wear(ORIN)
    worn.run("cat >/etc/systemd/system/ours.service", given=UNIT)
    assert worn.run("systemctl daemon-reload && systemctl enable ours.service").returncode == 0
    assert worn.run("ls /ran").returncode != 0
    worn.boot()
    assert worn.read("/ran") == "1\n2\n"
    assert worn.run("systemctl is-active ours").stdout == "active\n"
    worn.run("systemctl disable ours && rm /ran")
    worn.boot()
    assert worn.run("ls /ran").returncode != 0


@pytest.mark.lab
def test_masked_units_do_not_start(wear):
    worn = wear(PI4)
    assert worn.run("systemctl mask --now systemd-timesyncd").returncode == 0
    assert worn.run("systemctl is-enabled systemd-timesyncd").stdout == "masked\n"
    done = worn.run("systemctl start systemd-timesyncd")
    assert (done.returncode, "is masked." in done.stderr) == (1, True)
    worn.boot()
    assert worn.run("timedatectl show -p NTPSynchronized --value").stdout == "no\n"
    worn.run("systemctl unmask systemd-timesyncd")
    assert worn.run("systemctl is-enabled systemd-timesyncd").stdout == "enabled\n"


@pytest.mark.lab
def test_the_governor_is_one_for_all_cores_of_a_cluster_and_forgotten_by_a_boot(wear):
    worn = wear(PI5)
    worn.run("echo performance >/sys/devices/system/cpu/cpu3/cpufreq/scaling_governor")
    assert worn.read("/sys/devices/system/cpu/cpufreq/policy0/scaling_governor") == "performance\n"
    worn.boot()
    assert worn.read("/sys/devices/system/cpu/cpufreq/policy0/scaling_governor") == "ondemand\n"


@pytest.mark.lab
def test_lingering_default_target_and_groups_last(wear):
    worn = wear(PI5)
    worn.run("loginctl enable-linger someone; systemctl set-default rescue.target; usermod -aG video someone")
    worn.boot()
    assert worn.run("loginctl show-user someone -p Linger").stdout == "Linger=yes\n"
    assert worn.run("ls /var/lib/systemd/linger").stdout == "someone\n"
    assert worn.run("systemctl get-default").stdout == "rescue.target\n"
    assert worn.run("vcgencmd measure_temp", user="someone").stdout == "temp=39.5'C\n"


def test_the_folder_of_the_personas_is_part_of_the_package():
    assert PERSONAS.is_dir()
    assert all(path.is_file() or path.is_dir() for path in PERSONAS.rglob("*")), "a wheel carries no links"
    assert not any(path.is_symlink() for path in PERSONAS.rglob("*"))
