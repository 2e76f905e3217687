"""A device over SSH: one connection, over which commands run, files travel and channels stay open.

The way to it is the user's own SSH configuration (`testbed.ssh.config`), its host key is known beforehand
(`testbed.ssh.host_keys`), and nothing depends on the login shell (`testbed.ssh.shell`).
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from paramiko import SSHException

from testbed.connection import Ran
from testbed.errors import DeviceError, RightError
from testbed.inventory import Access
from testbed.ssh.channel import as_socket
from testbed.ssh.config import resolve
from testbed.ssh.session import Session
from testbed.ssh.shell import MERCY_SECONDS, Marker, Script, limited, limited_as_root, plain
from testbed.ssh.transfer import (
    BUSY,
    LACK,
    NO_FILE,
    RECEIVE,
    SEND,
    SHORT,
    WRONG,
    receive_file,
    script,
    send_file,
    sha256_of,
)
from testbed.ssh.transport import Link, log_in_to

ANSWER_SECONDS = 5.0  # after a command was ended on the device, the word of it is here within that time
LATE_CODES = (-1, 124, 128 + 9)  # how a command ends that was ended: by timeout's own code, or killed
MOST_SHOWN = 200
MOST_COMMANDS = 6  # at a time: sshd's MaxSessions is 10, and the channels that stay open count


def connect(device_name: str, access: Access, *, timeout_seconds: float = 10.0) -> SshConnection:
    """Log in; raises DeviceError (HostKeyError for a host key that is not known), with the way out.

    `timeout_seconds` bounds each wait on the way: name, connection, greeting, keys, login, and later each session's
    opening; a longer ConnectTimeout in the SSH configuration is for a slow board, and counts for all of them.
    """
    try:
        target = resolve(access)
    except DeviceError as error:
        raise DeviceError(f"{device_name}: {error}") from None
    timeout_seconds = max(timeout_seconds, target.connect_timeout_seconds or 0.0)
    try:
        link = log_in_to(device_name, target, timeout_seconds)
    except (OSError, EOFError, SSHException) as error:
        raise DeviceError(
            f"{device_name}: connecting to {target.where} broke off: {error or type(error).__name__}.  Is the machine "
            "on, and on this network?  Try again"
        ) from None
    return SshConnection(device_name, access, link, timeout_seconds)


class SshConnection:
    """The verbs of `testbed.connection.Connection`; any thread may use them, at the same time."""

    def __init__(self, name: str, access: Access, link: Link, timeout_seconds: float) -> None:
        self.name = name
        self.access = access
        self._link = link
        self._timeout_seconds = timeout_seconds
        self._turns = threading.BoundedSemaphore(MOST_COMMANDS)
        self._targets: dict[str, threading.Lock] = {}

    @property
    def alive(self) -> bool:
        return self._link.alive

    def run(
        self, command: Sequence[str], patience_seconds: float = 60.0, *, data: bytes = b"", become: bool = False
    ) -> str:
        ran = self.attempt(command, patience_seconds, data=data, become=become)
        if ran.exit_code != 0:
            said = (ran.errors.strip() or ran.output.strip())[-2000:]
            ended = f"exit code {ran.exit_code}" if ran.exit_code > 0 else "killed by a signal"
            raise DeviceError(f"{self.name}: {_shown(command)}: {ended}{f': {said}' if said else ''}")
        return ran.output

    def attempt(
        self, command: Sequence[str], patience_seconds: float = 60.0, *, data: bytes = b"", become: bool = False
    ) -> Ran:
        line = (
            limited_as_root(command, patience_seconds, sudo=self.access.become)
            if become
            else limited(command, patience_seconds)
        )
        with self._turns, self._session(line) as session:
            return self._converse(session, command, patience_seconds, data, line.root)

    def missing(self, paths: Iterable[Path]) -> list[Path]:
        by_text = {str(path): path for path in paths}
        if any("\n" in text for text in by_text):
            raise DeviceError(f"{self.name}: a path with a line break in it cannot be looked for")
        asked = "".join(f"{text}\n" for text in by_text).encode(errors="surrogateescape")
        return [by_text[text] for text in self.run(script(LACK), data=asked).splitlines()] if by_text else []

    def put(self, source: Path, target: Path) -> int:
        try:
            size, sha256 = source.stat().st_size, sha256_of(source)
        except OSError as error:
            raise DeviceError(f"{source} cannot be read: {error.strerror}") from None
        with self._targets.setdefault(str(target), threading.Lock()):
            sent, code, said = self._put_once(source, target, size, sha256)
            if code == WRONG:  # what lay there from an earlier transfer was not what it should have been
                again, code, said = self._put_once(source, target, size, sha256)
                sent += again
        if code != 0:
            raise DeviceError(f"{self.name}: {target} could not be put there: {_why(code, said)}")
        return sent

    def _put_once(self, source: Path, target: Path, size: int, sha256: str) -> tuple[int, int, str]:
        with self._turns, self._session(plain(script(RECEIVE, target, size, sha256))) as session:
            try:
                return *send_file(session, source), session.errors_text().strip()
            except ConnectionError as error:
                raise session.lost(error) from None
            except TimeoutError:
                raise DeviceError(
                    f"{self.name}: {target} could not be put there: the transfer does not move; what has arrived is "
                    "kept, try again"
                ) from None

    def get(self, source: Path, target: Path) -> None:
        for _ in range(2):  # a second time if the file changed meanwhile
            with self._turns, self._session(plain(script(SEND, source))) as session:
                try:
                    code = receive_file(session, target, f"{self.name} {source}")
                except ConnectionError as error:
                    raise session.lost(error) from None
                except TimeoutError:
                    raise DeviceError(
                        f"{self.name}: {source} could not be fetched: the transfer does not move; what has arrived is "
                        "kept, try again"
                    ) from None
                said = session.errors_text().strip()
            if code != WRONG:
                break
        if code != 0:
            raise DeviceError(f"{self.name}: {source} could not be fetched: {_why(code, said)}")

    def open_channel(self, command: Sequence[str]) -> socket.socket:
        return as_socket(self._session(plain(command)), self.name)

    def close(self) -> None:
        self._link.close()

    def _session(self, line: Script) -> Session:
        return Session(self._link, line, self._timeout_seconds)

    def _converse(
        self, session: Session, command: Sequence[str], patience_seconds: float, data: bytes, root: Marker | None
    ) -> Ran:
        """Input in a thread of its own, because a command may write before it has read everything."""
        feed = threading.Thread(target=_feed, args=(session, data), name=f"ssh-input-{self.name}", daemon=True)
        begun = time.monotonic()
        feed.start()
        try:
            output = b"".join(session.output(patience_seconds + MERCY_SECONDS + ANSWER_SECONDS))
            code = session.exit_code(ANSWER_SECONDS)
        except ConnectionError as error:
            raise session.lost(error) from None
        except TimeoutError:
            raise DeviceError(
                f"{self.name}: {_shown(command)}: no end after {patience_seconds:g} s, and no word whether the "
                "device has ended it"
            ) from None
        if root is not None:
            output = self._as_root(output, root, command, session)
        if code in LATE_CODES and time.monotonic() - begun >= patience_seconds:
            raise DeviceError(
                f"{self.name}: {_shown(command)}: no end after {patience_seconds:g} s; it was ended there"
            )
        return Ran(code, output.decode(errors="replace"), session.errors_text())

    def _as_root(self, output: bytes, root: Marker, command: Sequence[str], session: Session) -> bytes:
        """What came after root's marker; raises RightError when it never came."""
        _, marker, after = output.partition(root.line)
        if marker:
            return after
        if not self.access.become:
            raise RightError(
                f"{self.name}: `{_shown(command)}` needs root, and the inventory says `become: false`; run it there "
                "by hand, or take that line out"
            )
        said = session.errors_text().strip().removeprefix("sudo: ")
        raise RightError(
            f"{self.name}: `{_shown(command)}` needs root, and sudo refuses{f' ({said})' if said else ''}; allow the "
            "login user to run it without a password (sudo visudo -f /etc/sudoers.d/testbed), or run it by hand"
        )


def _shown(command: Sequence[str]) -> str:
    """For a message; a script is told by its beginning."""
    text = shlex.join(command)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def _feed(session: Session, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # it ended without reading it all; how, its exit code says
        session.send(memoryview(data))
    session.end_input()


def _why(code: int, said: str) -> str:
    """What an exit code of the transfer scripts means."""
    meanings = {
        SHORT: "the transfer broke off; what has arrived is kept, try again",
        WRONG: "what arrived is not what was sent, twice; is the disk sound, or does the file change?",
        BUSY: "another transfer of the same file is under way",
        NO_FILE: "there is no such file",
    }
    return said or meanings.get(code, f"exit code {code}")
