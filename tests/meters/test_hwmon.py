"""Inline power sensors behind a kernel driver: which one is taken, what it reads, and what is said when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.errors import MeterError, UsageError
from testbed.meters import make
from testbed.meters.hwmon import Hwmon
from tests.meters.boards import as_nobody, board, break_file, public_folder, sensor

#: As the driver ina2xx shows an INA226 with its default shunt: in0 is the shunt's voltage, in1 the bus.
INA226 = {
    "in0_input": 5,
    "in1_input": 5100,
    "curr1_input": 500,
    "power1_input": 2_550_000,
    "shunt_resistor": 10_000,
    "update_interval": 35,
}


def opened(root: Path, **settings) -> Hwmon:
    meter = Hwmon(root=str(root), **settings)
    meter.open()
    return meter


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    """A board with an INA226 and two chips that measure no power."""
    sensor(tmp_path, 0, "cpu_thermal", temp1_input=39_500)
    sensor(tmp_path, 1, "rpi_volt", in0_lcrit_alarm=0)
    sensor(tmp_path, 2, "ina226", **INA226)
    return tmp_path


# --- which one -----------------------------------------------------------------------------------------------------


def test_the_only_inline_sensor_is_taken(pi):
    meter = opened(pi)
    assert (meter.rails, meter.total_rails, meter.point) == (("ina226",), ("ina226",), "dc_input")
    assert meter.read().watts == pytest.approx((2.55,))
    assert meter.read().joules is None


def test_a_jetson_s_own_sensor_is_no_inline_sensor(tmp_path):
    root = board("jetson_orin_nano_8gb", tmp_path)
    with pytest.raises(MeterError, match=r"there is no inline power sensor .*\(chips there: ina3221, "):
        opened(root)
    with pytest.raises(MeterError, match="there is no power sensor with label VDD_IN"):
        opened(root, label="VDD_IN")
    assert opened(root, name="ina3221").rails == ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")
    assert opened(root, name="ina3221").total_rails == ()


def test_beside_a_jetson_s_own_sensor_the_inline_one_is_taken(tmp_path):
    root = board("jetson_orin_nano_8gb", tmp_path)
    sensor(root, 9, "ina219", in1_input=12_000, power1_input=9_000_000)
    assert opened(root).read().watts == pytest.approx((9.0,))


def test_of_several_one_must_be_chosen(pi):
    sensor(pi, 10, "ina219", in1_input=5000, curr1_input=100, power1_input=500_000)
    with pytest.raises(MeterError, match=r"several sensors fit: ina226 at .*hwmon2, ina219 at .*hwmon10; .*`path`"):
        opened(pi)
    assert opened(pi, name="ina219").read().watts == pytest.approx((0.5,))
    assert opened(pi, path="/sys/class/hwmon/hwmon2").read().watts == pytest.approx((2.55,))


def test_a_path_on_the_bus_does_not_depend_on_hwmon_numbers(pi):
    bus = pi / "sys/bus/i2c/devices/1-0041/hwmon"
    bus.mkdir(parents=True)
    (pi / "sys/class/hwmon/hwmon2").rename(bus / "hwmon2")
    assert opened(pi, path="/sys/bus/i2c/devices/1-0041").rails == ("ina226",)
    (bus / "hwmon2").rename(bus / "hwmon7")
    assert opened(pi, path="/sys/bus/i2c/devices/1-0041").rails == ("ina226",)


@pytest.mark.parametrize("file", ["label", "in1_label", "power1_label"])
def test_a_label_names_the_rail_and_chooses_it(pi, file):
    (pi / "sys/class/hwmon/hwmon2" / file).write_text("supply\n")
    sensor(pi, 3, "ina226", **INA226)
    meter = opened(pi, label="supply")
    assert meter.rails == ("supply",)
    assert meter.read().watts == pytest.approx((2.55,))


def test_any_chip_does_when_it_is_named(pi):
    sensor(pi, 3, "ltc2945", in1_input=12_000, curr1_input=250)
    sensor(pi, 4, "two", power1_input=1_000_000, power2_input=2_000_000)
    assert opened(pi, name="ltc2945").read().watts == pytest.approx((3.0,))
    two = opened(pi, name="two")
    assert (two.rails, two.total_rails, two.read().watts) == (("two", "two_2"), (), (1.0, 2.0))


@pytest.mark.parametrize(
    "settings", [{"name": "ina260"}, {"path": "/sys/class/hwmon/hwmon0"}, {"label": "nothing"}, {"path": "/no/where"}]
)
def test_what_is_not_there_is_told_with_what_is(pi, settings):
    (key, value), *_ = settings.items()
    with pytest.raises(
        MeterError, match=rf"no power sensor with {key} {value} .*\(chips there: cpu_thermal, ina226, rpi_volt\)"
    ):
        opened(pi, **settings)


def test_without_any_chip_the_way_out_is_told(tmp_path):
    with pytest.raises(MeterError, match=r"chips there: none.*echo ina226 0x40 .*`meter: none`"):
        opened(tmp_path)


# --- shunts, counters, accuracy ------------------------------------------------------------------------------------


def test_another_shunt_than_the_driver_s_mends_the_power(pi):
    meter = opened(pi, shunt_ohms=0.1)
    assert meter.read().watts == pytest.approx((0.255,))
    assert meter.accuracy[0].step_watts == pytest.approx(25 * 2.5e-6 / 0.1)


def test_a_shunt_that_the_driver_does_not_tell_cannot_be_mended(pi):
    (pi / "sys/class/hwmon/hwmon2/shunt_resistor").unlink()
    with pytest.raises(MeterError, match="ina226 does not tell the shunt"):
        opened(pi, shunt_ohms=0.1)


@pytest.mark.parametrize("ohms", [0, -0.1])
def test_a_shunt_that_cannot_be_is_a_wrong_setting(ohms):
    with pytest.raises(UsageError, match="shunt_ohms: expected more than 0"):
        make("hwmon", {"shunt_ohms": ohms})


def test_an_ina226_is_known_by_its_datasheet(pi):
    (accuracy,) = opened(pi).accuracy
    assert accuracy.gain == pytest.approx(0.0106, abs=2e-4)  # a shunt of 1 % is most of it
    assert accuracy.step_watts == pytest.approx(25 * 2.5e-6 / 0.01)
    assert accuracy.offset_watts == pytest.approx(10e-6 / 0.01 * 5.1)
    assert accuracy.timing_seconds == pytest.approx(0.035)


def test_a_shunt_inside_the_chip_has_no_tolerance_of_its_own(pi, tmp_path):
    sensor(tmp_path, 5, "ina260", in1_input=5000, power1_input=10_000)
    (accuracy,) = opened(tmp_path, name="ina260").accuracy
    assert accuracy.gain < 0.01
    assert accuracy.step_watts == pytest.approx(0.010)  # https://www.ti.com/lit/gpn/ina260: 10 mW
    assert accuracy.offset_watts == pytest.approx(5.0 * 0.005)


def test_of_a_chip_without_a_datasheet_a_wide_guess_is_told(tmp_path):
    sensor(tmp_path, 0, "ina231", in1_input=5000, power1_input=1)
    assert opened(tmp_path).accuracy[0].gain == pytest.approx(0.05)


def test_an_energy_counter_comes_with_every_reading(tmp_path):
    folder = sensor(tmp_path, 0, "ina228", in1_input=5000, power1_input=2_000_000, energy1_input=1_500_000)
    meter = opened(tmp_path)
    assert meter.has_counters
    assert meter.read() == ((2.0,), (1.5,), None)
    (folder / "energy1_input").write_text(f"{(1 << 40) + 1_500_000}\n")
    assert meter.read().joules == pytest.approx(((1 << 40) / 1e6 + 1.5,))
    assert meter.accuracy[0].gain > 0.01


def test_an_energy_counter_never_goes_back(tmp_path):
    folder = sensor(tmp_path, 0, "ina228", in1_input=5000, power1_input=2_000_000, energy1_input=9_000_000)
    meter = opened(tmp_path)
    (folder / "energy1_input").write_text("1000000\n")
    with pytest.raises(MeterError, match="its energy counter has begun anew"):
        meter.read()
    assert meter.read().joules == pytest.approx((10.0,))
    (folder / "energy1_input").write_text("3000000\n")
    assert meter.read().joules == pytest.approx((12.0,))


# --- what fails ----------------------------------------------------------------------------------------------------


def test_an_io_error_is_one_reading_and_not_the_end(pi):
    meter = opened(pi)
    file = pi / "sys/class/hwmon/hwmon2/power1_input"
    meter.close()
    break_file(file)
    with pytest.raises(MeterError, match="power1_input cannot be read: Input/output error"):
        meter.read()
    file.unlink()
    file.write_text("1000000\n")
    assert meter.read().watts == pytest.approx((1.0,))


def test_garbage_is_no_reading(pi):
    meter = opened(pi)
    (pi / "sys/class/hwmon/hwmon2/power1_input").write_text("n/a\n")
    with pytest.raises(MeterError, match=r"power1_input: expected a whole number, got b'n/a\\n'"):
        meter.read()


def test_another_chip_under_the_old_number_is_not_taken_for_it(pi):
    meter = opened(pi)
    meter.close()
    folder = pi / "sys/class/hwmon/hwmon2"
    folder.rename(folder.with_name("hwmon8"))
    sensor(pi, 2, "ltc2945", power1_input=9_000_000)
    assert meter.read().watts == pytest.approx((2.55,))


def test_who_may_not_read_is_told_the_way_out():
    with public_folder() as root:
        folder = sensor(root, 0, "ina226", **INA226)
        (folder / "power1_input").chmod(0)
        with as_nobody(), pytest.raises(MeterError, match=r"power1_input: \w+ may not read it; `testbed provision`"):
            opened(root)
