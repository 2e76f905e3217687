"""Samples at random times into a log on the disk, and windows of them as they travel."""

import itertools
import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from testbed.errors import MeterError
from testbed.measurement import PowerTrace
from testbed.meters import Accuracy, Meter, Reading
from testbed.meters._power_log import PowerLog
from testbed.meters._sampler import Sampler, columns
from testbed.power_integral import gross

WALL = 1_700_000_000.0


class Clock:
    """Time that passes when somebody waits or reads.  The wall clock is read up to 0.2 ms off."""

    def __init__(self):
        self.now = 100.0
        self.set_by = 0.0
        self.chance = random.Random(2)

    def wall(self):
        return WALL + self.now + self.set_by + self.chance.uniform(0, 2e-4)


class Given(Meter):
    """Reads `readings` one after the other, each in `latency` seconds; an exception is raised."""

    rails = ("A", "B")
    total_rails = ("A",)
    accuracy = (Accuracy(0.01), Accuracy(0.02, 0.1, 0.04, 0.2))
    point = "module_rail"

    def __init__(self, clock, reading, latency=0.0, *, counters=False):
        self.clock, self.reading, self.latency = clock, reading, latency
        self.has_counters = counters
        self.closed = False
        self.count = 0

    def read(self):
        self.count += 1
        self.clock.now += self.latency / 2
        reading = self.reading(self.clock.now)
        self.clock.now += self.latency / 2
        if isinstance(reading, Exception):
            raise reading
        return reading

    def close(self):
        self.closed = True


def steady(at):
    return Reading((8.0, 2.0))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def new_log(tmp_path):
    """Makes logs, and closes them in the end."""
    logs = []

    def make(columns, kind=PowerLog):
        logs.append(kind(tmp_path / f"power-{len(logs)}", columns))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


def sampler_of(meter, new_log, *, seconds=10.0, chance=None, interval=0.1):
    """A sampler that runs so long on the meter's clock, and is then told to stop."""
    clock = meter.clock
    end = clock.now + seconds

    def wait(asked):
        clock.now += asked
        return clock.now > end

    return Sampler(
        meter, new_log(columns(meter)), interval,
        clock=lambda: clock.now, wall=clock.wall, wait=wait, chance=chance or random.Random(1).random,
    )  # fmt: skip


def times(sampler, begin=0.0, end=1e9):
    return [begin + row[0] for row in sampler.trace(begin, end)["rows"]]


def read_back(sampler, begin, end):
    return PowerTrace.from_json(json.loads(json.dumps(sampler.trace(begin, end))))


# ------------------------------------------------------------------------------------------------- when it samples
def test_one_sample_at_a_random_time_in_every_interval(clock, new_log):
    sampler = sampler_of(Given(clock, steady), new_log, seconds=60.0)
    sampler.run()
    found = [(at - 100.0) / 0.1 for at in times(sampler)]
    assert [round(at) for at in found[1:]] == list(range(1, len(found)))  # the first tick is at once, or a bit later
    shares = [at - round(at) for at in found[1:]]
    tenths = [sum(low <= share * 10 < low + 1 for share in shares) for low in range(-5, 5)]
    assert min(tenths) > 30  # 60 in the mean: no part of an interval is left out


def test_what_repeats_itself_as_often_as_samples_come_out_right_in_the_mean(clock, new_log):
    """A pulse that always falls into the same part of an interval, which samples near ticks would never meet."""
    sampler = sampler_of(
        Given(clock, lambda at: Reading((10.0 if 0.4 < (at - 100) / 0.1 % 1 < 0.6 else 5.0, 0.0))),
        new_log,
        seconds=200,
    )
    sampler.run()
    energy = gross(read_back(sampler, 101.0, 299.0), [(0.0, 198.0)])
    assert energy.joules == pytest.approx(198 * (5 + 0.2 * 5), rel=0.02)
    assert energy.low_joules <= 198 * 6 <= energy.high_joules


