"""What may wait (to connect, to send blocks, to start an agent) is done in threads, and the loop is told when it is."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from traceback import extract_tb
from typing import Any, Generic, TypeVar, cast

from testbed.errors import DeviceError, TestbedError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer")

#: Devices that are asked at the same time; each is a connection and little else.
_SIDE_BY_SIDE = 16
_HANG_UP_SECONDS = 0.1


class Outcome(Generic[Answer]):
    """What an errand brought back: its answer, or the error that ended it."""

    def __init__(self, answer: Answer | None, error: TestbedError | None) -> None:
        self.error = error
        self._answer = answer

    @property
    def answer(self) -> Answer:
        """Raises the error of an errand that failed."""
        if self.error is not None:
            raise self.error
        return cast("Answer", self._answer)


class Errands:
    """A bounded pool of threads; `fileno` is readable when `take_in` has something to do."""

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="errand")
        self._under_way: set[Future[Any]] = set()
        self._done: SimpleQueue[tuple[Future[Any], Callable[[Outcome[Any]], None]]] = SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._telling = threading.Condition()  # a future is done before its thread has said so

    def fileno(self) -> int:
        return self._wake

    def send(self, work: Callable[[], Answer], then: Callable[[Outcome[Answer]], None]) -> None:
        """Do `work` in a thread; `then` is called by `take_in`, in the loop's own thread."""
        future = self._pool.submit(work)
        self._under_way.add(future)
        future.add_done_callback(lambda done: self._tell(done, then))

    def take_in(self) -> None:
        """Call what waits for errands that are done: all of it, though one of them raises."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with ExitStack() as calls:
            for future, then in reversed(list(self._finished())):  # it calls the last one first
                calls.callback(then, _outcome(future))

    def _finished(self) -> Iterator[tuple[Future[Any], Callable[[Outcome[Any]], None]]]:
        with suppress(Empty):
            while True:
                future, then = self._done.get_nowait()
                self._under_way.discard(future)
                yield future, then

    def wait(self, patience_seconds: float) -> bool:
        """Wait for what is under way, and leave it to `take_in`; whether all of it is done."""
        with self._telling:
            return self._telling.wait_for(lambda: self._done.qsize() == len(self._under_way), patience_seconds)

    def settle(self, patience_seconds: float) -> bool:
        """Wait for what is under way, and take it in; whether all of it is done."""
        self.wait(patience_seconds)
        self.take_in()
        return not self._under_way

    def close(self) -> None:
        """Take no more errands; those under way end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self.settle(0):  # else somebody may still write to it, when its number is another file's
            os.close(self._wake)

    def _tell(self, future: Future[Any], then: Callable[[Outcome[Any]], None]) -> None:
        with self._telling:
            self._done.put((future, then))
            os.eventfd_write(self._wake, 1)
            self._telling.notify_all()


def side_by_side(work: Callable[[Item], Answer], items: Iterable[Item], hang_up: Callable[[], None]) -> list[Answer]:
    """`work` of every item, many at once; the answers stand in the items' order.

    Ctrl-C begins nothing more, and ends what is under way: `hang_up` is called, from this thread, until all has ended,
    because a connection that was just being made was not there to be closed.
    """
    pool = ThreadPoolExecutor(_SIDE_BY_SIDE, thread_name_prefix="side-by-side")
    begun = _Begun()
    futures: list[Future[Answer]] = []
    try:
        futures += (pool.submit(begun.do, work, item) for item in items)
        wait(futures)
    except KeyboardInterrupt:  # perhaps in the middle of a submission, of which neither list nor pool knows yet
        begun.over = True
        pool.shutdown(wait=False, cancel_futures=True)
        while begun.any_left(_HANG_UP_SECONDS):
            hang_up()
        raise
    finally:
        pool.shutdown(wait=False)
    return [future.result() for future in futures]


class _Begun:
    """What has begun and has not ended, as the threads themselves know it; when it is `over`, nothing more begins."""

    def __init__(self) -> None:
        self.over = False
        self._changed = threading.Condition()
        self._count = 0

    def do(self, work: Callable[[Item], Answer], item: Item) -> Answer:
        self._add(1)
        try:
            if self.over:
                raise CancelledError
            return work(item)
        finally:
            self._add(-1)

    def any_left(self, patience_seconds: float) -> bool:
        """Whether something is still under way after that time."""
        with self._changed:
            return not self._changed.wait_for(lambda: not self._count, patience_seconds)

    def _add(self, change: int) -> None:
        with self._changed:
            self._count += change
            self._changed.notify_all()


def _outcome(future: Future[Any]) -> Outcome[Any]:
    try:
        return Outcome(future.result(), None)
    except TestbedError as error:
        return Outcome(None, error)
    except CancelledError:
        return Outcome(None, DeviceError("given up before it began, because the run is over"))
    except Exception as error:  # the top of the fan-out: failure is data, and costs one device
        logger.debug("an errand ended unexpectedly", exc_info=error)  # a user is told in one message
        return Outcome(None, DeviceError(f"unexpected {_named(error)}; a fault of the testbed, please report it"))


def _named(error: Exception) -> str:
    """Its type, where it came from, and what it says."""
    place = extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} ({Path(place.filename).name}:{place.lineno}): {error}"
