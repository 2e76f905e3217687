"""A lab of virtual machines for tests: one board, of the architecture whose image is built quickly here."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.device_images import debian
from testbed.errors import UsageError
from testbed.lab.machines.lab import MachineLab, MachineWish
from testbed.lab.machines.qemu import check_machine

MIB = 1 << 20


@functools.cache
def why_no_vm() -> str | None:
    """None where a virtual machine can be made, and the image that it starts from; else what is in the way."""
    try:
        architecture = debian.native_architecture()
        check_machine(architecture)
        if debian.kept(architecture) is None:
            debian.check_machine(architecture)
    except UsageError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MachineLab]:
    """One board without Python packages, as `testbed lab up --vm` leaves it."""
    folder: Path = tmp_path_factory.mktemp("machines") / "lab"
    wish = MachineWish(memory_bytes=1024 * MIB, architecture=debian.native_architecture(), environment=False)
    with MachineLab.up(folder, wish) as lab:
        yield lab


def why_not_whole(architecture: str) -> str | None:
    """Why a board of another architecture cannot be made here."""
    try:
        check_machine(architecture)
        if debian.kept(architecture) is None:
            debian.check_machine(architecture)
    except UsageError as error:
        return str(error)
    return None
