"""Getting to know the host keys on the way to a device: what each machine shows, and what the user knew of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from testbed.errors import DeviceError, HostKeyError
from testbed.inventory import Access
from testbed.ssh import host_keys
from testbed.ssh.config import Target, resolve
from testbed.ssh.host_keys import REVOKED, HostKey, KnownKey
from testbed.ssh.transport import Link, NoCommonAlgorithmError, host_key, log_in_behind, shake_hands

KINDS = (
    ("ssh-ed25519",),
    ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"),
    ("rsa-sha2-512", "rsa-sha2-256"),
)


@dataclass(frozen=True)
class Introduction:
    """What one machine on the way shows, against what is known of it."""

    target: Target
    shown: tuple[HostKey, ...]
    known: tuple[KnownKey, ...]

    @property
    def stale(self) -> tuple[KnownKey, ...]:
        """What the user's own files say that does not hold any more."""
        kinds = {key.kind for key in self.shown} if self.familiar else {known.key.kind for known in self.known}
        return tuple(
            known
            for known in self.known
            if not known.marker
            and known.file in self.target.user_known_hosts
            and known.key.kind in kinds
            and known.key not in self.shown
        )

    @property
    def familiar(self) -> bool:
        """Whether one of its keys is known already."""
        return any(known.key in self.shown for known in self.known if not known.marker)

    @property
    def in_order(self) -> bool:
        return self.familiar and not self.stale

    def accept(self) -> str:
        """Make its keys the known ones; gives the file they are in now."""
        familiar = {known.key for known in self.known if not known.marker}
        new = [key for key in self.shown if key not in familiar]
        return str(host_keys.accept(self.target, new, self.stale))


def introductions(device: str, access: Access, timeout_seconds: float = 10.0) -> Iterator[Introduction]:
    """Each machine on the way, the device last.

    The next one comes only when the one before is accepted, because it is reached by logging in there.
    """
    try:
        target = resolve(access)
    except DeviceError as error:
        raise DeviceError(f"{device}: {error}") from None
    way: Link | None = None
    try:
        for hop in target.path:
            yield _introduce(way, device, hop, timeout_seconds)
            if hop is not target:
                way = log_in_behind(way, device, hop, timeout_seconds)
    finally:
        if way is not None:
            way.close()


def _introduce(way: Link | None, device: str, hop: Target, timeout_seconds: float) -> Introduction:
    shown = tuple(_shown(way, device, hop, timeout_seconds))
    known = tuple(host_keys.known_keys(hop))
    revoked = [entry for entry in known if entry.marker == REVOKED and entry.key in shown]
    if revoked:
        raise HostKeyError(f"{device}: {hop.where} shows a key that was revoked: {revoked[0]}; give it a new one")
    return Introduction(hop, shown, known)


def _shown(way: Link | None, device: str, hop: Target, timeout_seconds: float) -> list[HostKey]:
    """A server shows one key at a time, of a type that it is asked for."""
    shown: list[HostKey] = []
    nothing: DeviceError | None = None
    for kinds in KINDS:
        admitted = tuple(kind for kind in kinds if kind in hop.algorithms.host_keys)
        try:
            link = shake_hands(way, device, hop, timeout_seconds, admitted) if admitted else None
        except NoCommonAlgorithmError as error:
            nothing = error
            continue
        if link is not None:
            shown.append(host_key(link.transport))
            link.close()
    if nothing is not None and not shown:
        raise nothing
    return shown
