"""The keys that a user has for a machine, from the SSH agent and from files, and logging in with them.

The order is ssh's: the agent's keys that the configuration names, the agent's others (unless IdentitiesOnly), then
files.  Nothing here asks for a passphrase or a password: an encrypted key counts only if the agent holds it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from paramiko import AuthenticationException, BadAuthenticationType, PKey, SSHException, Transport
from paramiko.agent import AgentKey, AgentSSH
from paramiko.message import Message
from paramiko.pkey import PublicBlob, UnknownKeyType

from testbed.errors import DeviceError
from testbed.ssh.config import Target

AGENT_SECONDS = 30.0  # somebody may have to confirm the use of a key


@dataclass(frozen=True)
class Identity:
    """A key that can sign, and where it comes from."""

    key: PKey
    source: str
    certificate: PublicBlob | None = None

    def __str__(self) -> str:
        return f"{self.key.fingerprint} ({self.source})"


@dataclass
class Identities:
    """What there is to log in with, and what there would be, with the reason why it is of no use."""

    usable: list[Identity] = field(default_factory=list)
    useless: list[str] = field(default_factory=list)
    agent: Agent | None = None  # held open: its keys sign through it

    def close(self) -> None:
        if self.agent is not None:
            self.agent.close()


class Agent(AgentSSH):
    """The agent behind a socket of the user's choice (paramiko's own class knows only SSH_AUTH_SOCK)."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(AGENT_SECONDS)
        try:
            self._socket.connect(path)
            self._connect(self._socket)  # type: ignore[attr-defined]  # the stubs leave out what is not public
        except (OSError, SSHException):
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()


def identities(target: Target) -> Identities:
    """Gather the keys for a machine; reads files and asks the agent."""
    found = Identities()
    held = _agent_keys(target, found)
    named = [_public(path) for path in target.identity_files]
    first = [key for key in held if key.asbytes() in named]
    others = [] if target.only_these_identities else [key for key in held if key not in first]
    for key in (*first, *others):
        found.usable += _with_certificates(key, f"agent, {key.comment}", target)
    in_agent = {key.asbytes() for key in held}
    for path, public in zip(target.identity_files, named, strict=True):
        if path.exists() and public not in in_agent:
            _read_file(path, target, found)
    return found


def _agent_keys(target: Target, found: Identities) -> list[AgentKey]:
    if target.agent is None:
        return []
    try:
        found.agent = Agent(target.agent)
    except (OSError, SSHException) as error:
        found.useless.append(f"the agent {target.agent} does not answer: {error}")
        return []
    return list(found.agent.get_keys())


def _public(path: Path) -> bytes | None:
    """The public half beside an identity file, or in its place; None where there is neither."""
    for file in (path.with_name(path.name + ".pub"), path):
        with contextlib.suppress(OSError, ValueError, SSHException):
            return bytes(PublicBlob.from_file(str(file)).key_blob)
    return None


def _read_file(path: Path, target: Target, found: Identities) -> None:
    try:
        key = PKey.from_path(path)
    except TypeError:  # cryptography's word for "encrypted, and no passphrase was given"
        found.useless.append(f"{path} has a passphrase and the agent does not hold it (ssh-add {path})")
    except UnknownKeyType as error:
        found.useless.append(f"{path} is of a type that paramiko does not know ({error.key_type})")
    except OSError as error:
        found.useless.append(f"{path} cannot be read: {error.strerror}")
    except (ValueError, UnsupportedAlgorithm, SSHException) as error:
        found.useless.append(_why_unreadable(path, error))
    else:
        found.usable += _with_certificates(key, str(path), target)


def _why_unreadable(path: Path, error: Exception) -> str:
    public = _public(path)
    kind = Message(public).get_text() if public else ""
    if kind.startswith("sk-"):
        return f"{path} is a security key ({kind}), which works through an agent only (ssh-add {path})"
    return f"{path} is no private key that can be read: {error}"


def _with_certificates(key: PKey, source: str, target: Target) -> Iterator[Identity]:
    """The key with each certificate made for it, then the key alone, as ssh tries them."""
    beside = (path.with_name(f"{path.name}-cert.pub") for path in target.identity_files)
    for path in dict.fromkeys((*target.certificate_files, *beside)):
        blob = _certificate_for(key, path)
        if blob is not None:
            yield Identity(key, f"{source}, with {path}", blob)
    yield Identity(key, source)


def _certificate_for(key: PKey, path: Path) -> PublicBlob | None:
    """The certificate, if it is one for this key: after type and nonce it repeats the fields of the public key."""
    try:
        blob = PublicBlob.from_file(str(path))
    except (OSError, ValueError):
        return None
    certificate, plain = Message(blob.key_blob), Message(key.asbytes())
    if not certificate.get_text().startswith(f"{plain.get_text()}-cert-"):
        return None
    certificate.get_binary()
    return blob if certificate.get_remainder().startswith(plain.get_remainder()) else None


def log_in(device: str, transport: Transport, target: Target) -> None:
    """Authenticate; raises DeviceError that says which keys were tried."""
    mine = identities(target)
    try:
        if mine.usable:
            _try_keys(device, transport, target, mine)
        else:
            _try_none(device, transport, target, mine)
    finally:
        mine.close()


def _try_keys(device: str, transport: Transport, target: Target, mine: Identities) -> None:
    tried: list[str] = []
    for identity in mine.usable:
        tried.append(str(identity))
        identity.key.public_blob = identity.certificate
        if isinstance(identity.key, AgentKey):
            transport.auth_timeout = max(transport.auth_timeout, AGENT_SECONDS)
        try:
            further = transport.auth_publickey(target.user, identity.key)
        except BadAuthenticationType as error:
            further = list(error.allowed_types)
        except AuthenticationException as error:
            if "timeout" in str(error):
                raise DeviceError(f"{device}: {target.where} does not answer while logging in; try again") from None
            if not transport.is_active():
                tried.append("then it hung up (name the one right key: IdentityFile and IdentitiesOnly yes)")
                break
            continue
        except (SSHException, EOFError, OSError) as error:  # an agent that refuses to sign ends in the first
            raise DeviceError(
                f"{device}: logging in at {target.where} broke off at {identity}: {error}; try again"
            ) from None
        if not further:
            return
        if "publickey" in further:  # one more, of the next key
            continue
        raise DeviceError(
            f"{device}: {target.user}@{target.where} wants more than a key ({', '.join(further)}); the testbed logs in "
            "with a key alone, so that nobody has to be asked"
        )
    raise DeviceError(_refused(device, target, f"refused every key: {'; '.join(tried)}", mine))


def _try_none(device: str, transport: Transport, target: Target, mine: Identities) -> None:
    """Some servers know who calls (a VPN's own SSH server)."""
    try:
        transport.auth_none(target.user)
    except (EOFError, OSError) as error:
        raise DeviceError(f"{device}: logging in at {target.where} broke off: {error}; try again") from None
    except SSHException:
        raise DeviceError(_refused(device, target, "wants a key, and there is none to show", mine)) from None


def _refused(device: str, target: Target, what: str, mine: Identities) -> str:
    useless = f"  Of no use: {'; '.join(mine.useless)}." if mine.useless else ""
    return (
        f"{device}: {target.user}@{target.where} {what}.{useless}  Put a public key there (ssh-copy-id {target.alias}) "
        "or name the right one (IdentityFile in your SSH configuration), or the right `user` in the inventory"
    )
