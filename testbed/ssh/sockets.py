"""The bytes' way to an SSH server: a TCP connection, one that a jump host makes, or a command of the user's."""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable

from paramiko import Channel, SSHException, Transport
from paramiko.ssh_exception import ChannelException

from testbed.errors import DeviceError
from testbed.ssh.config import Target

# OpenSSH takes packets of 256 KiB at most; with 32 KiB, paramiko's default, a transfer takes a third longer.  A larger
# window than paramiko's 2 MiB makes it slower: what waits in its buffer is moved at every read.
PACKET_BYTES = 1 << 18
#: A connection on which nothing is acknowledged for as long is given up.
SILENCE_SECONDS = 20.0


def dial(device: str, target: Target, seconds: float) -> socket.socket:
    """A TCP connection to the first of its addresses that answers."""
    deadline = time.monotonic() + seconds
    errors: list[str] = []
    for family, kind, protocol, _, address in _look_up(device, target, seconds):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.1, deadline - time.monotonic()))
            if target.bind_address:
                sock.bind((target.bind_address, 0))
            sock.connect(address)
        except TimeoutError:
            errors.append(f"{address[0]} does not answer within {seconds:g} s")
        except OSError as error:
            errors.append(f"{address[0]}: {error.strerror}")
        else:
            _tune(sock)
            return sock
        sock.close()
    raise DeviceError(
        f"{device}: no connection to {target.where}: {', '.join(errors)}.  Is the machine on and on this network, and "
        "is sshd running at this port?"
    )


def _look_up(device: str, target: Target, seconds: float) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    """Its addresses; the system's resolver knows no time limit, so it works in a thread of its own."""
    answer: queue.SimpleQueue[Callable[[], list[tuple[int, int, int, str, tuple[str, int]]]]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(target.host, target.port, target.family, socket.SOCK_STREAM)
        except OSError as error:
            reason = error.strerror
            answer.put(lambda: _unknown_name(device, target, reason))
        except UnicodeError as error:  # "a..b", or a part of more than 63 letters: Python itself refuses it
            words = str(error.__cause__ or error)
            answer.put(lambda: _unknown_name(device, target, words))
        else:
            answer.put(lambda: found)  # type: ignore[arg-type,return-value]  # an address may have four parts

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=seconds)()
    except queue.Empty:
        return _unknown_name(device, target, f"no answer within {seconds:g} s")


def _unknown_name(device: str, target: Target, reason: str | None) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    raise DeviceError(
        f"{device}: the host name {target.host} cannot be resolved ({reason}); correct `host` in the inventory, or "
        f"give it a HostName in your SSH configuration"
    )


def _tune(sock: socket.socket) -> None:
    """No waiting to fill packets (44 ms for a small request otherwise), and no sending into the void for minutes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SILENCE_SECONDS))


class Through:
    """A channel of a jump host in the place of a socket: it may be closed though the jump host is lost already."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.send = channel.send
        self.recv = channel.recv
        self.settimeout = channel.settimeout

    @property
    def _closed(self) -> bool:  # paramiko looks at this
        return self._channel.closed

    def shutdown(self, how: int) -> None:
        self._channel.shutdown(how)

    def close(self) -> None:
        with contextlib.suppress(SSHException, EOFError, OSError):
            self._channel.close()


def through(device: str, jump: Target, transport: Transport, target: Target, seconds: float) -> Through:
    """A connection that the jump host makes."""
    try:
        channel = transport.open_channel(
            "direct-tcpip", (target.host, target.port), ("127.0.0.1", 0), max_packet_size=PACKET_BYTES, timeout=seconds
        )
    except ChannelException as error:
        raise DeviceError(
            f"{device}: the jump host {jump.alias} gives no connection to {target.where} ({error.text}); is the "
            "machine on, and does the jump host allow TCP forwarding?"
        ) from None
    except (SSHException, EOFError, OSError) as error:
        raise DeviceError(
            f"{device}: the jump host {jump.alias} gives no connection to {target.where} ({error})"
        ) from None
    return Through(channel)


class Proxy:
    """The user's ProxyCommand on a socket.  (paramiko's own class reads on for ever when the command has ended.)"""

    def __init__(self, command: str) -> None:
        self.socket, its = socket.socketpair()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the command
        with its:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command}"],
                stdin=its.fileno(),
                stdout=its.fileno(),
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is for the controller
            )

    def last_words(self) -> str | None:
        """How it ended, and its errors; None where it is still at work."""
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None
        self._errors.seek(0)
        said = self._errors.read(2000).decode(errors="replace").strip()
        return f" (exit code {self._process.returncode}{f': {said}' if said else ''})"

    def close(self) -> None:
        self.socket.close()
        self._process.terminate()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
