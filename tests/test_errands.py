"""What may wait is done in threads."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from testbed.errands import Errands, side_by_side
from testbed.errors import DeviceError


def test_no_thread_writes_to_the_descriptor_after_it_was_closed(monkeypatch):
    """Its number may be another file's by then, which would get eight bytes that are none of its own."""
    sent, writing, go_on, order = threading.Event(), threading.Event(), threading.Event(), []
    write, close = os.eventfd_write, os.close

    def slow_write(fd, value):
        writing.set()
        go_on.wait(30)
        order.append("written")
        write(fd, value)

    errands = Errands(1)
    monkeypatch.setattr(os, "eventfd_write", slow_write)
    errands.send(lambda: sent.wait(30), lambda outcome: order.append("taken in"))
    sent.set()
    writing.wait(30)
    errands.take_in()
    monkeypatch.setattr(os, "close", lambda fd: (order.append("closed"), close(fd)))
    closing = threading.Thread(target=errands.close)
    closing.start()
    go_on.set()
    closing.join()
    assert order == ["taken in", "written", "closed"]


def test_what_was_waited_for_is_there_to_be_taken_in():
    """A future is done before its thread has said so: a device that was let go of was told as one that was not."""
    sent, done, go_on, told = threading.Event(), threading.Event(), threading.Event(), []

    class Slow(Errands):
        def _tell(self, *told):
            done.set()
            go_on.wait(30)
            super()._tell(*told)

    errands = Slow(1)
    errands.send(lambda: sent.wait(30), lambda outcome: told.append(outcome.answer))
    sent.set()
    done.wait(30)
    assert not errands.wait(0)
    go_on.set()
    assert errands.wait(30)
    errands.take_in()
    assert told == [True]
    errands.close()


def test_an_unexpected_error_costs_its_own_errand_and_no_other():
    errands, outcomes = Errands(1), []
    errands.send(lambda: {}["nothing"], outcomes.append)
    errands.send(lambda: "done", outcomes.append)
    assert errands.settle(30)
    errands.close()
    assert isinstance(outcomes[0].error, DeviceError)
    assert "KeyError (test_errands.py:" in str(outcomes[0].error)
    assert outcomes[1].answer == "done"


def test_everybody_is_told_though_somebody_raises():
    def refuse(outcome):
        raise RuntimeError(outcome.answer)

    errands, told = Errands(1), []
    for then in (refuse, told.append):
        errands.send(lambda: "done", then)
    errands.wait(30)
    with pytest.raises(RuntimeError, match="done"):
        errands.take_in()
    assert [outcome.answer for outcome in told] == ["done"]
    errands.close()


def test_answers_stand_in_the_order_of_what_was_asked():
    assert side_by_side(lambda number: -number, range(40), lambda: None) == [-number for number in range(40)]


@pytest.mark.parametrize("again", range(10))
def test_ctrl_c_hangs_up_and_begins_nothing_more(again):
    """Also what was connecting when it came, and was not there yet to be hung up on; wherever it hits a submission."""
    ended, begun, over = threading.Event(), [], []

    def work(number):
        begun.append(number)
        if len(begun) == 16:  # as many as go side by side
            os.kill(os.getpid(), signal.SIGINT)
        ended.wait()
        over.append(number)

    def hang_up():
        over.append("hung up")
        if over.count("hung up") == 2:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        side_by_side(work, range(40), hang_up)
    assert len(begun) == 16
    assert sorted(each for each in over if each != "hung up") == sorted(begun)
