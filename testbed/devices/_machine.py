"""The machine that a node is on: the verbs of `testbed.node.host`, called here or over a connection."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from testbed.connection import LocalConnection
from testbed.errors import BoardError, DeviceError, DiskError
from testbed.node import attach, host, landing

if TYPE_CHECKING:
    import socket

    from testbed.connection import Connection

_VERB_SECONDS = 90.0
#: Our code is looked for where it is known to be by its hash, and nowhere else.
_BOOTSTRAP = """\
import os, sys
code = os.path.expanduser(sys.argv[1])
if not os.path.isdir(code):
    print('{"lacks": "code"}')
    sys.exit()
sys.path.insert(0, code)
from testbed.node.host import main
sys.exit(main(sys.argv[2]))
"""
#: How `cat` and `mv` of a device say it, whose locale is C.
_DISK_FULL = ("No space left on device", "Disk quota exceeded")
_NOT_FOUND = 127  # what a shell says when there is no such program


class CodeMissingError(DeviceError):
    """Our code is not on the device yet."""


class Machine(Protocol):
    """Where verbs are done and files lie; paths may begin with "~/"."""

    @property
    def connected(self) -> bool:
        """Whether there is contact, as far as is known."""

    def connect(self) -> None:
        """Be in contact; raises DeviceError or one of its kinds."""

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Do a verb of `testbed.node.host` there; raises its error, or CodeMissingError."""

    def ask_early(self, verb: str, **arguments: Any) -> Any:
        """Do a verb of `testbed.node.landing`, which needs none of our code there."""

    def ask_text(self, text: str, verb: str, limit_seconds: float, **arguments: Any) -> Any:
        """Do a verb of a program that is given as its text."""

    def run_text(self, text: str, *words: str) -> socket.socket:
        """A channel to such a program, as long as it runs."""

    def attach(self, spool: str) -> socket.socket:
        """A channel to the agent of a spool; raises OSError where it is known at once that there is none."""

    def missing(self, paths: Iterable[str]) -> list[str]:
        """Those of the paths that lead to nothing; needs neither our code nor an interpreter."""

    def put(self, source: Path, target: str) -> int:
        """Copy a file there, under a name that says its content; the bytes that travelled."""

    def close(self) -> None:
        """Hang up; the next verb connects again."""


class ThisMachine:
    """The controller's own: verbs are functions, content is linked, the socket is at hand."""

    def __init__(self) -> None:
        self._connection = LocalConnection()

    @property
    def connected(self) -> bool:
        return True

    def connect(self) -> None:
        pass

    def ask(self, verb: str, **arguments: Any) -> Any:
        try:
            return host.VERBS[verb](**arguments)
        except OSError as error:
            raise host.in_words(error) from None

    ask_early = ask

    def ask_text(self, text: str, verb: str, limit_seconds: float, **arguments: Any) -> Any:
        raise NotImplementedError("content of this machine needs no other way")

    def run_text(self, text: str, *words: str) -> socket.socket:
        return self._connection.open_channel([sys.executable, "-I", "-S", "-c", text, *words])

    def attach(self, spool: str) -> socket.socket:
        return host.attach(Path(spool))

    def missing(self, paths: Iterable[str]) -> list[str]:
        return [str(path) for path in self._connection.missing(map(Path, paths))]

    def put(self, source: Path, target: str) -> int:
        """A hard link where that is possible: content is never changed in place."""
        try:
            os.link(source, target)
        except FileExistsError:
            return 0
        except OSError:  # another file system
            return self._connection.put(source, Path(target))
        return source.stat().st_size

    def close(self) -> None:
        self._connection.close()


class OtherMachine:
    """One that is reached over a connection, with an interpreter and, once it was sent, our code.

    board: what its firmware calls it; every verb is refused by another one (None: any will do).
    """

    def __init__(
        self, name: str, connect: Callable[[], Connection], python: str, code: str, board: str | None = None
    ) -> None:
        self.name = name
        self._board = board
        self._connect = connect
        self._python = python
        self._code = code
        self._connection: Connection | None = None
        self._connecting = threading.Lock()  # devices of a site come through one of them, in threads of their own

    @property
    def connection(self) -> Connection:
        """The one that stands, or a new one where it has broken: a device that was away for a while comes back."""
        with self._connecting:
            found = self._connection
            if found is None or not found.alive:
                self.close()
                found = self._connection = self._connect()
            return found

    @property
    def connected(self) -> bool:
        return self._connection is not None and self._connection.alive

    def connect(self) -> None:
        _ = self.connection

    def ask(self, verb: str, **arguments: Any) -> Any:
        said = self._said([_BOOTSTRAP, self._code, verb], {"board": self._board, **arguments}, _VERB_SECONDS)
        if "lacks" in said:
            raise CodeMissingError(f"device {self.name}: our code is not there yet")
        return self._answer(said)

    def ask_early(self, verb: str, **arguments: Any) -> Any:
        text = Path(landing.__file__).read_text(encoding="utf-8")
        return self.ask_text(text, verb, _VERB_SECONDS, board=self._board, **arguments)

    def ask_text(self, text: str, verb: str, limit_seconds: float, **arguments: Any) -> Any:
        return self._answer(self._said([text, verb], arguments, limit_seconds))

    def run_text(self, text: str, *words: str) -> socket.socket:
        return self.connection.open_channel([self._python, "-I", "-S", "-c", text, *words])

    def attach(self, spool: str) -> socket.socket:
        script = f"{self._code}/{'/'.join(attach.__name__.split('.'))}.py"
        return self.connection.open_channel([self._python, "-I", "-S", script, spool])

    def missing(self, paths: Iterable[str]) -> list[str]:
        return [str(path) for path in self.connection.missing(map(Path, paths))]

    def put(self, source: Path, target: str) -> int:
        try:
            return self.connection.put(source, Path(target))
        except DeviceError as error:
            full = any(words in str(error) for words in _DISK_FULL)
            raise (DiskError if full else type(error))(str(error)) from None

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _said(self, words: list[str], arguments: Mapping[str, Any], limit_seconds: float) -> dict[str, Any]:
        command = [self._python, "-I", "-S", "-c", *words]
        ran = self.connection.attempt(command, limit_seconds, data=json.dumps(arguments).encode())
        try:
            said = json.loads(ran.output.splitlines()[-1])
        except (ValueError, IndexError):
            said = None
        if isinstance(said, dict):
            return said
        if ran.exit_code == _NOT_FOUND:
            raise DeviceError(
                f"device {self.name}: there is no {self._python}; make it ready with: "
                f"testbed provision --only {self.name}"
            )
        told = (ran.errors.strip() or ran.output.strip()).splitlines()[-1:]
        raise DeviceError(f"device {self.name}: {self._python} ended with {ran.exit_code}: {''.join(told)}")

    def _answer(self, said: Mapping[str, Any]) -> Any:
        if "error" in said:
            raise host.typed(said.get("kind"), f"device {self.name}: {said['error']}")
        if "answer" not in said:
            raise BoardError(
                f"device {self.name}: behind its address is {said['board'] or 'no board that says its name'}, and "
                f"another one was made ready; mend the address, or: testbed provision --only {self.name}"
            )
        return said["answer"]
