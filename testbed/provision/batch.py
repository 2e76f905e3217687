"""Commands of several changes in one round trip, each with its own exit code.

The commands of a change depend on each other: after one that fails, the rest of its change is left out.  The changes
do not: whatever happens to one, the next is made.
"""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.errors import DeviceError

if TYPE_CHECKING:
    from testbed.connection import Connection
    from testbed.provision.step import Change, Command

#: A command that may take longer than this travels alone, so that one can see what is being waited for.
_LONG_SECONDS = 120.0
_MAX_BYTES = 60 << 10  # of commands and their input in one script, which is one argument
_MARK = "\x1e"
#: What is made for everybody must be readable for everybody, whatever the user likes for files of their own.
_PRELUDE = "LC_ALL=C; PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin; export LC_ALL PATH; umask 022; cd /\n"
_ENDED = "ended() { printf '\\036%s %s\\n' $1 $2; return $2; }\n"


@dataclass(frozen=True)
class Batch:
    """Consecutive commands of one level of rights; each with the index of its change."""

    become: bool
    commands: tuple[tuple[int, Command], ...]

    @property
    def patience_seconds(self) -> float:
        return sum(command.patience_seconds for _, command in self.commands)


def batches(changes: Sequence[Change]) -> Iterator[Batch]:
    """The commands of the changes in their order, as few batches as rights, patience and length allow."""
    waiting: list[tuple[int, Command]] = []
    for index, command in ((i, each) for i, change in enumerate(changes) for each in change.commands):
        if waiting and not _together([each for _, each in waiting], command):
            yield Batch(waiting[0][1].become, tuple(waiting))
            waiting = []
        waiting.append((index, command))
    if waiting:
        yield Batch(waiting[0][1].become, tuple(waiting))


def _together(before: Sequence[Command], command: Command) -> bool:
    length = sum(len(each.data) + sum(map(len, each.argv)) for each in (*before, command))
    quick = all(each.patience_seconds <= _LONG_SECONDS for each in (*before, command))
    return before[-1].become == command.become and quick and length <= _MAX_BYTES


def run(connection: Connection, batch: Batch) -> dict[int, str]:
    """Run a batch; gives what went wrong, by the index of the change.

    Raises RightError when sudo is refused, DeviceError when the device is out of reach or a command has no end.
    """
    ran = connection.attempt(["sh", "-c", script_of(batch)], batch.patience_seconds, become=batch.become)
    answers = _answers(ran.output)
    if not answers:
        raise DeviceError(f"{connection.name}: {_last_line(ran.errors) or f'exit code {ran.exit_code}, no word'}")
    failures: dict[int, str] = {}
    for place, (index, command) in enumerate(batch.commands):
        code, said = answers.get(place, (None, ""))
        if code != 0 and index not in failures:
            ended = "no answer" if code is None else f"exit code {code}"
            failures[index] = f"{text_of(command)}: {ended}: {_last_line(said)}".rstrip(": ")
    return failures


def _answers(output: str) -> dict[int, tuple[int, str]]:
    """Exit code and words of every command that ran, by its place in the batch."""
    found: dict[int, tuple[int, str]] = {}
    begin = 0
    for mark in re.finditer(rf"{_MARK}(\d+) (\d+)\n", output):
        found[int(mark[1])] = (int(mark[2]), output[begin : mark.start()])
        begin = mark.end()
    return found


def script_of(batch: Batch) -> str:
    """The batch as one POSIX-sh script, which prints every command's place in the batch and its exit code."""
    changes = sorted({index for index, _ in batch.commands})
    groups = (
        " &&\n".join(_line(place, command) for place, (index, command) in enumerate(batch.commands) if index == change)
        for change in changes
    )
    return _PRELUDE + _ENDED + "\n".join(groups) + "\n"


def _line(place: int, command: Command) -> str:
    words = shlex.join(command.argv)
    if not command.data:
        run = f"{words} </dev/null 2>&1"
    else:
        run = f"echo {base64.b64encode(command.data).decode()} | base64 -d | {words} 2>&1"
    return f"{{ {run}; ended {place} $?; }}"


def text_of(command: Command) -> str:
    """A command as a person would type it; what goes to its input is shown beside it."""
    typed = ("sudo " if command.become else "") + shlex.join(command.argv)
    return f"printf %s {shlex.quote(command.data.decode())} | {typed}" if command.data else typed


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
