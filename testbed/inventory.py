"""What devices there are: the inventory, its devices, their hardware profiles and budgets.

Nouns only, standard library only; `testbed.config` reads them from YAML and says what is wrong with a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from testbed.errors import UsageError


@dataclass(frozen=True)
class PowerRail:
    """A power rail by the board's own name, and where it is measured."""

    name: str
    source: str  # "ina3221", "pmic", …


@dataclass(frozen=True)
class HardwareProfile:
    """Data about a board's model.

    `unverified` names the fields whose value rests on no cited source: check them on a board before relying on them.
    """

    name: str
    title: str
    memory_bytes: int
    usable_memory_bytes: int
    cores: int
    architecture: str = "aarch64"
    compatible: tuple[str, ...] = ()  # one of these is part of the device tree's `compatible`; (): nothing is expected
    l4t: tuple[int, ...] = ()  # major releases of Jetson Linux that the facts are for; (): of no Jetson
    accelerator: str | None = None  # "cuda" or None
    accelerator_detail: str | None = None  # cores and architecture, for people
    rails: tuple[PowerRail, ...] = ()
    total_rails: tuple[str, ...] = ()  # the rails whose sum is the board's power at `measurement_point`; () if none is
    measurement_point: str | None = None  # "module_rail", "soc_pmic"; None: the board has no sensor of its own
    power_modes: tuple[str, ...] = ()  # by name; numbers differ between tables and are read on the board
    super_power_modes: tuple[str, ...] = ()  # … when the board runs the "super" table instead
    cgroup_default: str = "v2"  # "v1", "v2" or "off"
    peak_source: str = "sampled"  # or "cgroup2_peak", "cgroup1_max_usage"
    swap_default: str = "none"
    python: str = "3.11"  # the system's
    torch_source: str = "cpu"
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """What a run may use of a device: the share of the board, in bytes and in cores (None: no quota)."""

    memory_bytes: int
    cores: float | None = None


@dataclass(frozen=True)
class MeterChoice:
    """A power meter of a device: the name of a file of testbed/meters, and what it is told."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    point: str | None = None  # where it measures, if not where it says itself


#: Below the home of the login user: content, code, environment and runs of the testbed on a device.
DEVICE_FOLDER = ".local/share/edge-testbed"


@dataclass(frozen=True)
class Access:
    """How the controller reaches a machine over SSH; what is None here, the user's SSH configuration decides."""

    host: str  # the name that `ssh -G` is asked about
    user: str | None = None
    port: int | None = None
    ssh_config: str | None = None  # a file instead of ~/.ssh/config
    become: bool = True  # False: never use sudo there
    via: str | None = None  # a device of the same site that content is fetched through, where the uplink is thin


@dataclass(frozen=True)
class Device:
    """One board of the inventory."""

    name: str
    kind: str
    profile: HardwareProfile
    budget: Budget
    clients: int = 1
    accelerator: str = "cpu"
    threads: int = 1
    tags: frozenset[str] = field(default_factory=frozenset)
    access: Access | None = None  # None: the controller's own machine
    python: str | None = None  # an interpreter on the device with everything installed; None: what provisioning made
    folder: str = DEVICE_FOLDER  # absolute, or below the login user's home
    power_mode: str | None = None  # by name; None: left as it is
    meters: tuple[MeterChoice, ...] = ()  # the first one's energy is the device's; the others' stand beside it


@dataclass(frozen=True)
class ImageSettings:
    """What a board's image is told that no run needs to know; keys, host and user are known from its access.

    authorized_keys  files of public keys that may log in; (): those that ssh would log in with
    address          of its wired network, "192.0.2.11/24"; None: by DHCP
    wifi             the network's name; its password is given when the image is rendered, and is stored nowhere
    country          two letters; radio rules depend on it
    """

    name: str | None = None  # of device_images/catalogue.yaml; None: the first one for the board's profile
    authorized_keys: tuple[str, ...] = ()
    address: str | None = None
    gateway: str | None = None
    name_servers: tuple[str, ...] = ()
    time_servers: tuple[str, ...] = ()
    interface: str | None = None  # None: every wired one
    timezone: str = "Etc/UTC"
    wifi: str | None = None
    country: str | None = None


@dataclass(frozen=True)
class Inventory:
    """The devices, in the order of the file; names are unique."""

    devices: tuple[Device, ...]
    source: str = "(in memory)"

    def __iter__(self) -> Iterator[Device]:
        return iter(self.devices)

    def __len__(self) -> int:
        return len(self.devices)

    def select(self, only: Iterable[str]) -> Inventory:
        """The devices that any of the words names, tags or profiles; raises UsageError for a word that fits none."""
        words = tuple(only)
        if not words:
            return self
        for word in words:
            if not any(_fits(device, word) for device in self.devices):
                known = sorted({w for device in self.devices for w in _words(device)})
                raise UsageError(
                    f"{self.source}: no device has the name, tag or profile {word!r}; there are {', '.join(known)}"
                )
        return replace(self, devices=tuple(d for d in self.devices if any(_fits(d, word) for word in words)))


def _words(device: Device) -> set[str]:
    return {device.name, device.profile.name, *device.tags}


def _fits(device: Device, word: str) -> bool:
    return word in _words(device)


def inventory_from_json(record: Mapping[str, Any]) -> Inventory:
    """The inventory of a run's record (`dataclasses.asdict` of every device)."""
    devices = tuple(
        Device(
            **{
                **device,
                "profile": _profile_from_json(device["profile"]),
                "budget": Budget(**device["budget"]),
                "access": Access(**device["access"]) if device.get("access") else None,
                "meters": tuple(MeterChoice(**meter) for meter in device.get("meters", ())),
                "tags": frozenset(device["tags"]),
            }
        )
        for device in record["devices"]
    )
    return Inventory(devices, record["source"])


def _profile_from_json(data: Mapping[str, Any]) -> HardwareProfile:
    tuples = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
    return HardwareProfile(**{**data, **tuples, "rails": tuple(PowerRail(**rail) for rail in data["rails"])})
