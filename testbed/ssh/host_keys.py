"""Host keys, strictly: what the user's known_hosts files know of a machine, and how a key gets into them.

The files are OpenSSH's (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT"): plain, hashed and pattern names, [host]:port,
@revoked.  A host certificate authority (@cert-authority) is not used: paramiko does not ask for host certificates.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import DeviceError, HostKeyError
from testbed.ssh.config import Target

REVOKED, AUTHORITY = "@revoked", "@cert-authority"


@dataclass(frozen=True)
class HostKey:
    """A public key of a host: its type ("ssh-ed25519") and its encoding on the wire."""

    kind: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """As ssh prints it."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    def __str__(self) -> str:
        return f"{self.kind.removeprefix('ssh-').partition('-')[0].upper()} {self.fingerprint}"


@dataclass(frozen=True)
class KnownKey:
    """A line of a known_hosts file that speaks of the machine in question."""

    key: HostKey
    file: Path
    line: int
    marker: str  # "", "@revoked" or "@cert-authority"
    by_pattern: bool  # the line names it by a pattern, which fits others, too

    def __str__(self) -> str:
        return f"{self.key} ({self.file}:{self.line})"


def known_keys(target: Target) -> list[KnownKey]:
    """Every line of the user's and the system's files that names the machine."""
    files = (*target.user_known_hosts, *target.global_known_hosts)
    return [known for file in files for known in _of_file(file, target.host_key_name)]


def check(device: str, target: Target, key: HostKey) -> None:
    """Raise HostKeyError unless the key is known for this machine."""
    known = known_keys(target)
    if any(entry.key == key and entry.marker == REVOKED for entry in known):
        raise HostKeyError(
            f"{device}: {_at(target)} shows a host key that was revoked: {key}.  Nothing was executed there.  Give the "
            "machine a new host key, then accept that one: testbed trust " + device
        )
    plain = [entry for entry in known if not entry.marker]
    if any(entry.key == key for entry in plain):
        return
    not_followed = _lax(target) + _authorities(known)
    if plain:
        raise HostKeyError(_changed(device, target, key, plain, not_followed))
    raise HostKeyError(
        f"{device}: the host key of {_at(target)} is not known: {key}.  Nothing was executed there.{not_followed}  "
        f"Compare it with the machine's own ({_own(key)}), then accept it: testbed trust {device}"
    )


def _changed(device: str, target: Target, key: HostKey, known: Sequence[KnownKey], not_followed: str) -> str:
    return (
        f"{device}: the host key of {_at(target)} has CHANGED.  It shows {key}, known is "
        f"{', '.join(map(str, known))}.  Nothing was executed there.{not_followed}  Either the machine was installed "
        f"anew, or another one answers in its place.  If you know which ({_own(key)} there shows its own key), accept "
        f"the new key: testbed trust {device}"
    )


def _at(target: Target) -> str:
    alias = f" (known as {target.host_key_name})" if target.host not in target.host_key_name else ""
    return f"{target.where}{alias}"


def _own(key: HostKey) -> str:
    kind = key.kind.removeprefix("ssh-").partition("-")[0]
    return f"ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub"


def _lax(target: Target) -> str:
    setting = f"  `StrictHostKeyChecking {target.lax_host_keys}` is not followed: the testbed is always strict."
    return setting if target.lax_host_keys else ""


def _authorities(known: Iterable[KnownKey]) -> str:
    """To a user whom `ssh` lets in, because a certificate vouches for the machine."""
    lines = ", ".join(f"{entry.file}:{entry.line}" for entry in known if entry.marker == AUTHORITY)
    told = f"  A certificate authority ({lines}) is not followed: paramiko asks no server for a host certificate."
    return told if lines else ""


def _of_file(file: Path, name: str) -> list[KnownKey]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DeviceError(f"{file} cannot be read: {error.strerror}") from None
    entries = ((number, _entry(line)) for number, line in enumerate(lines, 1))
    return [
        KnownKey(entry.key, file, number, entry.marker, by_pattern=not entry.names_exactly(name))
        for number, entry in entries
        if entry and entry.names(name)
    ]


