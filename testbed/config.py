"""From the inventory file to the nouns of `testbed.inventory`, and its published JSON Schema.

defaults: {kind: emulated, clients: 2}
devices:
  pi-4:
    profile: raspberry_pi_4b_4gb   # inventory/profiles/raspberry_pi_4b_4gb.yaml
    budget: {memory: "440 MiB"}    # the share of the board that a run may use
    tags: [small]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, WithJsonSchema

from testbed.byte_text import EXPECTED, PATTERN, format_bytes, parse_bytes
from testbed.errors import ConfigError, UsageError
from testbed.inventory import (
    DEVICE_FOLDER,
    Access,
    Budget,
    Device,
    HardwareProfile,
    ImageSettings,
    Inventory,
    MeterChoice,
    PowerRail,
)
from testbed.meters import POINTS, check, make
from testbed.package_data import data_folder
from testbed.plugins import device_kinds
from testbed.spelling import did_you_mean
from testbed.yaml_file import FileModel, complaint, expected_at, read_file

__all__ = [
    "default_inventory",
    "format_bytes",
    "json_schema",
    "load_image_settings",
    "load_inventory",
    "load_named_profile",
    "load_profile",
    "parse_bytes",
    "profile_schema",
    "profiles",
    "published",
]

Value = TypeVar("Value")
Entry = TypeVar("Entry", bound=FileModel)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _to_bytes(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError(EXPECTED)  # noqa: TRY004 -- pydantic gathers ValueErrors
    try:
        return parse_bytes(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


#: A number of bytes in the file, "4 GiB".
Bytes = Annotated[
    int,
    BeforeValidator(_to_bytes),
    WithJsonSchema({"type": "string", "pattern": PATTERN, "examples": ["700 MiB", "4 GiB"]}),
]


MeterName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
#: What `meter:` says for "do without the board's own".
NO_METER = "none"
#: Kinds whose machine need not be the profile's board: its sensors are not looked for.
_ANY_MACHINE = frozenset({"emulated", "generic"})
#: The meter that reads a rail's sensor, by the beginning of the profile's word for it.
_OWN_METER = {"ina3221": "ina3221", "pmic": "rpi_pmic"}


def _meters_told(value: object) -> object:
    """One complaint, and not one for each form that it could have had."""
    if not isinstance(value, dict):
        return value
    for name, settings in value.items():
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"settings of {name}, such as {{host: …}}, got {settings!r}")
    return {name: settings or {} for name, settings in value.items()}


class BudgetEntry(FileModel):
    """The share of the board that a run may use."""

    memory: Bytes | None = Field(
        default=None, title=EXPECTED, description="Memory of the trainer: the limit of its cgroup."
    )
    cores: float | None = Field(
        default=None, gt=0, title="a number of cores above 0", description="CPU quota; without it, none."
    )


class ImageEntry(FileModel):
    """What `testbed image render` puts into the files of a board (see testbed.inventory.ImageSettings)."""

    name: Name | None = Field(
        default=None,
        title="the name of an image such as raspberry_pi_os_trixie",
        description="Of device_images/catalogue.yaml; without it the first one for the profile.",
    )
    authorized_keys: list[str] | None = Field(
        default=None,
        title="a list of files of public keys such as ~/.ssh/id_ed25519.pub",
        description="Who may log in; relative to this file. Without it the keys that ssh would log in with.",
    )
    address: Annotated[str, Field(pattern=r"^[0-9.]+/[0-9]+$")] | None = Field(
        default=None,
        title='an address with the length of its network such as "192.0.2.11/24"',
        description="Of its network: the wireless one where `wifi` is given, else the wired. Without it, by DHCP.",
    )
    gateway: Annotated[str, Field(pattern=r"^[0-9.]+$")] | None = Field(
        default=None, title="an address such as 192.0.2.1", description="The way out of that network."
    )
    name_servers: list[str] | None = Field(
        default=None, title="a list of addresses", description="Who is asked for names."
    )
    time_servers: list[str] | None = Field(
        default=None,
        title="a list of hosts such as 192.0.2.1 or time.lab:123",
        description="Whom chrony asks; without it the system's own servers.",
    )
    interface: Name | None = Field(
        default=None, title="the name of an interface such as eth0", description="Without it, every wired one."
    )
    timezone: Annotated[str, Field(pattern=r"^[A-Za-z0-9+_-]+(/[A-Za-z0-9+_-]+)*$")] | None = Field(
        default=None, title="a time zone such as Europe/Berlin", description="Without it, Etc/UTC."
    )
    wifi: Annotated[str, Field(min_length=1, max_length=32)] | None = Field(
        default=None,
        title="the name of a wireless network",
        description="Its password is given when the image is rendered, and stored nowhere.",
    )
    country: Annotated[str, Field(pattern=r"^[A-Z]{2}$")] | None = Field(
        default=None, title='two letters such as "DE"', description="Which radio rules hold."
    )


class DeviceEntry(FileModel):
    """A device, or what holds for all of them."""

    kind: str | None = Field(
        default=None,
        title="a device kind such as emulated",
        description="Which code drives it: a file of testbed/devices.",
    )
    profile: str | None = Field(
        default=None,
        title="the name of a hardware profile such as raspberry_pi_4b_4gb",
        description="The board's model: profiles/NAME.yaml beside this file, or of the catalogue.",
    )
    budget: BudgetEntry | None = Field(
        default=None,
        title='a mapping such as {memory: "700 MiB", cores: 1}',
        description="The share of the board that a run may use.",
    )
    clients: int | None = Field(
        default=None, ge=1, title="a whole number from 1", description="Participants placed on it."
    )
    tags: list[Name] | None = Field(default=None, title="a list of words", description="What --only may select it by.")
    threads: int | None = Field(
        default=None, ge=1, title="a whole number from 1", description="Threads of its trainer."
    )
    accelerator: Literal["cpu", "cuda"] | None = Field(
        default=None, title='"cpu" or "cuda"', description="Where its trainer computes."
    )

    host: str | None = Field(
        default=None,
        title="a name that ssh knows, such as orin-1 or 192.0.2.7",
        description="Where to reach it over SSH; without it the device's own name, or for an emulated device this "
        "machine.",
    )
    user: str | None = Field(default=None, title="a login name", description="Who logs in; else ssh's configuration.")
    port: int | None = Field(
        default=None, ge=1, le=65535, title="a port number", description="Of its SSH server; else ssh's configuration."
    )
    ssh_config: str | None = Field(
        default=None,
        title="the path of an ssh configuration file",
        description="Instead of ~/.ssh/config; relative to this file.",
    )
    become: bool | None = Field(
        default=None, title="true or false", description="Whether provisioning may use sudo there (default: true)."
    )
    via: str | None = Field(
        default=None,
        title="the name of another device",
        description="Fetch blocks and wheels through that device of the same site, where the uplink is thin.",
    )
    python: str | None = Field(
        default=None,
        title="the path of an interpreter on the device",
        description="One that has everything installed; without it provisioning makes an environment.",
    )
    folder: str | None = Field(
        default=None,
        title="a path on the device",
        description=f"Where the testbed keeps its files there (default: {DEVICE_FOLDER} below the user's home).",
    )
    power_mode: str | None = Field(
        default=None,
        title="the name of a power mode such as 15W",
        description="Set by provisioning; without it left as it is.",
    )
    meter: Annotated[MeterName | dict[MeterName, dict[str, Any]] | None, BeforeValidator(_meters_told)] = Field(
        default=None,
        title="the name of a meter such as ina3221, a mapping from names to settings, or none",
        description="What reads its power: files of testbed/meters; the first one's energy is the device's. Without it "
        "the sensors of a Jetson or Raspberry Pi, where its profile names them; `none`: no meter.",
    )
    image: ImageEntry | None = Field(
        default=None,
        title="a mapping such as {address: 192.0.2.11/24}",
        description="What `testbed image render` puts into the files of its card.",
    )


class InventoryFile(FileModel):
    """The devices of a lab."""

    defaults: DeviceEntry = Field(
        default=DeviceEntry(),
        title="a mapping of device settings",
        description="Holds where a device says nothing else.",
    )
    devices: dict[Name, DeviceEntry] = Field(
        min_length=1,
        title="at least one device: a mapping from its name to its settings",
        description="Every device by its name.",
    )


class ProfileFile(FileModel):
    """Data about a board's model (see testbed.inventory.HardwareProfile)."""

    title: str = Field(title="the board's name for people")
    memory: Bytes = Field(title=EXPECTED, description="What is soldered on.")
    usable_memory: Bytes = Field(title=EXPECTED, description="MemTotal, as Linux sees it.")
    cores: int = Field(ge=1, title="a whole number from 1")
    architecture: str = Field(default="aarch64", title="a machine name such as aarch64")
    compatible: list[str] = Field(
        default=[],
        title="a list of texts such as p3767-0005",
        description="The board's device tree names one of them as `compatible`; without it that is not looked at.",
    )
    l4t: list[int] = Field(
        default=[],
        title="a list of whole numbers such as 36",
        description="Jetson: the major releases of L4T that this was written for; on another one there is a note.",
    )
    accelerator: Literal["cuda"] | None = Field(default=None, title='"cuda", or nothing')
    accelerator_detail: str | None = Field(default=None, title="text")
    rails: dict[str, str] = Field(
        default={},
        title="a mapping from each power rail to its sensor",
        description="By the board's own names.",
    )
    total_rails: list[str] = Field(
        default=[],
        title="a list of names of rails",
        description="Their sum is the board's power at the measurement point.",
    )
    measurement_point: Literal["module_rail", "soc_pmic"] | None = Field(
        default=None, title='"module_rail", "soc_pmic" or nothing'
    )
    power_modes: list[str] = Field(default=[], title="a list of names of power modes")
    super_power_modes: list[str] = Field(default=[], title="a list of names of power modes")
    cgroup_default: Literal["v1", "v2", "off"] = Field(title='"v1", "v2" or "off"')
    peak_source: Literal["cgroup2_peak", "cgroup1_max_usage", "sampled"] = Field(
        title='"cgroup2_peak", "cgroup1_max_usage" or "sampled"'
    )
    swap_default: str = Field(title="text")
    python: str = Field(title='a version such as "3.11", in quotes')
    torch_source: str = Field(title="text")
    unverified: list[str] = Field(
        default=[], title="a list of names of fields", description="What no cited source holds up."
    )


