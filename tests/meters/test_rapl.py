"""Energy counters of the processor become watts and joules, beyond their wrap-around, on trees like the kernel's."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.errors import MeterError
from testbed.meters import BOARD, make, rapl

RANGE_UJ = 262_143_328_850  # what a processor with a unit of 61 µJ says: 2^32 of them
NOBODY = 65534


class Tree:
    """/sys/class/powercap as the kernel lays it out: zones side by side, called by their place."""

    def __init__(self, root):
        self.root = root

    def zone(self, place, name, microjoules=0, range_uj=RANGE_UJ):
        folder = self.root / place
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
        self.count(place, microjoules)

    def count(self, place, microjoules):
        (self.root / place / "energy_uj").write_text(f"{microjoules}\n")

    def meter(self):
        meter = make("rapl", {"root": str(self.root)})
        meter.open()
        return meter


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.fixture
def server(tree):
    """Two sockets with memory, on a board with a counter of the whole platform."""
    tree.zone("intel-rapl:0", "package-0", 1_000_000)
    tree.zone("intel-rapl:0:0", "core", 500_000)
    tree.zone("intel-rapl:0:1", "dram", 200_000, 65_712_999_613)
    tree.zone("intel-rapl:1", "package-1", 7_000_000)
    tree.zone("intel-rapl:1:0", "dram", 300_000, 65_712_999_613)
    tree.zone("intel-rapl:2", "psys", 9_000_000)
    (tree.root / "intel-rapl").mkdir()
    tree.zone("intel-rapl-mmio:0", "package-0", 1_000_000)
    return tree


@pytest.fixture
def clock(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(rapl, "_clock", lambda: now[0])
    return now


def test_packages_and_their_memory_are_the_rails_and_nothing_is_counted_twice(server):
    meter = server.meter()
    assert meter.rails == ("package-0", "package-0/dram", "package-1", "package-1/dram")
    assert meter.total_rails == meter.rails
    assert (meter.where, meter.point, meter.has_counters) == (BOARD, "processor", True)
    assert len(meter.accuracy) == 4


def test_watts_are_what_the_counters_grew_by(server, clock):
    meter = server.meter()
    clock[0] += 0.5
    server.count("intel-rapl:0", 11_000_000)
    server.count("intel-rapl:1:0", 1_300_000)
    reading = meter.read()
    assert reading.watts == pytest.approx((20.0, 0.0, 0.0, 2.0))
    assert reading.joules == pytest.approx((10.0, 0.0, 0.0, 1.0))
    assert reading.unix_seconds is None


def test_a_counter_that_wraps_around_goes_on_counting(tree, clock):
    tree.zone("intel-rapl:0", "package-0", RANGE_UJ - 2_000_000)
    meter = tree.meter()
    clock[0] += 1
    tree.count("intel-rapl:0", 3_000_000)
    assert meter.read() == ((pytest.approx(5.0),), (pytest.approx(5.0),), None)
    clock[0] += 1
    tree.count("intel-rapl:0", 4_000_000)
    assert meter.read() == ((pytest.approx(1.0),), (pytest.approx(6.0),), None)


def test_two_readings_close_together_do_not_divide_by_a_moment(tree, clock):
    tree.zone("intel-rapl:0", "package-0")
    meter = tree.meter()
    for step in range(1, 4):
        clock[0] = 50 + step * 0.1
        tree.count("intel-rapl:0", step * 1_000_000)
        assert meter.read().watts == (pytest.approx(10.0),)
    clock[0] += 0.0001  # the counter has not moved yet: at the edge of a window, say
    assert meter.read().watts == (pytest.approx(10.0, rel=0.01),)
    clock[0] += 0.0999
    tree.count("intel-rapl:0", 4_000_000)
    assert meter.read() == ((pytest.approx(10.0),), (pytest.approx(4.0),), None)


def test_a_counter_that_began_at_0_is_no_wrap_around(tree, clock):
    tree.zone("intel-rapl:0", "package-0", 1_000_000_000)
    meter = tree.meter()
    clock[0] += 0.1
    tree.count("intel-rapl:0", 500_000)
    with pytest.raises(MeterError, match=r"counter of package-0 has begun at 0 .* the next reading is right again"):
        meter.read()
    clock[0] += 0.1
    tree.count("intel-rapl:0", 1_500_000)
    assert meter.read() == ((pytest.approx(10.0),), (pytest.approx(1.0),), None)


def test_without_any_package_it_says_why_that_may_be(tree):
    with pytest.raises(MeterError, match=r"no processor package is counted in .*virtual one.*modprobe intel_rapl_msr"):
        tree.meter()


def test_a_counter_that_is_no_number_is_named(tree):
    tree.zone("intel-rapl:0", "package-0", "none")
    with pytest.raises(MeterError, match=r"intel-rapl:0/energy_uj: expected a number of microjoules, got 'none'"):
        tree.meter()


def test_a_zone_that_goes_away_is_an_error_of_that_reading(tree, clock):
    tree.zone("intel-rapl:0", "package-0")
    meter = tree.meter()
    (tree.root / "intel-rapl:0/energy_uj").unlink()
    with pytest.raises(MeterError, match="energy_uj cannot be read: No such file"):
        meter.read()
    clock[0] += 1
    tree.count("intel-rapl:0", 3_000_000)
    assert meter.read().watts == (pytest.approx(3.0),)


@contextmanager
def as_somebody_else():
    """Without root's rights, for as long as it lasts."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def open_folder():
    """A folder that everybody may look into, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_counter_that_only_root_may_read_says_why_and_how_to_change_it(open_folder):
    tree = Tree(open_folder)
    tree.zone("intel-rapl:0", "package-0")
    (tree.root / "intel-rapl:0/energy_uj").chmod(0o400 if os.geteuid() == 0 else 0)
    with as_somebody_else(), pytest.raises(MeterError, match=r"root alone, since CVE-2020-8694; .*chmod g\+r"):
        tree.meter()
