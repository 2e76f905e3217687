"""Which images there are: device_images/catalogue.yaml, read and checked."""

from __future__ import annotations

import fnmatch
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from testbed.errors import UsageError
from testbed.package_data import data_folder
from testbed.spelling import did_you_mean
from testbed.yaml_file import FileModel, read_file

_SHA256 = r"^[0-9a-f]{64}$"


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
