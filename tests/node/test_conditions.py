"""How hot a board is and what it is held back by, from the files of the virtual lab's boards and from small trees."""

from pathlib import Path

import pytest

import testbed.lab
from testbed.node.conditions import Conditions

PERSONAS = Path(testbed.lab.__file__).parent / "personas"


class Board:
    """A tree of /sys that a test moves on."""

    def __init__(self, root):
        self.root = root

    def put(self, path, text):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def zone(self, number, name, temperature, **trips):
        folder = f"sys/class/thermal/thermal_zone{number}"
        self.put(f"{folder}/type", name)
        self.put(f"{folder}/temp", temperature)
        for index, (kind, trip) in enumerate(trips.items()):
            self.put(f"{folder}/trip_point_{index}_type", kind)
            self.put(f"{folder}/trip_point_{index}_temp", trip)

    def sensor(self, number, name, **files):
        self.put(f"sys/class/hwmon/hwmon{number}/name", name)
        for file, text in files.items():
            self.put(f"sys/class/hwmon/hwmon{number}/{file}", text)

    def firmware(self, flags):
        self.put("sys/devices/platform/soc/soc:firmware/get_throttled", flags)

    def conditions(self):
        return Conditions(self.root)


@pytest.fixture
def board(tmp_path):
    return Board(tmp_path)


@pytest.mark.parametrize(
    ("persona", "celsius", "throttled"),
    [
        (
            "jetson_nano_4gb",
            31.0,
            None,
        ),  # its PMIC tells a constant 100 °C, its AO zone and its fan's are no processor's
        ("jetson_xavier_nx_8gb", 38.5, ()),
        ("jetson_orin_nano_8gb", 50.531, ()),
        ("raspberry_pi_4b_4gb", 44.8, ()),
        ("raspberry_pi_5_8gb", 39.5, ()),
    ],
)
def test_the_boards_of_the_virtual_lab_are_read(persona, celsius, throttled):
    conditions = Conditions(PERSONAS / persona)
    assert conditions.celsius() == celsius
    assert conditions.throttled() == throttled
    assert conditions.since_mark() == throttled


def test_a_board_that_tells_nothing_is_unknown(board):
    conditions = board.conditions()
    assert conditions.celsius() is None
    assert conditions.throttled() is None
    assert conditions.since_mark() is None


def test_a_pc_tells_its_temperature_and_nothing_else(board):
    board.sensor(0, "coretemp", temp1_input=61000, temp2_input=64000)
    board.sensor(1, "nvme", temp1_input=80000)
    board.zone(0, "x86_pkg_temp", 63000, passive=0)
    assert board.conditions().celsius() == 64.0
    assert board.conditions().throttled() is None


@pytest.mark.parametrize("off", ["0", "-256000", ""])
def test_a_zone_that_is_switched_off_is_left_out(board, off):
    board.zone(0, "cpu-thermal", 45000)
    board.zone(1, "cv0-thermal", off)
    assert board.conditions().celsius() == 45.0
    board.zone(0, "cpu-thermal", off)
    assert board.conditions().celsius() is None


# ── Raspberry Pi ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_flags_of_now_are_told_in_words(board):
    board.firmware("5")
    assert board.conditions().throttled() == ("under-voltage", "throttling")


def test_what_was_since_the_boot_is_not_held_against_a_window(board):
    board.firmware("50000")
    conditions = board.conditions()
    conditions.mark()
    assert conditions.throttled() == ()
    assert conditions.since_mark() == ()


def test_a_flag_that_came_up_in_the_window_counts_when_it_is_over_again(board):
    board.firmware("10000")
    conditions = board.conditions()
    conditions.mark()
    board.firmware("90000")
    assert conditions.throttled() == ()
    assert conditions.since_mark() == ("the soft temperature limit",)
    conditions.mark()
    assert conditions.since_mark() == ()


