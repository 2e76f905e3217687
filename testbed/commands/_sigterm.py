"""SIGTERM, for commands that make what must not be left half made."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

TERMINATED = 143


@contextmanager
def tidied_on_sigterm() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does, so that it tidies up; the command's exit code is 143 then.

    `timeout` and batch systems may send it twice: the second one must not cut the tidying short.
    """
    came: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if not came:
            raise
        click.echo("testbed: terminated", err=True)
        raise click.exceptions.Exit(TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