def default_inventory() -> Path:
    """The inventory that comes with the package: four emulated devices."""
    return data_folder("inventory") / "emulated.yaml"


def load_inventory(path: Path) -> Inventory:
    """Read an inventory file with its profiles; raises ConfigError."""
    file = read_file(path, InventoryFile, "an inventory")
    devices = [_device(path, name, entry, file.defaults) for name, entry in file.devices.items()]
    for device in devices:
        _check_via(path, device, devices)
    return Inventory(tuple(devices), source=str(path))


def load_image_settings(path: Path) -> dict[str, ImageSettings]:
    """What an inventory says about its devices' images, by device; raises ConfigError."""
    file = read_file(path, InventoryFile, "an inventory")
    return {name: _image_settings(path, _merged(entry, file.defaults).image) for name, entry in file.devices.items()}


def load_profile(path: Path) -> HardwareProfile:
    """Read one hardware profile; its name is the file's.  Raises ConfigError."""
    file = read_file(path, ProfileFile, "a hardware profile")
    profile = HardwareProfile(
        name=path.stem,
        memory_bytes=file.memory,
        usable_memory_bytes=file.usable_memory,
        rails=tuple(PowerRail(name, source) for name, source in file.rails.items()),
        **{key: _hashable(getattr(file, key)) for key in _same_names()},
    )
    _check_profile(path, profile)
    return profile


