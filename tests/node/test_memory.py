"""Peaks of a phase from /proc: what is told when the kernel can start a new mark, cannot, or the process is gone."""

from pathlib import Path

import pytest

from testbed.measurement import PeakMemory, PhaseMeasurement
from testbed.node.memory import PhaseMeter, parse_status

KIB = 1024


def write_status(proc, high, resident, anonymous, file, *, shared=0):
    (proc / "7").mkdir(exist_ok=True)
    (proc / "7" / "status").write_text(
        f"Name:\tpython\nVmHWM:\t{high} kB\nVmRSS:\t{resident} kB\nRssAnon:\t{anonymous} kB\nRssFile:\t{file} kB\n"
        f"RssShmem:\t{shared} kB\nThreads:\t3\n"
    )


@pytest.fixture
def proc(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "clear_refs").touch()
    write_status(tmp_path, 100, 100, 60, 40)
    return tmp_path


def measured(phase):
    found = PhaseMeasurement(phase["name"], phase["seconds"], PeakMemory(**phase["peak"]))
    assert found.seconds >= 0
    return found.peak


def test_the_estimate_is_the_mark_less_the_file_pages_of_the_nearest_sample(proc):
    meter = PhaseMeter(7, None, proc)
    meter.begin("train")
    assert (proc / "7" / "clear_refs").read_text() == "5"
    write_status(proc, 500, 480, 430, 50, shared=5)
    meter.sample()
    write_status(proc, 500, 200, 110, 90)
    peak = measured(meter.end())
    assert peak.estimate_bytes == (500 - 50) * KIB
    assert peak.lower_bytes == 435 * KIB
    assert peak.upper_bytes is None
    assert peak.file_bytes == 50 * KIB
    assert peak.sources == {"lower": "sampled", "estimate": "vmhwm"}
    assert peak.samples == 3


def test_a_mark_that_cannot_be_started_again_is_not_taken_for_this_phase(proc):
    (proc / "7" / "clear_refs").unlink()
    meter = PhaseMeter(7, None, proc)
    meter.begin("train")
    write_status(proc, 9999, 300, 250, 50)
    peak = measured(meter.end())
    assert peak.estimate_bytes == 250 * KIB  # of the last sample: 300 resident, 50 of them file pages
    assert peak.sources["estimate"] == "sampled"


def test_of_a_process_that_died_the_mark_comes_from_whoever_reaped_it(proc):
    meter = PhaseMeter(7, None, proc)
    meter.begin("train")
    (proc / "7" / "status").write_text("Name:\tpython\nState:\tZ (zombie)\n")
    peak = measured(meter.end(dead=800 * KIB))
    assert peak.estimate_bytes == (800 - 40) * KIB
    assert peak.sources["estimate"] == "vmhwm"


def test_without_a_process_nothing_is_measured_and_nothing_is_zero():
    peak = measured(PhaseMeter(None, None).end())
    assert peak == PeakMemory()


def test_our_own_status_is_read():
    status = parse_status(Path("/proc/self/status").read_bytes())
    assert status["VmHWM"] >= status["RssAnon"] > 0
