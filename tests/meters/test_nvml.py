"""NVIDIA's library is called as it wants to be, on a stand-in with the same functions, and is missed where it lacks."""

from __future__ import annotations

import ctypes
import subprocess

import pytest

from testbed.errors import MeterError, UsageError
from testbed.meters import BOARD, make

#: The functions of nvml.h that we use, and two of our own: how they shall answer, and how often it was shut down.
STAND_IN = r"""
typedef struct gpu *nvmlDevice_t;
static int init, handle, power, energy, shutdowns;
static unsigned count = 2;

void answer(int on_init, int on_handle, int on_power, int on_energy, unsigned gpus) {
    init = on_init; handle = on_handle; power = on_power; energy = on_energy; count = gpus;
}
int shutdown_count(void) { return shutdowns; }

int nvmlInit_v2(void) { return init; }
int nvmlShutdown(void) { shutdowns++; return 0; }
int nvmlDeviceGetCount_v2(unsigned *found) { *found = count; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    *device = (nvmlDevice_t)(0x7f0000000000UL + index); /* a pointer that needs all its bits */
    return handle;
}
int nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts) {
    *milliwatts = 35250 + 1000 * ((unsigned long)device - 0x7f0000000000UL);
    return power;
}
#ifndef OLD
int nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *millijoules) {
    *millijoules = 5000000123ULL; /* more than 32 bits hold */
    return energy;
}
#endif
const char *nvmlErrorString(int code) {
    return code == 4 ? "Insufficient Permissions" : code == 3 ? "Not Supported" : code == 15 ? "GPU is lost" : "Other";
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Builds the stand-in, once for each set of flags."""
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(STAND_IN)

    def build(name, *flags):
        library = folder / name
        if not library.exists():
            command = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", *flags, "-o", library, folder / "nvml.c"]
            subprocess.run(command, check=True)
        return str(library)

    return build


class StandIn:
    """How the library answers; it is the same one in this process that the meter loads."""

    def __init__(self, path):
        self.path = path
        self._library = ctypes.CDLL(path)
        self.answer()

    def answer(self, *, init=0, handle=0, power=0, energy=0, gpus=2):
        self._library.answer(init, handle, power, energy, gpus)

    @property
    def shutdowns(self):
        return self._library.shutdown_count()

    def meter(self, **settings):
        return make("nvml", {"library": self.path, **settings})


@pytest.fixture
def nvml(compiled):
    return StandIn(compiled("libstandin.so"))


def test_it_reads_watts_and_joules_of_the_gpu_that_was_chosen(nvml):
    meter = nvml.meter(index=1)
    meter.open()
    assert meter.read() == ((36.25,), (5000000.123,), None)
    assert (meter.rails, meter.total_rails) == (("GPU1",), ("GPU1",))
    assert (meter.where, meter.point, meter.has_counters) == (BOARD, "processor", True)
    meter.close()


def test_its_accuracy_is_nvidias_five_percent_and_a_second_without_the_counter(nvml):
    with_counter, without = nvml.meter(), nvml.meter()
    with_counter.open()
    nvml.answer(energy=3)
    without.open()
    assert [meter.accuracy[0].gain for meter in (with_counter, without)] == [0.05, 0.05]
    assert [meter.accuracy[0].timing_seconds for meter in (with_counter, without)] == [0.1, 1.0]


def test_a_gpu_or_a_library_older_than_the_counter_does_without_it(nvml, compiled):
    nvml.answer(energy=3)
    old_library = StandIn(compiled("libold.so", "-DOLD", "-Wno-unused-variable", "-Wno-unused-but-set-variable"))
    for meter in (nvml.meter(), old_library.meter()):
        meter.open()
        assert not meter.has_counters
        assert meter.read() == ((35.25,), None, None)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"init": 9}, r"refuses nvmlInit_v2 for GPU 0: Other; load the driver"),
        ({"handle": 4}, r"GetHandleByIndex_v2 .*: Insufficient Permissions; run the agent as a user who may use"),
        ({"power": 3}, r"GetPowerUsage .*: Not Supported; this GPU has no power sensor"),
        ({"energy": 4}, r"GetTotalEnergyConsumption .*: Insufficient Permissions"),
        ({"gpus": 0}, r"there is no GPU of index 0; NVML knows none"),
    ],
)
def test_what_nvml_refuses_at_first_is_said_in_its_words_with_the_way_out(nvml, answers, said):
    nvml.answer(**answers)
    with pytest.raises(MeterError, match=said):
        nvml.meter().open()


def test_an_index_beyond_the_last_gpu_says_which_there_are(nvml):
    with pytest.raises(MeterError, match=r"no GPU of index 2; NVML knows 0 to 1"):
        nvml.meter(index=2).open()


def test_a_reading_that_fails_is_an_error_and_the_next_may_be_right(nvml):
    meter = nvml.meter()
    meter.open()
    nvml.answer(power=15)
    with pytest.raises(MeterError, match=r"GPU is lost; .*restart the machine"):
        meter.read()
    nvml.answer()
    assert meter.read().watts == (35.25,)


def test_nvml_is_let_go_as_often_as_it_was_begun(nvml):
    before = nvml.shutdowns
    meter = nvml.meter()
    meter.open()
    meter.close()
    meter.close()
    nvml.answer(power=3)
    with pytest.raises(MeterError):
        meter.open()
    assert nvml.shutdowns - before == 2
    nvml.answer()
    meter.open()
    assert meter.read().watts == (35.25,)


def test_without_the_driver_it_says_what_is_missing():
    meter = make("nvml", {"library": "libnvidia-ml-of-no-machine.so.1"})
    with pytest.raises(MeterError, match=r"NVML cannot be loaded \(.*No such file.*\); install the driver"):
        meter.open()
    with pytest.raises(MeterError, match="is not open"):
        meter.read()


@pytest.mark.parametrize("index", [-1, "first", 1.0, True])
def test_an_index_that_cannot_be_is_refused_before_anything_is_loaded(index):
    with pytest.raises(UsageError, match="index: expected a whole number from 0 up"):
        make("nvml", {"index": index})