def profiles(inventory: Path) -> tuple[str, ...]:
    """The names of the profiles that an inventory may use: the catalogue's, and those beside it."""
    return tuple(_profile_files(inventory))


def load_named_profile(inventory: Path, name: str) -> HardwareProfile:
    """One of `profiles`; raises ConfigError."""
    return load_profile(_profile_files(inventory)[name])


def json_schema() -> dict[str, Any]:
    """The published schema of the inventory file (inventory/schema.json), for editors."""
    return published("Inventory of the testbed", InventoryFile)


def profile_schema() -> dict[str, Any]:
    """The published schema of a hardware profile (inventory/profile.schema.json), for editors."""
    return published("Hardware profile of a board", ProfileFile)


def published(title: str, model: type[FileModel]) -> dict[str, Any]:
    """The JSON Schema of a file, as editors want it."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **model.model_json_schema(), "title": title}


def _same_names() -> Iterator[str]:
    nouns = {field.name for field in fields(HardwareProfile)} - {"rails"}
    return (key for key in ProfileFile.model_fields if key in nouns)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_profile(path: Path, profile: HardwareProfile) -> None:
    rails = [rail.name for rail in profile.rails]
    for name in profile.total_rails:
        if name not in rails:
            raise ConfigError(complaint(path, ["total_rails"], f"names from rails ({', '.join(rails)})", name))
    for name in profile.unverified:
        if name not in ProfileFile.model_fields:
            raise ConfigError(f"{path}: unverified: no field {name!r}; {did_you_mean(name, ProfileFile.model_fields)}")
    if profile.usable_memory_bytes > profile.memory_bytes:
        most, got = format_bytes(profile.memory_bytes), format_bytes(profile.usable_memory_bytes)
        raise ConfigError(complaint(path, ["usable_memory"], f"at most the board's memory ({most})", got))


def _device(path: Path, name: str, own: DeviceEntry, defaults: DeviceEntry) -> Device:
    entry = _merged(own, defaults)
    budget = entry.budget or BudgetEntry()
    device = Device(
        name=name,
        kind=_known_kind(path, name, _stated(path, name, "kind", entry.kind)),
        profile=_profile(path, name, _stated(path, name, "profile", entry.profile)),
        budget=Budget(_stated(path, name, "budget.memory", budget.memory), budget.cores),
        clients=entry.clients or 1,
        accelerator=entry.accelerator or "cpu",
        threads=entry.threads or 1,
        tags=frozenset(entry.tags or ()),
        access=_access(path, name, entry),
        python=entry.python,
        folder=entry.folder or DEVICE_FOLDER,
        power_mode=entry.power_mode,
        meters=_meters(path, name, entry),
    )
    _check_fits_board(path, device)
    return device


def _meters(path: Path, name: str, entry: DeviceEntry) -> tuple[MeterChoice, ...]:
    """Those that the inventory names, each with settings that it takes; else the board's own."""
    if entry.meter is None:
        own = () if entry.kind in _ANY_MACHINE else _profile(path, name, entry.profile or "").rails
        sensors = dict.fromkeys(rail.source.partition("@")[0] for rail in own)
        return tuple(MeterChoice(_OWN_METER[sensor]) for sensor in sensors if sensor in _OWN_METER)
    if entry.meter == NO_METER:
        return ()
    stated = {entry.meter: {}} if isinstance(entry.meter, str) else entry.meter
    return tuple(_meter(path, name, meter, settings) for meter, settings in stated.items())


