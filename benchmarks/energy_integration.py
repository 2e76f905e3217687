"""What the intervals and verdicts of an energy are worth: power whose energy is known, sampled and integrated.

    python benchmarks/energy_integration.py [--count 1000] [--seed 1] [--family NAME] [--errors uniform|normal]

Every waveform is a chain of straight lines, so that its energy is known exactly.  A meter of a drawn class reads it
through the real sampler and the real log, on a simulated clock: late readings, failed ones, clocks that are set.
A meter's gain and offset errors are drawn within its class, uniformly (a datasheet's maximum; the default) or normally
with 95 % inside.

    covered      share of the intervals that hold the true energy
    error        |energy − truth| / truth
    half-width   as claimed, / energy
    valid        share of valid verdicts
    ≤ 2 %        valid claims of 2 % or better
    false        those of them on waveforms with a level shorter than three intervals, without an agreeing counter
    unseen       those of the false where no sample met such a level: nothing could have told

Exit code 1 when a target is missed: 95 % covered over all, no false claim (but unseen ones), a median error of 0.5 %
or less where a claim of 2 % is right to be made.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path

from testbed.energy import UNRESOLVED, Energy
from testbed.environment import describe_machine
from testbed.errors import MeterError
from testbed.measurement import PowerTrace
from testbed.meters import Accuracy, Meter, Reading
from testbed.meters._power_log import PowerLog
from testbed.meters._sampler import Sampler, columns
from testbed.power_integral import gross
from testbed.power_terms import ONE_LEVEL, SHORTEST_FEATURE

COVERED, MEDIAN_ERROR, CLAIM = 0.95, 0.005, 0.02
BEGIN, WALL = 1000.0, 1_700_000_000.0  # of a window on the monotonic clock; the wall clock, more than that
AROUND = 5  # intervals of sampling before and after the window


# ---------------------------------------------------------------------------------------------------------- waveforms
@dataclass(frozen=True)
class Segment:
    """A straight line of power; `level` where it is one that stays, and not a rise or fall."""

    seconds: float
    begin: float
    end: float


class Waveform:
    """Power as a chain of straight lines from a time on."""

    def __init__(self, start: float, segments: Iterable[Segment]) -> None:
        self.segments = list(segments)
        self.starts = list(accumulate((segment.seconds for segment in self.segments), initial=start))
        self._joules = list(accumulate((s.seconds * (s.begin + s.end) / 2 for s in self.segments), initial=0.0))

    def watts(self, at: float) -> float:
        place, passed = self._find(at)
        segment = self.segments[place]
        return segment.begin + (segment.end - segment.begin) * passed / segment.seconds

    def joules(self, begin: float, end: float) -> float:
        """Exactly, by the areas below the lines."""
        return self._until(end) - self._until(begin)

    def levels(self, begin: float, end: float) -> list[tuple[float, float]]:
        """When power stayed: runs of segments that differ by less than the energy calls one level, uncut."""
        alike = ONE_LEVEL * self.joules(begin, end) / (end - begin)
        found: list[tuple[float, float, float, float]] = []
        for segment, (start, stop) in zip(self.segments, pairwise(self.starts), strict=True):
            low, high = sorted((segment.begin, segment.end))
            if found and max(found[-1][3], high) - min(found[-1][2], low) <= alike:
                found[-1] = (found[-1][0], stop, min(found[-1][2], low), max(found[-1][3], high))
            else:
                found.append((start, stop, low, high))
        return [(start, stop) for start, stop, *_ in found[1:-1] if start < end and stop > begin]

    def _until(self, at: float) -> float:
        place, passed = self._find(at)
        return self._joules[place] + passed * (self.segments[place].begin + self.watts(at)) / 2

    def _find(self, at: float) -> tuple[int, float]:
        place = min(max(0, bisect_right(self.starts, at) - 1), len(self.segments) - 1)
        return place, at - self.starts[place]


def flat(seconds: float, watts: float) -> Segment:
    return Segment(seconds, watts, watts)


def until(seconds: float, draw: Callable[[], Iterable[Segment]]) -> list[Segment]:
    """As many draws as fill the time."""
    found: list[Segment] = []
    filled = 0.0
    while filled < seconds:
        more = list(draw())
        found += more
        filled += sum(segment.seconds for segment in more)
    return found


# ------------------------------------------------------------------------------------------------------------- meters
@dataclass
class Clock:
    """Simulated time; `sets` are the times at which the wall clock is set, and by how much."""

    now: float
    sets: list[tuple[float, float]] = field(default_factory=list)

    def wall(self) -> float:
        return WALL + self.now + sum(by for at, by in self.sets if at <= self.now)


@dataclass(frozen=True)
class Make:
    """What a meter is, and how far off this one happens to be."""

    accuracy: Accuracy
    gain: float
    offset_watts: float
    latency_seconds: float
    fails: float = 0.0  # share of the readings
    pause: tuple[float, float] | None = None  # when all fail
    averages_seconds: float = 0.0  # a new mean over so long, every so long
    counter_seconds: float | None = None  # how often its counter moves; 0: always; None: it has none
    own_clock: float | None = None  # by how much its clock is off; None: it has none
    noise_watts: float = 0.0


class SimulatedMeter(Meter):
    """Reads a waveform as a meter of its make does."""

    point = "dc_input"
    rails = total_rails = ("IN",)

    def __init__(self, wave: Waveform, make: Make, clock: Clock, chance: random.Random) -> None:
        self._wave, self._make, self._clock, self._chance = wave, make, clock, chance
        self.accuracy = (make.accuracy,)
        self.has_counters = make.counter_seconds is not None
        self.met: list[float] = []  # when it really looked

    def open(self) -> None:
        """Nothing is to be found."""

    def read(self) -> Reading:
        make, clock = self._make, self._clock
        latency = make.latency_seconds * self._chance.uniform(0.5, 1.5)
        at = clock.now + latency * self._chance.random()
        clock.now += latency
        if self._chance.random() < make.fails or (make.pause and make.pause[0] < at < make.pause[1]):
            raise MeterError("no answer")
        self.met.append(at)
        watts = self._seen(self._sensed(at) + self._chance.gauss(0, make.noise_watts))
        step = make.accuracy.step_watts
        if step:
            watts = round(watts / step) * step
        return Reading((watts,), self._counted(at), self._stamp(at))

    def _seen(self, watts: float) -> float:
        return watts * (1 + self._make.gain) + self._make.offset_watts

    def _sensed(self, at: float) -> float:
        over = self._make.averages_seconds
        if not over:
            return self._wave.watts(at)
        end = math.floor(at / over) * over
        return self._wave.joules(end - over, end) / over

    def _counted(self, at: float) -> tuple[float, ...] | None:
        every = self._make.counter_seconds
        if every is None:
            return None
        at = math.floor(at / every) * every if every else at
        begin = self._wave.starts[0]
        return (self._wave.joules(begin, at) * (1 + self._make.gain) + self._make.offset_watts * (at - begin),)

    def _stamp(self, at: float) -> float | None:
        return None if self._make.own_clock is None else WALL + at + self._make.own_clock


# -------------------------------------------------------------------------------------------------------------- cases
@dataclass(frozen=True)
class Case:
    """One waveform, the meter that reads it, and the window whose energy is asked for."""

    family: str
    wave: Waveform
    make: Make
    interval_seconds: float
    seconds: float
    edges: bool  # whether a sample is taken at either edge of the window, as an agent does at a job's
    sets: tuple[tuple[float, float], ...] = ()
    timing_seconds: float = 0.0

    @property
    def window(self) -> tuple[float, float]:
        return BEGIN, BEGIN + self.seconds

    @property
    def short_levels(self) -> list[tuple[float, float]]:
        """Levels of the power that are shorter than three intervals."""
        shortest = SHORTEST_FEATURE * self.interval_seconds
        return [(start, stop) for start, stop in self.wave.levels(*self.window) if stop - start < shortest]


@dataclass(frozen=True)
class Found:
    """What came of a case."""

    case: Case
    truth: float
    energy: Energy
    unseen: bool  # no sample met a level that is too short

    @property
    def told(self) -> bool:
        return self.energy.joules is not None

    @property
    def error(self) -> float:
        return abs((self.energy.joules or 0.0) - self.truth) / self.truth

    @property
    def covered(self) -> bool:
        return self.told and abs((self.energy.joules or 0.0) - self.truth) <= self.energy.half_width_joules

    @property
    def claims(self) -> bool:
        return self.energy.valid and (self.energy.claim or math.inf) <= CLAIM

    @property
    def counted(self) -> bool:
        """Whether a counter agrees that moves often enough to say so."""
        every = self.case.make.counter_seconds
        return every is not None and every <= UNRESOLVED * self.case.seconds and not self.energy.problems

    @property
    def false(self) -> bool:
        return self.claims and not self.counted and bool(self.case.short_levels)


def measure(case: Case, chance: random.Random, folder: Path) -> Found:
    """Through sampler, log, JSON and integration."""
    clock = Clock(BEGIN - AROUND * case.interval_seconds - chance.random() * case.interval_seconds, list(case.sets))
    meter = SimulatedMeter(case.wave, case.make, clock, chance)
    begin, end = case.window
    finish = end + AROUND * case.interval_seconds
    edges = [begin, end] if case.edges else []

    def wait(seconds: float) -> bool:
        due = clock.now + seconds + chance.expovariate(1 / 2e-4)  # a scheduler is late, never early
        while edges and clock.now <= edges[0] <= due:
            clock.now = edges.pop(0)
            sampler.sample()
        clock.now = max(clock.now, due)
        return clock.now > finish

    log = PowerLog(folder / "power", columns(meter))
    sampler = Sampler(
        meter,
        log,
        case.interval_seconds,
        clock=lambda: clock.now,
        wall=clock.wall,
        wait=wait,
        chance=chance.random,
    )
    sampler.interval_seconds = case.interval_seconds  # a meter faster than any that we have
    sampler.run()
    told = json.loads(json.dumps(sampler.trace(begin, end)))
    sampler.stop()
    trace = PowerTrace.from_json({**told, "timing_seconds": case.timing_seconds})
    energy = gross(trace, [(0.0, end - begin)])
    met = meter.met
    unseen = not any(start <= at <= stop for start, stop in case.short_levels for at in met)
    return Found(case, case.wave.joules(begin, end), energy, unseen)


class Draw:
    """Draws cases; `normal`: errors of meters are normal with 95 % inside the class, not uniform."""

    def __init__(self, chance: random.Random, *, normal: bool) -> None:
        self.chance, self.normal = chance, normal

    def case(self, family: str) -> Case:
        return {
            "constant": self.constant,
            "steps": self.steps,
            "ramps": self.ramps,
            "bursts": self.bursts,
            "phases": self.phases,
            "pulses": self.pulses,
            "flicker": self.flicker,
            "rare pulses": self.rare_pulses,
            "dropouts": self.dropouts,
            "clock set": self.clock_set,
            "coarse": self.coarse,
            "slow meter": self.slow_meter,
            "counter": self.counter,
        }[family]()

    def constant(self) -> Case:
        """One level; some with noise of the sensor."""
        make = replace(self._make(), noise_watts=self.chance.choice((0.0, 0.005, 0.05)))
        return self._case("constant", 0.1, lambda: [flat(1000, self.chance.uniform(2, 15))], make=make)

    def steps(self) -> Case:
        """Levels of half a second to eight seconds."""
        lengths = self.chance.choice(((0.5, 2.0), (1.0, 8.0)))
        return self._case("steps", 0.1, lambda: [flat(self.chance.uniform(*lengths), self.chance.uniform(2, 15))])

    def ramps(self) -> Case:
        """Rises, levels and falls."""

        def draw() -> list[Segment]:
            low, high = self.chance.uniform(2, 5), self.chance.uniform(6, 15)
            rise, stay, fall = (self.chance.uniform(0.2, 6) for _ in range(3))
            return [Segment(rise, low, high), flat(stay, high), Segment(fall, high, low)]

        return self._case("ramps", 0.1, draw)

    def bursts(self) -> Case:
        """Training: forward, backward, a pause for data; each step a little longer or shorter than the last."""
        return self._case("bursts", 0.1, self._training())

    def phases(self) -> Case:
        """A phase of 5 to 20 seconds that begins and ends with a jump of the power; no samples at its edges."""
        inside = until(self.chance.uniform(5, 20), self._training())
        seconds = sum(segment.seconds for segment in inside)
        before, after = (flat(100, self.chance.uniform(2, 5)) for _ in range(2))
        wave = Waveform(BEGIN - 100, [before, *inside, after])
        return Case("phases", wave, self._make(), 0.1, seconds, edges=False)

    def pulses(self) -> Case:
        """Pulses near the sampling rate, some exactly in step with it."""
        interval = 0.1
        period = interval * self.chance.choice((1.0, 2.0, 0.5, self.chance.uniform(0.3, 3)))
        share, wobble = self.chance.uniform(0.15, 0.85), self.chance.choice((0.0, 0.1))
        low, high = self.chance.uniform(2, 5), self.chance.uniform(6, 15)

        def draw() -> list[Segment]:
            length = period * (1 + wobble * self.chance.uniform(-1, 1))
            return [flat(share * length, high), flat((1 - share) * length, low)]

        return self._case("pulses", interval, draw)

    def flicker(self) -> Case:
        """Random levels that stay for one to three intervals in the mean."""
        mean = 0.1 * self.chance.uniform(1, 3)
        return self._case(
            "flicker", 0.1, lambda: [flat(self.chance.expovariate(1 / mean) + 1e-3, self.chance.uniform(2, 15))]
        )

    def rare_pulses(self) -> Case:
        """Short pulses, seconds apart."""
        length, apart = 0.1 * self.chance.uniform(0.3, 2.5), self.chance.uniform(0.5, 5)
        low, high = self.chance.uniform(2, 5), self.chance.uniform(6, 15)
        draw = self.chance.uniform
        return self._case(
            "rare pulses", 0.1, lambda: [flat(length * draw(0.8, 1.2), high), flat(apart * draw(0.5, 1.5), low)]
        )

    def dropouts(self) -> Case:
        """Training, with readings that fail, and some with a pause of the meter."""
        pause = None
        if self.chance.random() < 0.3:
            at = BEGIN + self.chance.uniform(5, 20)
            pause = (at, at + self.chance.uniform(0.4, 6))
        make = replace(self._make(), fails=self.chance.choice((0.005, 0.02, 0.1)), pause=pause)
        return self._case("dropouts", 0.1, self._training(), make=make)

    def clock_set(self) -> Case:
        """Training, while the wall clock is set; some with a meter that stamps by a clock of its own."""
        case = self._case("clock set", 0.1, self._training())
        sets = (
            (
                BEGIN + self.chance.uniform(0, 1) * case.seconds,
                self.chance.choice((-1, 1)) * self.chance.uniform(0.1, 3),
            ),
        )
        if self.chance.random() < 0.5:
            return replace(case, sets=sets)
        timing = self.chance.uniform(0.01, 0.3)
        make = replace(case.make, own_clock=timing * self.chance.uniform(-1, 1))
        chosen = sets if self.chance.random() < 0.5 else ()
        return replace(case, make=make, sets=chosen, timing_seconds=timing)

    def coarse(self) -> Case:
        """A step of the readings of 40 to 400 mW, on power that hardly moves, or on training."""
        accuracy = self._accuracy()._replace(step_watts=self.chance.choice((0.04, 0.1, 0.4)))
        draw = self.chance.choice((lambda: [flat(1000, self.chance.uniform(2, 15))], self._training()))
        return self._case("coarse", 0.1, draw, make=self._make(accuracy))

    def slow_meter(self) -> Case:
        """Means over a second or less, new every so often, of training or of pulses."""
        over = self.chance.choice((0.05, 0.3, 1.0))
        interval = self.chance.choice((0.1, 1.0))
        make = replace(self._make(self._accuracy()._replace(timing_seconds=1.5 * over)), averages_seconds=over)
        short = interval * self.chance.uniform(0.3, 3)
        pulses = lambda: [flat(short / 2, 10.0), flat(short / 2, 4.0)]  # noqa: E731
        return self._case("slow meter", interval, self.chance.choice((self._training(), pulses)), make=make)

    def counter(self) -> Case:
        """Any of the others through a meter that counts energy too, always or in jumps."""
        case = self.case(self.chance.choice(("steps", "bursts", "pulses", "flicker", "rare pulses", "dropouts")))
        make = replace(case.make, counter_seconds=self.chance.choice((0.0, 0.0, 0.5, 5.0)))
        return replace(case, family="counter", make=make)

    def _training(self) -> Callable[[], list[Segment]]:
        idle, forward, backward = self.chance.uniform(2, 5), self.chance.uniform(6, 10), self.chance.uniform(9, 15)
        lengths = [self.chance.uniform(*self.chance.choice(((0.1, 1.0), (0.5, 3.0)))) for _ in range(3)]

        def draw() -> list[Segment]:
            seconds = [length * self.chance.uniform(0.9, 1.1) for length in lengths]
            return [flat(length, watts) for length, watts in zip(seconds, (forward, backward, idle), strict=True)]

        return draw

    def _case(self, family: str, interval: float, draw: Callable[[], list[Segment]], make: Make | None = None) -> Case:
        seconds = self.chance.uniform(20, 100) * interval / 0.1
        around = (AROUND + 10) * interval
        wave = Waveform(BEGIN - around, until(seconds + 2 * around, draw))
        edges = self.chance.random() < 0.5
        return Case(family, wave, make or self._make(), interval, seconds, edges)

    def _accuracy(self) -> Accuracy:
        pick = self.chance.choice
        return Accuracy(pick((0.001, 0.005, 0.01, 0.02)), pick((0.0, 0.005, 0.02)), pick((0.0, 0.001, 0.01)))

    def _make(self, accuracy: Accuracy | None = None) -> Make:
        accuracy = accuracy or self._accuracy()
        gain, offset = self._error(accuracy.gain), self._error(accuracy.offset_watts)
        return Make(accuracy, gain, offset, latency_seconds=self.chance.uniform(0.0005, 0.01))

    def _error(self, half_width: float) -> float:
        return self.chance.gauss(0, half_width / 1.96) if self.normal else self.chance.uniform(-half_width, half_width)


FAMILIES = (
    "constant", "steps", "ramps", "bursts", "phases", "pulses", "flicker", "rare pulses", "dropouts", "clock set",
    "coarse", "slow meter", "counter",
)  # fmt: skip


def run(count: int, seed: int, *, families: tuple[str, ...] = FAMILIES, normal: bool = False) -> list[Found]:
    """So many waveforms, the families in turn; each from a seed of its own."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            chance = random.Random(f"{seed}/{number}")
            case = Draw(chance, normal=normal).case(families[number % len(families)])
            found.append(measure(case, chance, Path(folder)))
    return found


