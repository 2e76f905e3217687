"""Which images there are: device_images/catalogue.yaml, read and checked."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from testbed.errors import UsageError
from testbed.package_data import data_folder
from testbed.spelling import did_you_mean
from testbed.yaml_file import FileModel, read_file

_SHA256 = r"^[0-9a-f]{64}$"
#: In a way's command: where the flash configuration's name goes.
CONFIGURATION = "{configuration}"


class Base(FileModel):
    """The publisher's file that an image starts from."""

    url: str | None = Field(title="the address of a file, or null where only a page is published")
    page: str = Field(title="the address of the publisher's page")
    checksums: str | None = Field(
        title="the address of the publisher's file of checksums, or null",
        description="Lines of `digest  name`, by SHA-256 or SHA-512.",
    )
    sha256: Annotated[str, Field(pattern=_SHA256)] | None = Field(
        title="64 hexadecimal digits as the publisher gives them, or null",
        description="null: it was not read from the publisher; whoever uses the file compares with `checksums`.",
    )
    size_bytes: int | None = Field(title="a number of bytes as the publisher gives it, or null")


@dataclass(frozen=True)
class WayToFlash:
    """How one board is written: `command` with the configuration in its place is run in NVIDIA's folder."""

    medium: str
    command: tuple[str, ...]
    configuration: str


class Way(FileModel):
    """How some boards are written."""

    medium: str = Field(title="where the system goes, such as nvme")
    command: list[str] = Field(
        title=f'a list of words such as ["./flash.sh", "{CONFIGURATION}", "internal"]',
        description=f"Run in NVIDIA's folder; {CONFIGURATION} stands for the flash configuration's name.",
        min_length=1,
    )
    configurations: dict[str, str] = Field(
        title="a mapping from names of profiles, `*` allowed, to names of flash configurations", min_length=1
    )
    super_configurations: dict[str, str] = Field(
        default={},
        title="a mapping from names of profiles, `*` allowed, to names of flash configurations",
        description="Those that bring the table of power modes which the profile calls `super_power_modes`.",
    )


class Flash(FileModel):
    """How NVIDIA's tools write a Jetson."""

    release: int = Field(title="a major release of Jetson Linux such as 36")
    ways: list[Way] = Field(
        title="a list of ways to write a board",
        description="A board's default is the first one that has a configuration for its profile.",
        min_length=1,
    )

    def ways_for(self, profile: str, *, with_super_modes: bool) -> tuple[WayToFlash, ...]:
        """The ways to write a board of a profile, the preferred one first."""
        found = []
        for way in self.ways:
            stock = _for(profile, way.configurations)
            wanted = _for(profile, way.super_configurations) if with_super_modes else None
            if stock is not None:
                found.append(WayToFlash(way.medium, tuple(way.command), wanted or stock))
        return tuple(found)


def _for(profile: str, by_profile: Mapping[str, str]) -> str | None:
    """What the first pattern that fits a profile leads to."""
    return next((name for pattern, name in by_profile.items() if fnmatch.fnmatchcase(profile, pattern)), None)


class Image(FileModel):
    """One image of the catalogue."""

    title: str = Field(title="the image's name for people")
    recipe: str = Field(title="the name of a folder of device_images")
    kind: Literal["raspberry_pi", "jetson", "generic"] = Field(title='"raspberry_pi", "jetson" or "generic"')
    profiles: list[str] = Field(title="a list of names of profiles, `*` allowed", min_length=1)
    system: str = Field(title="the system's name and release")
    base: Base = Field(title="the publisher's file")
    media: list[str] = Field(title='a list such as ["SD card", "NVMe"]', min_length=1)
    firmware: str | None = Field(title="the firmware that it needs, or null for any")
    flash: Flash | None = Field(
        default=None, title="a mapping with `release` and `ways`", description="Of a board that a host writes over USB."
    )
    tried_on: str = Field(title="what it was tried on, or nothing yet")
    sources: list[str] = Field(title="a list of addresses that hold up what stands here", min_length=1)


class CatalogueFile(FileModel):
    """All images."""

    images: dict[str, Image] = Field(title="a mapping from an image's name to what is known of it", min_length=1)


def folder() -> Path:
    """Where the recipes are."""
    return data_folder("device_images")


@cache
def images() -> dict[str, Image]:
    """Every image by its name, in the catalogue's order; raises ConfigError."""
    return read_file(folder() / "catalogue.yaml", CatalogueFile, "a catalogue of images").images


def named(name: str) -> Image:
    """Raises UsageError for an image that is not there."""
    found = images().get(name)
    if found is None:
        raise UsageError(f"there is no image {name!r}; {did_you_mean(name, images())}")
    return found


def fitting(profile: str) -> tuple[str, ...]:
    """The names of the images for a hardware profile, the preferred one first."""
    return tuple(
        name for name, image in images().items() if any(fnmatch.fnmatchcase(profile, each) for each in image.profiles)
    )


def choose(profile: str, name: str | None) -> str:
    """The image that is asked for, or the first one for the profile; raises UsageError where they do not fit."""
    fits = fitting(profile)
    if name is not None:
        named(name)
        if name not in fits:
            raise UsageError(f"the image {name} is not for {profile}; there is {', '.join(fits) or 'none'} for it")
        return name
    if not fits:
        known = sorted({each for image in images().values() for each in image.profiles})
        raise UsageError(f"there is no image for the profile {profile}; there are images for {', '.join(known)}")
    return fits[0]
