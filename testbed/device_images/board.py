"""What a recipe is told about one board: from the inventory, and the secrets that are given when it is rendered."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.device_images import catalogue
from testbed.device_images.network import check_host, check_network, host_name_of, notes_on, time_source
from testbed.errors import UsageError
from testbed.spelling import did_you_mean

if TYPE_CHECKING:
    from testbed.device_images.host_key import HostKey
    from testbed.inventory import Device, HardwareProfile, ImageSettings

DEFAULT_USER = "testbed"
SSH_PORT = 22
_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_USER_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_PUBLIC_KEY = re.compile(r"(ssh-|ecdsa-|sk-)\S+ [A-Za-z0-9+/]+=*( .*)?")


@dataclass(frozen=True)
class Board:
    """One board, as templates see it (`board.…`)."""

    image: str  # of the catalogue
    host_name: str
    user: str
    profile: HardwareProfile
    settings: ImageSettings
    authorized_keys: tuple[str, ...]  # lines "ssh-ed25519 AAAA… comment"
    host_key: HostKey
    power_mode: str | None = None
    wifi_password: str | None = field(default=None, repr=False)
    known_as: tuple[str, ...] = ()  # names that ssh may know it by, for known_hosts
    port: int = SSH_PORT  # at which ssh reaches the first of those names: another one where something forwards it
    device: str | None = None  # its name in the inventory; None: any board of the profile
    inventory: str | None = None  # the inventory's file, as it was given

    def __post_init__(self) -> None:
        self._check()

    @property
    def needs_super_modes(self) -> bool:
        """Whether its power mode is one that only a `super` flash configuration brings."""
        return self.power_mode in self.profile.super_power_modes and self.power_mode not in self.profile.power_modes

    @property
    def provision_command(self) -> str:
        """What is typed once it answers; what only the reader knows is in capitals."""
        inventory = "YOUR_INVENTORY" if self.inventory is None else shlex.quote(self.inventory)
        return f"testbed provision --inventory {inventory} --only {shlex.quote(self.device or 'ITS_NAME')}"

    @property
    def login(self) -> str:
        """What ssh is given to log in there."""
        where = f"{self.user}@{(self.known_as or (self.host_name,))[0]}"
        return where if self.port == SSH_PORT else f"-p {self.port} {where}"

    @property
    def known_hosts(self) -> str:
        """Its line of ssh's known_hosts, by every name that ssh may know it by."""
        host, *others = self.known_as or (self.host_name,)
        names = (host if self.port == SSH_PORT else f"[{host}]:{self.port}", *others)
        return f"{','.join(names)} {self.host_key.public}\n"

    @property
    def time_sources(self) -> tuple[tuple[str, int | None], ...]:
        """Whom chrony asks, by host and port; None: the port of NTP."""
        return tuple(time_source(server, self._name) for server in self.settings.time_servers)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the inventory says of it and may not be meant so."""
        return notes_on(self._name, self.settings)

    @property
    def _name(self) -> str:
        return self.device or self.host_name

    def _check(self) -> None:
        if not _HOST_NAME.fullmatch(self.host_name):
            raise UsageError(f"{self.host_name!r} is no host name: letters a to z, digits and hyphens, 63 at most")
        if not _USER_NAME.fullmatch(self.user) or self.user == "root":
            raise UsageError(f"{self.user!r} cannot be the login user: a name such as {DEFAULT_USER}, not root")
        if not self.authorized_keys:
            raise UsageError(
                f"nobody could log in at {self.host_name}: give a public key by `--authorized-key FILE`, or by "
                "`image: {authorized_keys: [FILE]}` in the inventory (`ssh-keygen -t ed25519` makes a key)"
            )
        for line in self.authorized_keys:
            if not _PUBLIC_KEY.fullmatch(line):
                raise UsageError(f"expected a public key such as ssh-ed25519 AAAA…, got {line[:20]!r}")
        if self.settings.wifi is not None and self.wifi_password is None:
            raise UsageError(
                f"{self._name}: a wireless network needs a name and a password: give the password of "
                f"{self.settings.wifi!r} by `--wifi-password-file FILE`"
            )
        if self.settings.wifi is None and self.wifi_password is not None:
            raise UsageError(
                f"{self._name}: a wireless network needs a name and a password: write its name into the inventory "
                "(`image: {wifi: NAME, country: …}`), or leave --wifi-password-file out"
            )
        check_network(self._name, self.settings)
        self._check_power_mode()

    def _check_power_mode(self) -> None:
        modes = (*self.profile.power_modes, *self.profile.super_power_modes)
        if self.power_mode is not None and modes and self.power_mode not in modes:
            raise UsageError(
                f"{self._name}: power_mode: {self.profile.name} has no power mode {self.power_mode!r}; "
                f"{did_you_mean(self.power_mode, set(modes))} (a board that has others needs a profile of its own)"
            )


def board_of(
    device: Device,
    settings: ImageSettings,
    host_key: HostKey,
    *,
    authorized_keys: Iterable[Path] = (),
    wifi_password: str | None = None,
    inventory: str | None = None,
) -> Board:
    """A device of the inventory; raises UsageError with what is lacking."""
    if device.kind == "emulated":
        raise UsageError(f"{device.name} is an emulated device: it has no card that an image could be written to")
    files = tuple(authorized_keys) or tuple(map(Path, settings.authorized_keys))
    host = device.access.host if device.access is not None else device.name
    check_host(device.name, host, settings)
    address = settings.address.partition("/")[0] if settings.address else None
    return Board(
        image=catalogue.choose(device.profile.name, settings.name),
        host_name=host_name_of(device.name),
        user=(device.access.user if device.access is not None else None) or DEFAULT_USER,
        profile=device.profile,
        settings=settings,
        authorized_keys=keys_of(files) if files else _keys_of_ssh(device),
        host_key=host_key,
        power_mode=device.power_mode,
        wifi_password=wifi_password,
        known_as=tuple(dict.fromkeys(name for name in (host, address) if name)),
        port=(device.access.port if device.access is not None else None) or SSH_PORT,
        device=device.name,
        inventory=inventory,
    )


def board_of_profile(
    profile: HardwareProfile, host_key: HostKey, *, image: str | None = None, authorized_keys: Iterable[Path]
) -> Board:
    """Any board of a profile; its host name is the profile's."""
    from testbed.inventory import ImageSettings

    name = profile.name.replace("_", "-")
    keys = keys_of(authorized_keys)
    chosen = catalogue.choose(profile.name, image)
    return Board(chosen, name, DEFAULT_USER, profile, ImageSettings(), keys, host_key, known_as=(name,))


def keys_of(files: Iterable[Path]) -> tuple[str, ...]:
    """The public keys in some files; raises UsageError, above all for a private one."""
    lines: list[str] = []
    for file in files:
        try:
            text = file.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise UsageError(f"{file}: expected a public key, and it cannot be read: {reason}") from None
        if "PRIVATE KEY" in text:
            raise UsageError(f"{file} is a private key; give its public half ({file}.pub)")
        lines += [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    return tuple(dict.fromkeys(lines))


def _keys_of_ssh(device: Device) -> tuple[str, ...]:
    """The public halves of the keys that ssh would log in with."""
    from testbed.ssh.config import resolve

    if device.access is None:
        return ()
    files = [path.with_name(f"{path.name}.pub") for path in resolve(device.access).identity_files]
    return keys_of(file for file in files if file.is_file())
