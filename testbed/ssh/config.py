"""What the user's SSH configuration says about a machine, asked of `ssh -G`, in this program's words.

`ssh -G` follows Include, Match, HostName, Port and the rest exactly as `ssh` does; the tokens that it leaves in paths
and in ProxyCommand (%h, %r, ~, ${VARIABLE}, …) are filled in here.  Settings that would change who is reached, or how,
and that this program cannot follow, are refused together in one message.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import DeviceError
from testbed.inventory import Access
from testbed.process_identity import login_name

PATIENCE_SECONDS = 10.0  # a `Match exec` may take a while
MOST_HOPS = 8  # a chain of jump hosts that is longer goes round in circles

# What is offered to a server where the user's configuration admits it, in this order.  AES-GCM first: on a board with
# AES instructions it is the fastest that paramiko has, and on one without it is no slower than the others.
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr")
MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256", "hmac-sha2-512")
KEY_EXCHANGES = (
    "mlkem768x25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
    "diffie-hellman-group16-sha512",
    "diffie-hellman-group-exchange-sha256",
    "diffie-hellman-group14-sha256",
)
KEY_TYPES = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
)
#: StrictHostKeyChecking where it is laxer than we ever are: what `ssh -G` prints, and what the user wrote.
LAX = {"no": "no", "false": "no", "off": "off", "accept-new": "accept-new"}

#: What `ssh -G` printed: every value of every setting, in order; names in lower case.
Settings = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Algorithms:
    """What both the user's configuration and paramiko admit, most wanted first."""

    ciphers: tuple[str, ...]
    macs: tuple[str, ...]
    key_exchanges: tuple[str, ...]
    host_keys: tuple[str, ...]
    public_keys: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """One machine: where it is, who logs in with what, and which machine is on the way."""

    alias: str  # the name that was asked about
    host: str
    port: int
    user: str
    identity_files: tuple[Path, ...]
    certificate_files: tuple[Path, ...]
    only_these_identities: bool
    agent: str | None  # the socket of the user's SSH agent
    host_key_name: str  # what known_hosts files call it: HostKeyAlias, else host or [host]:port
    user_known_hosts: tuple[Path, ...]
    global_known_hosts: tuple[Path, ...]
    hash_known_hosts: bool
    lax_host_keys: str | None  # the value of StrictHostKeyChecking where it is laxer than we ever are
    algorithms: Algorithms
    proxy_command: str | None
    jump: Target | None  # the machine before this one
    connect_timeout_seconds: float | None
    keep_alive_seconds: float | None
    keep_alive_count: int
    family: socket.AddressFamily
    bind_address: str | None
    compression: bool

    @property
    def path(self) -> tuple[Target, ...]:
        """Every machine on the way, this one last."""
        return (*(self.jump.path if self.jump else ()), self)

    @property
    def where(self) -> str:
        return f"{self.host} port {self.port}"


def resolve(access: Access) -> Target:
    """Ask `ssh -G`; raises DeviceError that names everything that cannot be followed, jump hosts included."""
    unfit: list[str] = []
    target = _resolve(access.host, access.user, access.port, access.ssh_config, None, unfit, 0)
    if unfit:
        file = access.ssh_config or "your SSH configuration"
        raise DeviceError(
            f"{file} asks for what the testbed cannot do over SSH: {'; '.join(unfit)}.  Give the testbed a file of "
            "its own without it (`ssh_config:` in the inventory), or change these lines for this host"
        )
    return target


def _resolve(
    name: str, user: str | None, port: int | None, file: str | None, jumps: str | None, unfit: list[str], hops: int
) -> Target:
    """`jumps`: the way to this machine, where another one's ProxyJump has settled it."""
    if hops > MOST_HOPS:
        raise DeviceError(f"the jump hosts of {name} go round in circles; look at ProxyJump in your SSH configuration")
    settings = _ask(name, user, port, file)
    unfit += [f"{what} (for {name})" for what in _unfit(settings)]
    proxy_jump = jumps if jumps is not None else _text(settings, "proxyjump")
    tokens = _tokens(name, settings, proxy_jump)
    command = _text(settings, "proxycommand") if jumps is None else None
    try:
        return _target(name, settings, tokens, command, _jump(proxy_jump, file, unfit, hops))
    except KeyError as error:
        raise DeviceError(
            f"the SSH configuration of {name} holds {error.args[0]}, which the testbed does not know; "
            "write out what it stands for"
        ) from None