# ------------------------------------------------------------------------------------------------------------- report
def row(name: str, found: list[Found]) -> str:
    told = [one for one in found if one.told]
    valid = [one for one in told if one.energy.valid]
    errors = [one.error for one in told]
    widths = [one.energy.claim or 0.0 for one in told]
    false = [one for one in found if one.false]
    return (
        f"{name:12} {len(found):5} {_share(told, lambda one: one.covered):>8} "
        f"{_share(valid, lambda one: one.covered):>8} "
        f"{statistics.median(errors):8.2%} {max(errors):8.2%} {statistics.median(widths):10.2%} "
        f"{_share(found, lambda one: one.energy.valid):>6} {sum(one.claims for one in found):5} {len(false):6} "
        f"{sum(one.unseen for one in false):7}"
    )


def _share(found: list[Found], holds: Callable[[Found], bool]) -> str:
    return f"{sum(map(holds, found)) / len(found):.1%}" if found else "–"


def missed(found: list[Found]) -> list[str]:
    """The targets that were missed, in words."""
    problems = []
    covered = sum(one.covered for one in found) / len(found)
    if covered < COVERED:
        problems.append(f"{covered:.1%} of all intervals hold the truth; the target is {COVERED:.0%}")
    false = [one for one in found if one.false and not one.unseen]
    if false:
        problems.append(f"{len(false)} false claims of 2 %; the target is 0")
    right = [one.error for one in found if one.claims and not one.false]
    if right and statistics.median(right) > MEDIAN_ERROR:
        problems.append(
            f"the median error of right claims of 2 % is {statistics.median(right):.2%}; the target is 0.5 %"
        )
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--errors", choices=("uniform", "normal"), default="uniform")
    args = parser.parse_args()
    begun = time.monotonic()
    families = (args.family,) if args.family else FAMILIES
    found = run(args.count, args.seed, families=families, normal=args.errors == "normal")
    machine = describe_machine()
    print(f"{args.count} waveforms, seed {args.seed}, errors of meters {args.errors}; {time.monotonic() - begun:.0f} s "
          f"on {machine['cpu']}, {machine['cores']} cores")  # fmt: skip
    print("             count  covered                error                half-width\n"
          "                        all    valid   median    worst     median  valid   ≤2%  false  unseen")  # fmt: skip
    for family in families:
        print(row(family, [one for one in found if one.case.family == family]))
    print(row("all", found))
    right = [one.error for one in found if one.claims and not one.false]
    print(
        f"{len(right)} right claims of 2 % or better"
        + (f", median error {statistics.median(right):.2%}" if right else "")
    )
    problems = missed(found)
    for problem in problems:
        print(f"missed: {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
