"""An SSH connection up to the point where somebody is logged in: jump hosts, host keys, keep-alive.

Every wait has an end.  A host key that is not known ends the connection before anybody logs in.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time
from dataclasses import dataclass, field

from paramiko import SSHException, Transport
from paramiko.common import cMSG_GLOBAL_REQUEST
from paramiko.message import Message
from paramiko.packet import Packetizer
from paramiko.ssh_exception import IncompatiblePeer

from testbed.errors import DeviceError
from testbed.ssh import host_keys
from testbed.ssh.config import KEY_TYPES, Target
from testbed.ssh.host_keys import HostKey
from testbed.ssh.keys import log_in
from testbed.ssh.sockets import SILENCE_SECONDS, Proxy, Through, dial, through

# Where the user has not set ServerAliveInterval and ServerAliveCountMax.
KEEP_ALIVE_COUNT = 4  # hang up when as many …
KEEP_ALIVE_SECONDS = SILENCE_SECONDS / KEEP_ALIVE_COUNT  # … requests for a sign of life were not answered
# An sshd drops, at random, who comes while 10 others have not logged in yet (MaxStartups).
MOST_LOGINS = 4  # at a time at one server
PAUSE_SECONDS = (0.3, 1.2)  # before a server that has hung up without a greeting is tried once more
#: The machines on the way to a server, and it → who may log in there now.
_logins: dict[tuple[tuple[str, int], ...], threading.BoundedSemaphore] = {}
# Its thread would print tracebacks on standard error where no handler is set; all of it reaches us as exceptions, too.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


class Packets(Packetizer):
    """Knows when something was last heard, and changes keys as rarely as OpenSSH does with AES (RFC 4344, 3.2)."""

    REKEY_BYTES = 1 << 34
    REKEY_PACKETS = 1 << 31

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.heard = time.monotonic()

    def read_message(self) -> tuple[int, Message]:
        message = super().read_message()
        self.heard = time.monotonic()
        return message


@dataclass
class Link:
    """A transport, and what it goes through: a jump host's link, a proxy command."""

    device: str
    target: Target
    transport: Transport
    before: Link | None = None
    proxy: Proxy | None = None
    lost: str | None = None  # why it was hung up
    _hung_up: threading.Event = field(default_factory=threading.Event)

    @property
    def alive(self) -> bool:
        return self.transport.is_active()

    def close(self) -> None:
        self._hung_up.set()
        self._hang_up()
        if self.proxy is not None:
            self.proxy.close()
        if self.before is not None:
            self.before.close()

    def _hang_up(self) -> None:
        """A socket that is only closed may live on for seconds, while paramiko's thread waits for it."""
        with contextlib.suppress(OSError, EOFError, SSHException):
            self.transport.sock.shutdown(socket.SHUT_RDWR)
        self.transport.packetizer.complete_handshake()  # stops its timer, which would hold up the interpreter's end
        self.transport.close()
        self.transport.sock.close()

    def watch(self) -> None:
        """Ask for signs of life from now on, and hang up when there are none."""
        seconds = self.target.keep_alive_seconds or KEEP_ALIVE_SECONDS
        count = self.target.keep_alive_count if self.target.keep_alive_seconds else KEEP_ALIVE_COUNT
        self.transport.packetizer.set_keepalive(seconds, lambda: _ask_for_life(self.transport))
        threading.Thread(
            target=self._watch, args=(seconds * count,), name=f"ssh-watch-{self.device}", daemon=True
        ).start()

    def _watch(self, patience_seconds: float) -> None:
        while not self._hung_up.wait(min(1.0, patience_seconds / 4)) and self.alive:
            if time.monotonic() - _packets(self.transport).heard > patience_seconds:
                self.lost = f"it has not answered for {patience_seconds:.0f} s"
                self._hang_up()


def _packets(transport: Transport) -> Packets:
    packets = transport.packetizer
    assert isinstance(packets, Packets)
    return packets


def _ask_for_life(transport: Transport) -> None:
    """A global request that wants a reply; every server answers one that it does not know, with a refusal.

    (paramiko's own keep-alive wants none, so it never notices a server that stands still.)  It runs in the
    transport's thread, which must not wait for the end of a key exchange that it is to carry out itself.
    """
    if not transport.clear_to_send.is_set():
        return
    request = Message()
    request.add_byte(cMSG_GLOBAL_REQUEST)
    request.add_string("keepalive@openssh.com")
    request.add_boolean(True)
    transport._send_user_message(request)  # type: ignore[attr-defined]  # noqa: SLF001 - no public call asks for a reply


class NoCommonAlgorithmError(DeviceError):
    """A server that has none of the algorithms, key types included, that were offered to it."""


class NoGreetingError(DeviceError):
    """A server that hung up without a greeting; it may only have had too many callers at once."""


def log_in_to(device: str, target: Target, timeout_seconds: float) -> Link:
    """Connect, check the host key and log in, at every machine on the way; raises DeviceError."""
    before = log_in_to(device, target.jump, timeout_seconds) if target.jump else None
    try:
        return log_in_behind(before, device, target, timeout_seconds)
    except BaseException:
        if before is not None:
            before.close()
        raise


