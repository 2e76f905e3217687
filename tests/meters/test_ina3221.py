"""The sensors of Jetsons, on the trees of their boards: right rails, right watts, and what is said when it fails."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from testbed.errors import MeterError, UsageError
from testbed.lab.persona import read_sources
from testbed.meters import make
from testbed.meters.ina3221 import Ina3221
from tests.meters.boards import TREES, as_nobody, board, break_file, chip_folder, public_folder

ORIN = ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")
NANO = ("POM_5V_IN", "POM_5V_GPU", "POM_5V_CPU")
AGX = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")
#: Board, rails, total, watts of each rail.
BOARDS = (
    ("jetson_nano_4gb", NANO, ("POM_5V_IN",), (2.530, 0.040, 0.400)),
    ("jetson_xavier_nx_8gb", ORIN, ("VDD_IN",), (3.611520, 0.401280, 1.003200)),
    ("jetson_orin_nano_jetpack5", ORIN, ("VDD_IN",), (4.775232, 0.521664, 1.484736)),
    ("jetson_orin_nano_8gb", ORIN, ("VDD_IN",), (4.534464, 0.521664, 1.444608)),
    ("jetson_orin_nx_jetpack5", ORIN, ("VDD_IN",), (4.585088, 0.810240, 1.417920)),
    ("jetson_orin_nx_jetpack6", ORIN, ("VDD_IN",), (4.581120, 0.763520, 1.444608)),
    ("jetson_agx_orin_jetpack5", AGX, (), (3.150080, 14.175360, 4.968000, 1.091200)),
)


def opened(root: Path) -> Ina3221:
    meter = Ina3221(str(root))
    meter.open()
    return meter


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    return board("jetson_orin_nano_8gb", tmp_path)


@pytest.fixture
def agx(tmp_path: Path) -> Path:
    return board("jetson_agx_orin_jetpack5", tmp_path)


# --- rails and watts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rails", "total", "watts"), BOARDS)
def test_every_board_tells_its_rails_in_watts(tmp_path, name, rails, total, watts):
    meter = opened(board(name, tmp_path))
    assert (meter.rails, meter.total_rails) == (rails, total)
    assert meter.read().watts == pytest.approx(watts, abs=1e-9)
    assert meter.read().joules is None
    assert (meter.point, meter.has_counters) == ("module_rail", False)


def test_a_reading_follows_the_sensor(orin):
    meter = opened(orin)
    (chip_folder(orin) / "curr1_input").write_text("2000\n")
    assert meter.read().watts[0] == pytest.approx(5.016 * 2.0)


def test_a_current_that_flows_back_is_not_hidden(orin):
    (chip_folder(orin) / "curr2_input").write_text("-8\n")
    assert opened(orin).read().watts[1] == pytest.approx(-0.040128)


def test_without_the_driver_s_power_jetpack_4_gives_voltage_times_current(tmp_path):
    root = board("jetson_nano_4gb", tmp_path)
    (chip_folder(root, "6-0040") / "in_power1_input").unlink()
    assert opened(root).read().watts == pytest.approx((2.530, 0.040, 0.400))


@pytest.mark.parametrize("label", ["NC", "nc", "NC_2", "NC2", "", "(null)"])
def test_what_is_not_connected_is_no_rail(orin, label):
    (chip_folder(orin) / "in2_label").write_text(f"{label}\n")
    assert opened(orin).rails == ("VDD_IN", "VDD_SOC")


def test_a_rail_may_have_nc_in_its_name(orin):
    (chip_folder(orin) / "in2_label").write_text("VDD_NC_SYNC\n")
    assert opened(orin).rails == ("VDD_IN", "VDD_NC_SYNC", "VDD_SOC")


def test_channels_that_the_device_tree_disables_are_left_out(agx):
    for number in (1, 3):
        (chip_folder(agx, "1-0041") / f"in{number}_label").unlink()
        break_file(chip_folder(agx, "1-0041") / f"in{number}_input")  # a disabled channel cannot be read
    (chip_folder(agx, "1-0040") / "in3_enable").write_text("0\n")
    break_file(chip_folder(agx, "1-0040") / "in3_input")
    assert opened(agx).rails == ("VDD_GPU_SOC", "VDD_CPU_CV", "VDDQ_VDD2_1V8AO")


def test_chips_come_by_their_addresses_whatever_their_hwmon_numbers(agx):
    before = opened(agx).read()
    devices = agx / "sys/bus/i2c/devices"
    (devices / "1-0040/hwmon/hwmon3").rename(devices / "1-0040/hwmon/hwmon4")
    (devices / "1-0041/hwmon/hwmon4").rename(devices / "1-0041/hwmon/hwmon3")
    meter = opened(agx)
    assert (meter.rails, meter.read()) == (AGX, before)


def test_bus_9_comes_before_bus_10(agx):
    devices = agx / "sys/bus/i2c/devices"
    (devices / "1-0040").rename(devices / "10-0040")
    (devices / "1-0041").rename(devices / "9-0041")
    assert opened(agx).rails[0] == "VDDQ_VDD2_1V8AO"


def test_the_same_name_on_two_chips_stays_two_rails(agx):
    (chip_folder(agx, "1-0041") / "in2_label").write_text("VDD_CPU_CV\n")
    assert opened(agx).rails == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDD_CPU_CV@1-0041")


# --- accuracy ------------------------------------------------------------------------------------------------------


def test_steps_and_offsets_follow_shunt_and_voltage(tmp_path):
    nano, agx = (opened(board(name, tmp_path)) for name in ("jetson_orin_nano_8gb", "jetson_agx_orin_jetpack5"))
    assert nano.accuracy[0].step_watts == pytest.approx(5.016 * 40e-6 / 0.005)
    assert nano.accuracy[0].offset_watts == pytest.approx(5.016 * 80e-6 / 0.005)
    assert agx.accuracy[0].step_watts == pytest.approx(19.688 * 40e-6 / 0.002)
    assert 0.01 < nano.accuracy[0].gain < 0.02


def test_the_step_is_that_of_the_voltage_when_it_is_opened(orin):
    (chip_folder(orin) / "in1_input").write_text("19000\n")
    assert opened(orin).accuracy[0].step_watts == pytest.approx(19.0 * 40e-6 / 0.005)


def test_the_driver_s_interval_is_how_old_a_reading_may_be(orin):
    (chip_folder(orin) / "update_interval").write_text("140\n")
    assert opened(orin).accuracy[0].timing_seconds == pytest.approx(0.140)


def test_jetpack_4_averages_in_the_driver(tmp_path):
    assert opened(board("jetson_nano_4gb", tmp_path)).accuracy[0].timing_seconds == pytest.approx(0.4224)


@pytest.mark.parametrize(("name", "ohms"), [("jetson_orin_nano_8gb", 0.005), ("jetson_agx_orin_jetpack5", 0.002)])
def test_an_untold_shunt_is_that_of_the_board(tmp_path, name, ohms):
    root = board(name, tmp_path)
    (chip_folder(root) / "shunt3_resistor").unlink()
    volts = int((chip_folder(root) / "in3_input").read_text()) / 1000
    assert opened(root).accuracy[2].step_watts == pytest.approx(volts * 40e-6 / ohms)


# --- what fails ----------------------------------------------------------------------------------------------------


def test_a_board_without_the_sensor_is_told_so(tmp_path):
    with pytest.raises(MeterError, match=r"there is no INA3221 .*choose another meter, or `meter: none`"):
        Ina3221(str(tmp_path)).open()


def test_other_chips_on_the_bus_are_none(orin):
    (orin / "sys/bus/i2c/devices/1-0040/name").write_text("ina226\n")
    with pytest.raises(MeterError, match="there is no INA3221"):
        Ina3221(str(orin)).open()


def test_a_chip_without_a_rail_is_told_so(orin):
    for number in (1, 2, 3):
        (chip_folder(orin) / f"in{number}_label").write_text("NC\n")
    with pytest.raises(MeterError, match=r"1-0040: no channel has the name of a rail"):
        Ina3221(str(orin)).open()


@pytest.mark.parametrize("file", ["in1_input", "curr3_input"])
def test_a_missing_file_is_named(orin, file):
    (chip_folder(orin) / file).unlink()
    with pytest.raises(MeterError, match=rf"{file} cannot be read: No such file"):
        Ina3221(str(orin)).open()


def test_who_may_not_read_is_told_the_way_out():
    with public_folder() as folder:
        root = board("jetson_orin_nano_8gb", folder)
        (chip_folder(root) / "curr1_input").chmod(0)
        with as_nobody(), pytest.raises(MeterError, match=r"curr1_input: \w+ may not read it; `testbed provision`"):
            Ina3221(str(root)).open()


def test_after_an_io_error_the_next_reading_is_right_again(orin):
    meter = opened(orin)
    file = chip_folder(orin) / "curr1_input"
    file.rename(file.with_name("kept"))
    file.write_text("")
    break_file(file)
    meter.close()  # as the kernel does to files that are open when a driver is bound anew
    for _ in range(2):
        with pytest.raises(MeterError, match=r"curr1_input cannot be read: Input/output error"):
            meter.read()
    file.unlink()
    file.with_name("kept").rename(file)
    assert meter.read().watts[0] == pytest.approx(4.534464)


@pytest.mark.parametrize("said", ["", "much\n", "5.0\n", "0x10\n"])
def test_a_file_that_holds_no_number_is_no_reading(orin, said):
    meter = opened(orin)
    file = chip_folder(orin) / "curr1_input"
    file.write_text(said)
    with pytest.raises(MeterError, match=r"curr1_input: expected a whole number, got"):
        meter.read()
    file.write_text("904\n")
    assert meter.read().watts[0] == pytest.approx(4.534464)


def test_a_driver_bound_anew_under_another_number_is_found_again(orin):
    meter = opened(orin)
    folder = chip_folder(orin)
    (folder / "in1_input").write_text("")
    with pytest.raises(MeterError):
        meter.read()
    (folder / "in1_input").write_text("5016\n")
    folder.rename(folder.with_name("hwmon9"))
    assert meter.read().watts[0] == pytest.approx(4.534464)


def test_rails_that_changed_while_it_was_open_are_not_taken_for_the_old_ones(orin):
    meter = opened(orin)
    meter.close()
    (chip_folder(orin) / "in1_label").write_text("VDD_OTHER\n")
    with pytest.raises(MeterError, match=r"now has the rails VDD_OTHER, .* it had VDD_IN, .*begin the run anew"):
        meter.read()


def test_a_closed_meter_may_be_opened_again_and_leaves_no_file_open(orin):
    meter = opened(orin)
    meter.close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    meter.open()
    meter.read()
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 6  # voltage and current of three rails
    meter.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_inventory_s_settings_are_checked():
    assert isinstance(make("ina3221", {"root": "/"}), Ina3221)
    with pytest.raises(UsageError, match=r'no setting "rot"; did you mean "root"'):
        make("ina3221", {"rot": "/"})


# --- the trees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", sorted(TREES.iterdir()), ids=lambda tree: tree.name)
def test_every_value_of_a_tree_has_a_source_and_no_source_is_left_over(tree):
    patterns = read_sources(tree)
    files = [str(path.relative_to(tree)) for path in (tree / "sys").rglob("*") if path.is_file()]
    fitting = {file: [pattern for pattern in patterns if fnmatchcase(file, pattern)] for file in files}
    assert [file for file, found in fitting.items() if not found] == []
    assert set(patterns) == {pattern for found in fitting.values() for pattern in found}