def test_ticks_that_pass_during_a_slow_reading_are_left_out(clock, new_log):
    meter = Given(clock, steady, latency=0.25)
    sampler = sampler_of(meter, new_log, chance=lambda: 0.5)
    sampler.run()
    found = times(sampler)
    assert found[0] == pytest.approx(100.125)  # stamped with the middle of the reading
    assert [b - a for a, b in itertools.pairwise(found)] == pytest.approx([0.3] * (len(found) - 1))


def test_never_more_often_than_the_meter_has_something_new(clock, new_log):
    meter = Given(clock, steady)
    meter.period_seconds = 1.0
    assert sampler_of(meter, new_log, interval=0.1).interval_seconds == 1.0
    assert sampler_of(meter, new_log, interval=5.0).interval_seconds == 5.0
    assert sampler_of(meter, new_log, interval=None).interval_seconds == 1.0


# --------------------------------------------------------------------------------------------------- what can go wrong
def test_a_reading_that_fails_leaves_a_gap_and_no_more(clock, new_log):
    sampler = sampler_of(
        Given(clock, lambda at: MeterError("no answer") if 103 < at < 105 else steady(at)), new_log, chance=lambda: 0.5
    )
    sampler.run()
    assert 19 <= sampler.failures <= 21
    assert sampler.error is None
    found = times(sampler)
    assert max(b - a for a, b in itertools.pairwise(found)) == pytest.approx(2.0, abs=0.21)
    assert sampler.joules[0] == pytest.approx(8.0 * (found[-1] - found[0] - 2.0), abs=2.0)  # nothing for the gap


def test_the_last_failure_is_told_until_a_reading_succeeds(clock, new_log):
    readings = iter([steady(0), MeterError("no answer"), Reading((1.0, 1.0), unix_seconds=WALL + 100.0)])
    sampler = sampler_of(Given(clock, lambda at: next(readings)), new_log)
    sampler.sample()
    sampler.sample()
    assert (sampler.error, sampler.failures, sampler.watts) == ("no answer", 1, (8.0, 2.0))
    sampler.sample()  # it answers again, with nothing new
    assert (sampler.error, sampler.failures, sampler.watts) == (None, 1, (8.0, 2.0))
    assert len(times(sampler)) == 1


FULL_DISK = """
import resource, sys, signal
from pathlib import Path
from testbed.errors import MeterError
from testbed.meters._power_log import PowerLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = PowerLog(Path(sys.argv[1]), 3)
resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 24 + 10, resource.RLIM_INFINITY))
kept = 0
for number in range(8):
    try:
        log.append((float(number), 0.0, 8.0))
        kept += 1
    except OSError:
        pass
print(kept, [row[0] for row in log.rows(0, 100)])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append((9.0, 0.0, 8.0))
print([row[0] for row in log.rows(0, 100)], log.rows(8.5, 8.6)[-1])
"""


