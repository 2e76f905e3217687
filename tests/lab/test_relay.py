from random import Random

import pytest

from testbed.lab import relay
from testbed.lab.link import LinkShape
from testbed.lab.relay import DelayLine


def line(seed="seed", **shape):
    return DelayLine(LinkShape(**shape), Random(seed))


def test_frames_come_out_in_order_and_not_before_their_time():
    delayed = line(delay_seconds=0.05)
    delayed.put(b"one", now=10.00)
    delayed.put(b"two", now=10.02)
    assert delayed.next_at == pytest.approx(10.05)
    assert delayed.due(10.04) == []
    assert delayed.due(10.06) == [b"one"]
    assert delayed.next_at == pytest.approx(10.07)
    assert delayed.due(11.0) == [b"two"]
    assert delayed.next_at is None


def test_without_delay_frames_are_due_at_once_and_in_order():
    plain = line()
    for number in range(3):
        plain.put(bytes([number]), now=1.0)
    assert plain.due(1.0) == [b"\0", b"\1", b"\2"]


def test_a_share_is_lost_the_same_ones_for_the_same_seed():
    def survivors(seed):
        lossy = line(seed, loss=0.1)
        for number in range(5000):
            lossy.put(number.to_bytes(2, "big"), now=0.0)
        return lossy.due(0.0)

    assert survivors("a") == survivors("a") != survivors("b")
    assert 4300 < len(survivors("a")) < 4700
    assert survivors("a") == sorted(survivors("a"))


def test_a_full_queue_drops_what_comes_then(monkeypatch):
    monkeypatch.setattr(relay, "MOST_FRAMES", 2)
    delayed = line(delay_seconds=1.0)
    for frame in (b"1", b"2", b"3"):
        delayed.put(frame, now=0.0)
    assert delayed.due(2.0) == [b"1", b"2"]
