"""One command over one SSH channel: from the marker on, its input, its two outputs and how it ended."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from paramiko import Channel, SSHException
from paramiko.ssh_exception import ChannelException

from testbed.errors import DeviceError
from testbed.ssh.shell import MOST_BYTES, Script
from testbed.ssh.sockets import PACKET_BYTES
from testbed.ssh.transport import Link

if TYPE_CHECKING:
    from typing_extensions import Self

START_SECONDS = 30.0  # what the start-up files of a login shell may take
MOMENT_SECONDS, MOMENTS = 0.1, 20  # after which, and how often, a session that was refused is asked for again
CHUNK_BYTES = 1 << 20
MOST_NOISE_BYTES = 1 << 16  # kept, for a message
LEFT_OPEN_SECONDS = 0.5  # after a command has ended, its last output is here within that time


class Session:
    """A command that has begun; closing it hangs up on it."""

    def __init__(self, link: Link, script: Script, timeout_seconds: float) -> None:
        """Start it; raises DeviceError when the machine or its login shell does not let it begin."""
        self._link = link
        self._script = script
        self._ready = threading.Event()
        self._begun = b""  # what came with the marker
        self.errors = b""
        self.channel = self._open(timeout_seconds)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        try:
            self.channel.close()
        except (SSHException, EOFError, OSError):  # the connection is lost, and the channel with it
            return

    def _open(self, timeout_seconds: float) -> Channel:
        if len(self._script.line) > MOST_BYTES:
            raise DeviceError(
                f"{self._link.device}: a command of {len(self._script.line)} bytes is too long for one line; give it "
                "its data as input"
            )
        try:
            return _open_session(self._link, timeout_seconds)
        except ChannelException as error:
            raise DeviceError(
                f"{self._link.device}: {self._link.target.where} opens no further session ({error.text}); raise "
                "MaxSessions in its sshd_config"
            ) from None
        except (SSHException, EOFError, OSError) as error:
            raise self.lost(error) from None

    def _start(self) -> None:
        self.channel.in_buffer.set_event(self._ready)
        self.channel.in_stderr_buffer.set_event(self._ready)
        try:
            self.channel.exec_command(self._script.line)
        except (SSHException, EOFError, OSError) as error:
            raise self.lost(error) from None
        self._skip_noise()

    def _skip_noise(self) -> None:
        noise, marker = b"", self._script.started.line
        try:
            for piece in self.output(START_SECONDS):
                noise += piece
                before, found, after = noise.partition(marker)
                if found:
                    self._begun = after
                    return
                noise = before[-MOST_NOISE_BYTES:]
        except ConnectionError as error:
            raise self.lost(error) from None
        except TimeoutError:
            raise DeviceError(
                f"{self._link.device}: the login shell has not begun the command after {START_SECONDS:.0f} s; do its "
                "start-up files wait for something?"
            ) from None
        said = (noise + self.errors)[-500:].decode(errors="replace").strip()
        code = self._code_text()
        raise DeviceError(
            f"{self._link.device}: the login shell of {self._link.target.user} ended before the command began (exit "
            f"code {code}){f': {said}' if said else ''}.  May the account run commands (no nologin, no ForceCommand)?"
        )

    def output(self, patience_seconds: float | None = None, *, silence_seconds: float | None = None) -> Iterator[bytes]:
        """Standard output piece by piece, to its end; standard error gathers in `errors` meanwhile.

        Raises TimeoutError when the end has not come in time, or nothing for so long (None: it may take for ever);
        ConnectionError when a piece is lost with the connection: what is buffered behind it would leave a hole.
        What the command has left behind may hold its output open; that is not waited for.
        """
        if self._begun:
            begun, self._begun = self._begun, b""
            yield begun
        deadline = _deadline(patience_seconds or silence_seconds)
        while self._more(deadline):
            if self.channel.recv_stderr_ready():
                self.errors = (self.errors + _received(self.channel.recv_stderr))[-CHUNK_BYTES:]
            if self.channel.recv_ready() and (piece := _received(self.channel.recv)):
                yield piece
                deadline = _deadline(silence_seconds) if silence_seconds else deadline

    def _more(self, deadline: float) -> bool:
        """Wait for output of either kind; False at the end."""
        while not self._something():
            if self.channel.eof_received or self.channel.closed:
                return self._something()
            if self.channel.status_event.is_set():
                return self._ready.wait(LEFT_OPEN_SECONDS)
            if time.monotonic() >= deadline:
                raise TimeoutError
            self._ready.wait(min(LEFT_OPEN_SECONDS, max(0.0, deadline - time.monotonic())))
        return True

    def _something(self) -> bool:
        return self.channel.recv_ready() or self.channel.recv_stderr_ready()

    def send(self, data: bytes | memoryview) -> None:
        """Write to its input; raises ConnectionError when it does not take it any more, or the connection is lost."""
        try:
            self.channel.sendall(data)  # type: ignore[arg-type]  # the stubs do not know memoryview; send() slices it
        except TimeoutError:
            raise
        except (SSHException, EOFError, OSError) as error:
            raise ConnectionError(str(error)) from None

    def end_input(self) -> None:
        try:
            self.channel.shutdown_write()
        except (SSHException, EOFError, OSError):  # it has ended already
            return

    def exit_code(self, patience_seconds: float = 10.0) -> int:
        """How it ended; -1 by a signal.  Raises DeviceError when the connection is lost, TimeoutError when it lives."""
        if not self.channel.status_event.wait(patience_seconds):
            raise TimeoutError
        if self.channel.exit_status == -1:
            self._link.transport.join(0.1)  # it closes its channels a moment before it says that it is lost
            if not self._link.alive:
                raise self.lost()
        return self.channel.exit_status

    def _code_text(self) -> str:
        try:
            return str(self.exit_code())
        except TimeoutError:  # it has closed its output, and lives
            return "unknown"

    def errors_text(self) -> str:
        """What the command wrote on standard error; what the login shell wrote before is left out."""
        text = self.errors
        for marker in (self._script.started, self._script.root):
            if marker is not None and marker.line in text:
                text = text.partition(marker.line)[2]
        return text.decode(errors="replace")

    def lost(self, error: BaseException | None = None) -> DeviceError:
        reason = self._link.lost or (str(error) if error else "") or "it hung up"
        return DeviceError(
            f"{self._link.device}: the connection to {self._link.target.where} is lost: {reason}.  Is the machine on, "
            "and on this network?"
        )


def _received(receive: Callable[[int], bytes]) -> bytes:
    """A piece.  paramiko takes it out of its buffer, and loses it where it cannot tell the server so any more."""
    try:
        return receive(CHUNK_BYTES)
    except (SSHException, EOFError, OSError) as error:
        raise ConnectionError(str(error)) from None


def _open_session(link: Link, timeout_seconds: float) -> Channel:
    """A server counts a session that has just been closed for a moment longer (MaxSessions, 10 by default)."""
    for _ in range(MOMENTS):
        with contextlib.suppress(ChannelException):
            return link.transport.open_session(max_packet_size=PACKET_BYTES, timeout=timeout_seconds)
        time.sleep(MOMENT_SECONDS)
    return link.transport.open_session(max_packet_size=PACKET_BYTES, timeout=timeout_seconds)


def _deadline(seconds: float | None) -> float:
    return math.inf if seconds is None else time.monotonic() + seconds