def _meter(path: Path, name: str, meter: str, stated: Mapping[str, Any]) -> MeterChoice:
    settings = dict(stated)
    point = settings.pop("point", None)
    where = ("devices", name, "meter", meter)
    if point is not None and point not in POINTS:
        raise ConfigError(complaint(path, (*where, "point"), f"one of {', '.join(POINTS)}", point))
    if isinstance(settings.get("file"), str):  # as everything in an inventory: relative to it
        settings["file"] = str((path.parent / Path(settings["file"]).expanduser()).absolute())
    try:
        check(meter, settings)
        make(meter, settings)
    except UsageError as error:
        raise ConfigError(f"{path}: {'.'.join(where)}: {error}") from None
    return MeterChoice(meter, settings, point)


def _access(path: Path, name: str, entry: DeviceEntry) -> Access | None:
    """How to reach it; an emulated device without a host is on the controller's own machine."""
    if entry.host is None and entry.kind == "emulated":
        return None
    config = str((path.parent / Path(entry.ssh_config).expanduser()).absolute()) if entry.ssh_config else None
    return Access(
        host=entry.host or name,
        user=entry.user,
        port=entry.port,
        ssh_config=config,
        become=entry.become is not False,
        via=entry.via,
    )


def _image_settings(path: Path, entry: ImageEntry | None) -> ImageSettings:
    stated = {key: _hashable(value) for key, value in (entry or ImageEntry()) if value is not None}
    files = tuple(str((path.parent / Path(file).expanduser()).absolute()) for file in stated.pop("authorized_keys", ()))
    return ImageSettings(authorized_keys=files, **stated)