def log_in_behind(before: Link | None, device: str, target: Target, timeout_seconds: float) -> Link:
    """The same for one machine, when the way to it is there; closing it closes the way, too."""
    way = tuple((hop.host, hop.port) for hop in target.path)
    with _logins.setdefault(way, threading.BoundedSemaphore(MOST_LOGINS)):
        link = _logged_in(before, device, target, timeout_seconds)
    link.before = before
    link.watch()
    return link


def _logged_in(before: Link | None, device: str, target: Target, timeout_seconds: float) -> Link:
    link = _greeted(before, device, target, timeout_seconds)
    try:
        host_keys.check(device, target, host_key(link.transport))
        log_in(device, link.transport, target)
    except BaseException:
        link.close()
        raise
    return link


def _greeted(before: Link | None, device: str, target: Target, timeout_seconds: float) -> Link:
    """`shake_hands`, a second time where the server hung up at once."""
    try:
        return shake_hands(before, device, target, timeout_seconds)
    except NoGreetingError:
        time.sleep(random.uniform(*PAUSE_SECONDS))  # those who were dropped together come back apart
    try:
        return shake_hands(before, device, target, timeout_seconds)
    except NoGreetingError as error:  # for good: a device that is out of reach like any other
        raise DeviceError(str(error)) from None


def host_key(transport: Transport) -> HostKey:
    key = transport.get_remote_server_key()
    return HostKey(key.get_name(), key.asbytes())


def shake_hands(
    before: Link | None,
    device: str,
    target: Target,
    timeout_seconds: float,
    key_types: tuple[str, ...] | None = None,
) -> Link:
    """Connect as far as the host key, which is not checked here; closing it leaves the way to it open.

    Raises NoCommonAlgorithmError where the server has no key of the types that are asked for.
    """
    seconds = min(timeout_seconds, target.connect_timeout_seconds or timeout_seconds)
    proxy: Proxy | None = None
    sock: socket.socket | Through
    if before is not None:
        sock = through(device, before.target, before.transport, target, seconds)
    elif target.proxy_command:
        proxy = Proxy(target.proxy_command)
        sock = proxy.socket
    else:
        sock = dial(device, target, seconds)
    link = Link(device, target, _transport(sock, target, seconds, key_types), proxy=proxy)
    try:
        _negotiate(link, seconds)
    except BaseException:
        link.close()
        raise
    return link


def _transport(
    sock: socket.socket | Through, target: Target, seconds: float, key_types: tuple[str, ...] | None = None
) -> Transport:
    disabled = {"pubkeys": [name for name in KEY_TYPES if name not in target.algorithms.public_keys]}
    transport = Transport(sock, packetizer_class=Packets, disabled_algorithms=disabled)  # type: ignore[arg-type]  # Through
    transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = seconds
    transport.channel_timeout = seconds
    transport.daemon = True
    options = transport.get_security_options()
    options.ciphers = target.algorithms.ciphers
    options.digests = target.algorithms.macs
    options.kex = [name for name in target.algorithms.key_exchanges if name in options.kex]
    options.key_types = key_types or _known_first(target)
    transport.use_compression(target.compression)
    return transport


def _known_first(target: Target) -> tuple[str, ...]:
    """So that a server with keys of several types shows the one that is known (as ssh does)."""
    known = {entry.key.kind for entry in host_keys.known_keys(target)}
    if "ssh-rsa" in known:
        known |= {"rsa-sha2-512", "rsa-sha2-256"}
    return tuple(sorted(target.algorithms.host_keys, key=lambda name: name not in known))


def _negotiate(link: Link, seconds: float) -> None:
    where, begun = f"{link.device}: {link.target.where}", time.monotonic()
    try:
        link.transport.start_client(timeout=2 * seconds + 1)  # its steps, of `seconds` each, say more when they fail
        link.transport.get_remote_server_key()
    except IncompatiblePeer as error:
        raise NoCommonAlgorithmError(
            f"{where} and this machine have no algorithm in common: {error}; admit one more of "
            "Ciphers, MACs, KexAlgorithms or HostKeyAlgorithms in your SSH configuration, or update the server"
        ) from None
    except (SSHException, EOFError, OSError) as error:
        dropped = "banner" in str(error) and not link.proxy and time.monotonic() - begun < seconds
        kind = NoGreetingError if dropped else DeviceError
        raise kind(_why_no_handshake(link, where, error, seconds)) from None


def _why_no_handshake(link: Link, where: str, error: Exception, seconds: float) -> str:
    said = link.proxy.last_words() if link.proxy else None
    if said is not None:
        return f"{where}: the ProxyCommand `{link.target.proxy_command}` gives no connection{said}"
    if "banner" in str(error) or "protocol version" in str(error):
        return (
            f"{where} takes connections, and no SSH server greets there within {seconds:g} s; "
            "is the port right, and is the machine not too busy (MaxStartups in its sshd_config)?"
        )
    return f"{where} does not come to terms within {seconds:g} s ({error or 'it hung up'}); look at its sshd's log"
