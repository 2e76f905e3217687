"""A slow link by a clock of its own: nothing passes before its time, and nobody saves up."""

from testbed.node.pace import Pace


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def pass_all(pace, clock, count):
    """Send so many bytes as soon as they may pass; when the last one did, after the beginning."""
    begun = clock.now
    pace.begin()
    while count:
        granted = pace.grant(count)
        assert granted <= count
        pace.took(granted)
        count -= granted
        if not granted:
            assert pace.due > clock.now
            clock.now = pace.due
    pace.end()
    return clock.now - begun


def test_bytes_take_their_time_and_the_delay_comes_once():
    clock = Clock()
    pace = Pace(1000.0, 0.5, clock)
    assert 10.499 < pass_all(pace, clock, 10_000) < 10.5 + 0.1
    told = pace.told("up")
    assert told["up_bytes"] == 10_000
    assert 10.499 < told["up_seconds"] < 10.6


def test_a_silence_saves_nothing_up():
    clock = Clock()
    pace = Pace(1000.0, 0.0, clock)
    pass_all(pace, clock, 100)
    clock.now += 3600
    assert pass_all(pace, clock, 1000) > 0.999


def test_whoever_comes_late_may_make_up_for_a_moment_and_no_more():
    clock = Clock()
    pace = Pace(1000.0, 0.0, clock)
    pace.begin()
    clock.now += 60
    assert pace.grant(10_000) == 100  # two pieces of a twentieth of a second


def test_a_very_slow_link_lets_single_bytes_pass():
    clock = Clock()
    assert 7.99 < pass_all(Pace(1.0, 0.0, clock), clock, 8) < 8.1


def test_what_follows_at_once_has_no_delay_of_its_own():
    clock = Clock()
    pace = Pace(1000.0, 0.5, clock)
    pace.begin()
    clock.now = pace.due + 0.06
    assert pace.grant(50) == 50
    pace.took(50)
    pace.begin()
    clock.now += 0.06
    assert pace.grant(50) == 50


def test_without_a_slow_link_there_is_no_pace():
    assert Pace.of({"straggler": {"slowdown": 3}}) is None