def _check_via(path: Path, device: Device, devices: Sequence[Device]) -> None:
    via = device.access.via if device.access is not None else None
    others = [other.name for other in devices if other.access is not None and other.name != device.name]
    if via is not None and via not in others:
        raise ConfigError(_unknown(path, ("devices", device.name, "via"), via, others))
    for other in devices:
        if other.name == via:
            _check_way(path, device, other)


def _check_way(path: Path, device: Device, through: Device) -> None:
    """One step, and to another machine: else content would go round in circles, or nowhere."""
    here, there = device.access, through.access
    if here is None or there is None:
        return
    keys = ("devices", device.name, "via")
    if there.via is not None:
        what = f"a device without a `via` of its own ({through.name} has `via: {there.via}`)"
        raise ConfigError(complaint(path, keys, what, through.name))
    if (here.host, here.port) == (there.host, there.port):
        what = f"a device on another host ({through.name} is on {there.host} too; leave `via` out)"
        raise ConfigError(complaint(path, keys, what, through.name))


def _merged(own: DeviceEntry, defaults: DeviceEntry) -> DeviceEntry:
    budget = _laid_over(defaults.budget or BudgetEntry(), own.budget or BudgetEntry())
    image = _laid_over(defaults.image or ImageEntry(), own.image or ImageEntry())
    return _laid_over(defaults, own).model_copy(update={"budget": budget, "image": image})


def _laid_over(below: Entry, above: Entry) -> Entry:
    stated = {key: value for key in type(above).model_fields if (value := getattr(above, key)) is not None}
    return below.model_copy(update=stated)


def _stated(path: Path, name: str, key: str, value: Value | None) -> Value:
    if value is None:
        keys = ("devices", name, *key.split("."))
        raise ConfigError(complaint(path, keys, expected_at(InventoryFile, keys) or "a value", None))
    return value


def _known_kind(path: Path, name: str, kind: str) -> str:
    if kind not in device_kinds():
        raise ConfigError(_unknown(path, ("devices", name, "kind"), kind, device_kinds()))
    return kind


def _profile(path: Path, name: str, profile: str) -> HardwareProfile:
    found = _profile_files(path)
    if profile not in found:
        raise ConfigError(_unknown(path, ("devices", name, "profile"), profile, found))
    return load_profile(found[profile])


def _profile_files(inventory: Path) -> dict[str, Path]:
    """Every profile by its name; one beside the inventory hides one of the catalogue."""
    places = (data_folder("inventory") / "profiles", inventory.parent / "profiles")
    return {file.stem: file for place in places for file in sorted(place.glob("*.yaml"))}


def _unknown(path: Path, keys: Sequence[str], got: str, known: Iterable[str]) -> str:
    expected = expected_at(InventoryFile, keys) or "a known name"
    return f"{complaint(path, keys, expected, got)}; {did_you_mean(got, known)}"


def _check_fits_board(path: Path, device: Device) -> None:
    board, budget = device.profile, device.budget
    if budget.memory_bytes > board.usable_memory_bytes:
        most = f"at most {format_bytes(board.usable_memory_bytes)} (the usable memory of {board.name})"
        got = format_bytes(budget.memory_bytes)
        raise ConfigError(complaint(path, ("devices", device.name, "budget", "memory"), most, got))
    for keys, got_cores in ((("budget", "cores"), budget.cores), (("threads",), device.threads)):
        if got_cores is not None and got_cores > board.cores:
            most = f"at most {board.cores} (the cores of {board.name})"
            raise ConfigError(complaint(path, ("devices", device.name, *keys), most, got_cores))
