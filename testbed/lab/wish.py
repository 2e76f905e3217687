"""From what a user wants of a lab to its hosts: names, addresses, faces, memory."""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from testbed.errors import UsageError
from testbed.lab.link import LinkShape
from testbed.lab.persona import load_persona, personas
from testbed.lab.spec import HostSpec

#: The name of no persona: a host without a board's face.
PLAIN = "plain"
DEFAULT_DEVICES = 3
DEFAULT_SUBNET = "10.99.0.0/24"
DEFAULT_MEMORY_BYTES = 2 << 30
SMALLEST_MEMORY_BYTES = 128 << 20
#: What a lab wears when nobody says otherwise: the first persona there is of each board.
_DEFAULT_BOARDS = ("jetson_orin_nano", "raspberry_pi_5", "raspberry_pi_4")


@dataclass(frozen=True)
class LabWish:
    """What a user wants of a lab."""

    devices: int | None = None  # None: one per persona that is named, else three
    personas: tuple[str, ...] = ()  # by turns; (): a default set; "plain": none
    memory_bytes: int | None = None  # None: the persona's, 2 GiB for a plain host
    shape: LinkShape = field(default_factory=LinkShape)
    subnet: str = DEFAULT_SUBNET
    boot_delay_seconds: float = 1.0  # between the end of a host that reboots and its start


def choose_hosts(wish: LabWish) -> tuple[HostSpec, ...]:
    """Raises UsageError for what cannot be wanted, ConfigError for a persona that is wrong."""
    _check(wish)
    faces = wish.personas or default_personas()
    count = wish.devices or (len(wish.personas) or DEFAULT_DEVICES)
    chosen = list(itertools.islice(itertools.cycle(faces), count))
    addresses = list(itertools.islice(ipaddress.ip_network(wish.subnet).hosts(), 1, count + 1))
    if len(addresses) < count:
        raise UsageError(f"--subnet: {wish.subnet} is too small for {count} hosts and this machine")
    hosts = zip(_names(chosen), chosen, addresses, strict=True)
    return tuple(_host(number, name, face, str(address), wish) for number, (name, face, address) in enumerate(hosts, 1))


def default_personas() -> tuple[str, ...]:
    """A Jetson Orin Nano, a Raspberry Pi 5 and a Raspberry Pi 4, as far as there are personas of them; else plain."""
    known = personas()
    found = (next((name for name in known if name.startswith(board)), None) for board in _DEFAULT_BOARDS)
    return tuple(name for name in found if name is not None) or (PLAIN,)


def _host(number: int, name: str, face: str, address: str, wish: LabWish) -> HostSpec:
    if face == PLAIN:
        return HostSpec(name, number, address, wish.memory_bytes or DEFAULT_MEMORY_BYTES)
    persona = load_persona(face)
    return HostSpec(
        name=name,
        number=number,
        address=address,
        memory_bytes=wish.memory_bytes or persona.memory_bytes,
        kind=persona.kind,
        profile=persona.profile,
        persona=face,
        needs_cmdline=persona.memory_cgroup == "needs_cmdline",
    )


def _names(faces: Sequence[str]) -> list[str]:
    """jetson-orin-nano, raspberry-pi-5, raspberry-pi-5-2, board-1, …: names that a machine may have."""
    seen: Counter[str] = Counter()
    names = []
    for face in faces:
        plain = face == PLAIN
        base = "board" if plain else re.sub(r"-[0-9]+gb$", "", _as_hostname(face))
        seen[base] += 1
        names.append(f"{base}-{seen[base]}" if plain or seen[base] > 1 else base)
    return names


def _as_hostname(face: str) -> str:
    last = face.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-") or "board"


def _check(wish: LabWish) -> None:
    if wish.devices is not None and wish.devices < 1:
        raise UsageError(f"--devices: expected a whole number from 1, got {wish.devices}")
    if wish.memory_bytes is not None and wish.memory_bytes < SMALLEST_MEMORY_BYTES:
        raise UsageError(f"--memory: expected at least {SMALLEST_MEMORY_BYTES >> 20} MiB, got {wish.memory_bytes} B")
    try:
        network = ipaddress.ip_network(wish.subnet)
    except ValueError as error:
        raise UsageError(f'--subnet: expected a network such as "{DEFAULT_SUBNET}", got {error}') from None
    if network.version != 4:
        raise UsageError(f'--subnet: expected an IPv4 network such as "{DEFAULT_SUBNET}", got "{wish.subnet}"')