def test_a_full_disk_keeps_what_is_whole_and_goes_on_when_there_is_room(tmp_path):
    """The sixth row would fit in part only: a real limit, of the size of a file."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "power")],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "5 [0.0, 1.0, 2.0, 3.0, 4.0]",
        "[0.0, 1.0, 2.0, 3.0, 4.0, 9.0] (9.0, 0.0, 8.0)",
    ]


class FullLog(PowerLog):
    def append(self, row):
        raise OSError(28, "No space left on device")


def test_a_sample_that_cannot_be_kept_is_counted(clock, new_log):
    meter = Given(clock, steady)
    sampler = Sampler(meter, new_log(columns(meter), FullLog), clock=lambda: clock.now, wall=clock.wall)
    sampler.sample()
    assert (sampler.failures, sampler.watts) == (1, None)
    assert sampler.error == "the sample cannot be kept: No space left on device"
    assert sampler.trace(0, 1e9)["rows"] == []


# ------------------------------------------------------------------------------------------------------------- stamps
def test_a_meter_with_a_clock_of_its_own_stamps_by_it(clock, new_log):
    """Its readings are two seconds old when they come; each comes several times."""
    sampler = sampler_of(
        Given(clock, lambda at: Reading((at, 0.0), unix_seconds=WALL + at // 1 - 2.0), latency=0.01), new_log
    )
    sampler.run()
    found = times(sampler)
    assert found == pytest.approx([98.0 + number for number in range(len(found))], abs=2e-3)
    assert len(found) in {10, 11}


def test_how_far_the_wall_clock_has_moved_travels_with_the_rows(clock, new_log):
    meter = Given(clock, steady)
    sampler = sampler_of(meter, new_log)
    for set_by in (0.5, 0.5, -1.0, -1.0):
        clock.now += 0.1
        clock.set_by = set_by
        sampler.sample()
    assert [row[1] for row in sampler.trace(0, 1e9)["rows"]] == pytest.approx([0.0, 0.0, -1.5, -1.5], abs=1e-3)


# ------------------------------------------------------------------------------------------------------------- windows
def test_a_window_as_it_travels(clock, new_log):
    meter = Given(clock, lambda at: Reading((8.00004, at), (8.0 * at, 2.0 * at)), counters=True)
    sampler = sampler_of(meter, new_log, chance=lambda: 0.5)
    sampler.run()
    trace = read_back(sampler, 102.05, 103.05)
    assert (trace.meter, trace.point, trace.rails, trace.total_rails) == (
        "test_sampler",
        "module_rail",
        ("A", "B"),
        ("A",),
    )
    assert trace.accuracy == ((0.01, 0.0, 0.0, 0.0), (0.02, 0.1, 0.04, 0.2))
    assert (trace.interval_seconds, trace.replayed, trace.counters) == (0.1, False, True)
    # Its times begin with the window, one row lies beyond it on either side, counters begin at 0.
    assert [row[0] for row in trace.rows] == pytest.approx([-0.05 + 0.1 * number for number in range(12)], abs=1e-4)
    assert [row[2] for row in trace.rows] == [8.0] * 12
    assert trace.rows[0][4:] == (0.0, 0.0)
    assert trace.rows[-1][4:] == pytest.approx((8.8, 2.2), abs=1e-3)
    assert gross(trace, [(0.0, 1.0)]).joules == pytest.approx(8.0, rel=1e-4)


def test_an_empty_log_has_an_empty_window(clock, new_log):
    sampler = sampler_of(Given(clock, steady), new_log)
    trace = read_back(sampler, 0.0, 1e9)
    assert (trace.rows, trace.counters) == ((), False)


@pytest.mark.parametrize("seed", range(5))
def test_windows_of_a_log_are_found_as_by_looking_at_every_row(new_log, seed):
    chance = random.Random(seed)
    log = new_log(3)
    stamps = sorted(round(chance.uniform(0, 100), 1) for _ in range(chance.randint(1, 60)))
    for at in stamps:
        log.append((at, 0.0, at * 2))
    for _ in range(200):
        begin, end = sorted(round(chance.uniform(-10, 110), 1) for _ in range(2))
        first = sum(at < begin for at in stamps)
        last = sum(at <= end for at in stamps)
        assert [row[0] for row in log.rows(begin, end)] == stamps[max(0, first - 1) : last + 1]
    assert log.rows(90, 10) == []


# -------------------------------------------------------------------------------------------------------- in a thread
def test_it_samples_in_a_thread_until_it_is_stopped(new_log):
    enough = threading.Event()

    class Real(Meter):
        rails = ("A",)
        accuracy = (Accuracy(0.0),)
        period_seconds = 0.001
        closed = False
        count = 0

        def read(self):
            self.count += 1
            if self.count >= 5:
                enough.set()
            return Reading((8.0,))

        def close(self):
            self.closed = True

    meter = Real()
    sampler = Sampler(meter, new_log(columns(meter)))
    sampler.start()
    assert enough.wait(30)
    sampler.sample()  # at the edge of a window, beside the thread
    rows = sampler.trace(0.0, 1e12)["rows"]
    assert len(rows) >= 5
    assert rows == sorted(rows)
    sampler.stop()
    assert meter.closed
    count = meter.count
    with pytest.raises(ValueError, match="closed file"):
        sampler.trace(0.0, 1e12)
    assert meter.count == count