def _jump(jumps: str | None, file: str | None, unfit: list[str], hops: int) -> Target | None:
    """The last of the jump hosts, reached through those before it (as OpenSSH does: `ssh -J a,b` is `-J a` to b)."""
    if jumps is None or jumps == "":
        return None
    before, _, last = jumps.rpartition(",")
    found = re.fullmatch(r"(?:ssh://)?(?:(.*)@)?(\[[^]]+]|[^:]+)(?::(\d+))?/?", last)
    if found is None:
        raise DeviceError(f"ProxyJump {last}: expected [user@]host[:port]")
    user, host, port = found.groups()
    return _resolve(host.strip("[]"), user, int(port) if port else None, file, before or None, unfit, hops + 1)


def _ask(name: str, user: str | None, port: int | None, file: str | None) -> Settings:
    command = ["ssh", "-G", *(["-F", str(Path(file).expanduser())] if file else [])]
    command += [*(["-l", user] if user else []), *(["-p", str(port)] if port else []), "--", name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except OSError:
        raise DeviceError("there is no `ssh` on this machine; install the OpenSSH client") from None
    except subprocess.TimeoutExpired:
        raise DeviceError(
            f"`{' '.join(command)}` takes longer than {PATIENCE_SECONDS:.0f} s; is there a slow Match exec in it?"
        ) from None
    if done.returncode != 0:
        raise DeviceError(f"`{' '.join(command)}` refuses: {done.stderr.strip()}")
    return _parse(done.stdout)


def _parse(text: str) -> Settings:
    settings: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        settings[key.lower()] = (*settings.get(key.lower(), ()), value)
    return settings


def _text(settings: Settings, key: str) -> str | None:
    """The value, or None where it is not set or "none"."""
    values = settings.get(key, ())
    return values[0] if values and values[0].lower() != "none" else None


def _yes(settings: Settings, key: str) -> bool:
    return (_text(settings, key) or "").lower() in {"yes", "true"}


def _seconds(settings: Settings, key: str) -> float | None:
    value = _text(settings, key)
    return float(value) if value and float(value) > 0 else None


def _admitted(settings: Settings, key: str, ours: tuple[str, ...]) -> tuple[str, ...]:
    """A list of algorithms that `ssh -G` does not print (another version) restricts nothing."""
    names = {name.removesuffix("@libssh.org") for name in (_text(settings, key) or "").split(",") if name}
    return tuple(name for name in ours if not names or name.removesuffix("@libssh.org") in names)


def _unfit(settings: Settings) -> list[str]:
    """Settings that cannot be followed and must not be passed over."""
    refused = (
        ("pkcs11provider", "PKCS11Provider (load the card into an agent: ssh-add -s)"),
        ("knownhostscommand", "KnownHostsCommand (write the keys to a known_hosts file)"),
        ("revokedhostkeys", "RevokedHostKeys (write @revoked lines to a known_hosts file)"),
        ("bindinterface", "BindInterface (use BindAddress)"),
    )
    found = [text for key, text in refused if _text(settings, key)]
    if _yes(settings, "proxyusefdpass"):
        found.append("ProxyUseFdpass")
    if (_text(settings, "pubkeyauthentication") or "yes").lower() in {"no", "false"}:
        found.append("PubkeyAuthentication no (keys are the only way in: no passwords, no GSSAPI)")
    empty = [name.replace("_", " ") for name, admitted in vars(_algorithms(settings)).items() if not admitted]
    return [*found, *(f"{name} that paramiko does not have (admit one more in the list)" for name in empty)]


def _tokens(name: str, settings: Settings, jumps: str | None) -> dict[str, str]:
    """What %-tokens stand for (TOKENS in ssh_config(5))."""
    host, port, user = settings["hostname"][0], settings["port"][0], settings["user"][0]
    machine = socket.gethostname()
    tokens = {
        "%": "%",
        "d": str(Path.home()),
        "h": host,
        "i": str(os.getuid()),
        "j": jumps or "",
        "k": _text(settings, "hostkeyalias") or name,
        "L": machine.partition(".")[0],
        "l": machine,
        "n": name,
        "p": port,
        "r": user,
        "u": login_name(),
    }
    connection = "".join(tokens[letter] for letter in "lhprj")
    return {**tokens, "C": hashlib.sha1(connection.encode(), usedforsecurity=False).hexdigest()}


def _fill_in(text: str, tokens: Mapping[str, str]) -> str:
    """Raises KeyError with the token that is not known."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in tokens:
            raise KeyError(found[0])
        return tokens[found[1]]

    return re.sub(r"%(.)", value, text)


def _path(text: str, tokens: Mapping[str, str]) -> Path:
    """Raises KeyError with the token or variable that is not known."""

    def variable(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise KeyError(found[0])
        return os.environ[found[1]]

    return Path(_fill_in(re.sub(r"\$\{(\w+)}", variable, text), tokens)).expanduser()


def _paths(settings: Settings, key: str, tokens: Mapping[str, str]) -> tuple[Path, ...]:
    return tuple(_path(text, tokens) for text in settings.get(key, ()) if text.lower() != "none")


def _known_hosts(settings: Settings, key: str, tokens: Mapping[str, str]) -> tuple[Path, ...]:
    """`ssh -G` prints these in one line without quotes; a blank before "/" or "~" separates two."""
    line = _text(settings, key)
    return tuple(_path(text, tokens) for text in re.split(r" (?=[/~])", line)) if line else ()


def _agent(settings: Settings, tokens: Mapping[str, str]) -> str | None:
    if "identityagent" not in settings:
        return os.environ.get("SSH_AUTH_SOCK")
    value = _text(settings, "identityagent")
    if value is None:
        return None
    if value == "SSH_AUTH_SOCK" or value.startswith("$"):
        return os.environ.get(value.strip("${}"))
    return str(_path(value, tokens))


def _family(settings: Settings) -> socket.AddressFamily:
    families = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}
    return families.get(_text(settings, "addressfamily") or "any", socket.AF_UNSPEC)


def _host_key_name(settings: Settings) -> str:
    host, port = settings["hostname"][0], settings["port"][0]
    plain = host.lower() if port == "22" else f"[{host.lower()}]:{port}"
    return _text(settings, "hostkeyalias") or plain


def _algorithms(settings: Settings) -> Algorithms:
    public_keys = "pubkeyacceptedalgorithms" if "pubkeyacceptedalgorithms" in settings else "pubkeyacceptedkeytypes"
    return Algorithms(
        ciphers=_admitted(settings, "ciphers", CIPHERS),
        macs=_admitted(settings, "macs", MACS),
        key_exchanges=_admitted(settings, "kexalgorithms", KEY_EXCHANGES),
        host_keys=_admitted(settings, "hostkeyalgorithms", KEY_TYPES),
        public_keys=_admitted(settings, public_keys, KEY_TYPES),
    )


def _target(
    name: str, settings: Settings, tokens: Mapping[str, str], proxy_command: str | None, jump: Target | None
) -> Target:
    return Target(
        alias=name,
        host=settings["hostname"][0],
        port=int(settings["port"][0]),
        user=settings["user"][0],
        identity_files=_paths(settings, "identityfile", tokens),
        certificate_files=_paths(settings, "certificatefile", tokens),
        only_these_identities=_yes(settings, "identitiesonly"),
        agent=_agent(settings, tokens),
        host_key_name=_host_key_name(settings),
        user_known_hosts=_known_hosts(settings, "userknownhostsfile", tokens),
        global_known_hosts=_known_hosts(settings, "globalknownhostsfile", tokens),
        hash_known_hosts=_yes(settings, "hashknownhosts"),
        lax_host_keys=LAX.get((_text(settings, "stricthostkeychecking") or "ask").lower()),
        algorithms=_algorithms(settings),
        proxy_command=_fill_in(proxy_command, tokens) if proxy_command else None,
        jump=jump,
        connect_timeout_seconds=_seconds(settings, "connecttimeout"),
        keep_alive_seconds=_seconds(settings, "serveraliveinterval"),
        keep_alive_count=int(_text(settings, "serveralivecountmax") or 3),
        family=_family(settings),
        bind_address=_text(settings, "bindaddress"),
        compression=_yes(settings, "compression"),
    )