def test_what_a_look_in_between_has_found_counts(board):
    board.firmware("10000")
    conditions = board.conditions()
    conditions.mark()
    board.firmware("10001")
    assert conditions.throttled() == ("under-voltage",)
    board.firmware("10000")
    assert conditions.since_mark() == ("under-voltage",)


def vcgencmd(board, script):
    board.put("usr/bin/vcgencmd", f"#!/bin/sh\n{script}")
    (board.root / "usr/bin/vcgencmd").chmod(0o755)


def test_without_sysfs_the_firmwares_own_program_is_asked(board):
    vcgencmd(board, f'[ "$1" = get_throttled ] && cat {board.root}/flags')
    board.put("flags", "throttled=0x0")
    conditions = board.conditions()
    assert conditions.throttled() == ()
    board.put("flags", "throttled=0x20002")
    assert conditions.throttled() == conditions.since_mark() == ("capped frequency",)


@pytest.mark.parametrize("script", ['echo "Can\'t open device file: /dev/vcio"; exit 255', "exit 1"])
def test_a_firmware_that_does_not_answer_us_tells_nothing(board, script):
    vcgencmd(board, script)
    assert board.conditions().throttled() is None


def test_the_kernels_own_alarm_tells_of_low_voltage(board):
    board.sensor(1, "rpi_volt", in0_lcrit_alarm=0)
    conditions = board.conditions()
    assert conditions.throttled() == ()
    board.sensor(1, "rpi_volt", in0_lcrit_alarm=1)
    conditions.celsius()
    board.sensor(1, "rpi_volt", in0_lcrit_alarm=0)
    assert conditions.since_mark() == ("under-voltage",)


# ── Jetson ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_events_are_counted_from_the_mark(board):
    board.sensor(2, "soctherm_oc", oc1_event_cnt=4, oc2_event_cnt=10, oc3_event_cnt=7)
    conditions = board.conditions()
    conditions.mark()
    assert conditions.since_mark() == ()
    board.sensor(2, "soctherm_oc", oc1_event_cnt=5, oc2_event_cnt=11, oc3_event_cnt=9)
    assert conditions.since_mark() == ("under-voltage (1 event)", "over-current (3 events)")
    assert conditions.throttled() == ()
    conditions.mark()
    assert conditions.since_mark() == ()


def test_an_alarm_is_told_by_the_name_of_its_rail(board):
    alarms = {"curr1_crit_alarm": 0, "curr1_max_alarm": 1, "curr2_crit_alarm": 1, "curr2_max_alarm": 1}
    board.sensor(1, "ina3221", in1_label="VDD_IN", **alarms)
    assert board.conditions().throttled() == ("over-current on VDD_IN", "over-current on curr2")


def test_a_zone_above_its_trip_point_is_told_by_the_highest_that_it_passed(board):
    board.zone(0, "gpu-thermal", 70000, active=60000, passive=99000, hot=102000, critical=104500)
    conditions = board.conditions()
    assert conditions.throttled() == ()
    board.put("sys/class/thermal/thermal_zone0/temp", 99000)
    assert conditions.throttled() == ("gpu-thermal above its passive trip 99 °C",)
    board.put("sys/class/thermal/thermal_zone0/temp", 103000)
    assert conditions.celsius() == 103.0
    board.put("sys/class/thermal/thermal_zone0/temp", 70000)
    assert conditions.since_mark() == (
        "gpu-thermal above its passive trip 99 °C",
        "gpu-thermal above its hot trip 102 °C",
    )


def test_a_sensor_that_only_its_bus_knows_is_read_once(board):
    folder = "sys/bus/i2c/devices/1-0040/hwmon/hwmon1"
    for path in (folder, "sys/class/hwmon/hwmon1"):
        board.put(f"{path}/name", "ina3221")
        board.put(f"{path}/curr1_crit_alarm", 1)
    assert board.conditions().throttled() == ("over-current on curr1",)