@dataclass(frozen=True)
class _Entry:
    marker: str
    hosts: tuple[str, ...]
    key: HostKey

    def names(self, name: str) -> bool:
        """A negated pattern that fits outweighs all others."""
        if any(host.startswith("!") and fnmatch.fnmatchcase(name, _glob(host[1:])) for host in self.hosts):
            return False
        return any(_fits(host, name) for host in self.hosts)

    def names_exactly(self, name: str) -> bool:
        return name in self.hosts or (len(self.hosts) == 1 and self.hosts[0].startswith("|1|"))


def _entry(line: str) -> _Entry | None:
    """A line, or None where it is empty, a comment, or none that can be read."""
    fields = line.split()
    marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
    if len(fields) < 3 or fields[0].startswith("#"):
        return None
    try:
        return _Entry(marker, tuple(fields[0].split(",")), HostKey(fields[1], base64.b64decode(fields[2])))
    except binascii.Error:
        return None


def _glob(pattern: str) -> str:
    """OpenSSH knows * and ?, no [sets]."""
    return pattern.replace("[", "[[]")


def _fits(host: str, name: str) -> bool:
    if host.startswith("|1|"):
        salt, _, _ = host[3:].partition("|")
        return hmac.compare_digest(host.encode(), _hashed(name, salt).encode())
    return fnmatch.fnmatchcase(name, _glob(host.lower())) or host == name


def _hashed(name: str, salt: str) -> str:
    """`salt`: 20 bytes in base64."""
    try:
        digest = hmac.digest(base64.b64decode(salt), name.encode(), hashlib.sha1)
    except binascii.Error:
        return ""
    return f"|1|{salt}|{base64.b64encode(digest).decode()}"


def accept(target: Target, keys: Iterable[HostKey], instead_of: Iterable[KnownKey] = ()) -> Path:
    """Write keys to the user's known_hosts file, in the place of `instead_of`; gives the file.

    Raises DeviceError when there is no such file to write to, or an old line speaks of other machines as well.
    """
    if not target.user_known_hosts or target.user_known_hosts[0] == Path("/dev/null"):
        raise DeviceError(
            f"{target.alias}: your SSH configuration gives no file to keep its host key in "
            "(UserKnownHostsFile is none); name one"
        )
    file = target.user_known_hosts[0].resolve()
    name = target.host_key_name
    if target.hash_known_hosts:
        name = _hashed(name, base64.b64encode(secrets.token_bytes(20)).decode())
    lines = [f"{name} {key.kind} {base64.b64encode(key.blob).decode()}\n" for key in keys]
    _remove(instead_of, target.host_key_name)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(file, [*(_lines(file) if file.exists() else []), *lines])
    except OSError as error:
        raise DeviceError(f"{file} cannot be written: {error.strerror}") from None
    return file


def _remove(old_keys: Iterable[KnownKey], name: str) -> None:
    """Take the lines out of their files, the last ones first so that the numbers of the others hold.

    A line with other names beside this one (an address, mostly) stays for those.
    """
    old_keys = sorted(old_keys, key=lambda old: (old.file, old.line), reverse=True)
    for old in old_keys:
        if old.by_pattern:
            raise DeviceError(
                f"{old.file}:{old.line} speaks of other machines as well; take this one's name out of it by hand"
            )
    for old in old_keys:
        file = old.file.resolve()
        try:
            lines = _lines(file)
            _write(file, [*lines[: old.line - 1], *_without(name, lines[old.line - 1]), *lines[old.line :]])
        except OSError as error:
            raise DeviceError(f"{file} cannot be written: {error.strerror}") from None


def _without(name: str, line: str) -> list[str]:
    """What is left of a line without a name: one line, or none."""
    names, space, rest = line.partition(" ")
    others = [other for other in names.split(",") if other != name and not other.startswith("|1|")]
    return [f"{','.join(others)}{space}{rest}"] if others else []


def _lines(file: Path) -> list[str]:
    """Each with its end, the last one's too."""
    text = file.read_text(encoding="utf-8", errors="surrogateescape")
    return [f"{line}\n" for line in text.splitlines()]


def _write(file: Path, lines: Iterable[str]) -> None:
    """Whole or not at all; who may read it stays as it was."""
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
    new = file.with_name(f".{file.name}.{os.getpid()}.new")
    with open(new, "w", encoding="utf-8", errors="surrogateescape", opener=lambda p, f: os.open(p, f, mode)) as out:
        out.writelines(lines)
    new.replace(file)
