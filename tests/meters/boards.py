"""Trees of boards: those of the virtual lab's personas, and the ones beside this file; sensors made up for a test."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from testbed.lab.persona import load_persona, personas

TREES = Path(__file__).parent / "trees"


def board(name: str, folder: Path) -> Path:
    """A copy of a board's tree below `folder`, to be changed as a test needs it."""
    root = folder / name
    if name in personas():
        load_persona(name).unfold(root)
    else:
        shutil.copytree(TREES / name, root)
    return root


def chip_folder(root: Path, chip: str = "1-0040") -> Path:
    """The folder of an INA3221's files, whatever its number is."""
    device = root / "sys/bus/i2c/devices" / chip
    (found,) = (*device.glob("hwmon/hwmon*"), *device.glob("iio:device*"))
    return found


def break_file(path: Path) -> None:
    """Reading it then gives a real EIO: nothing is mapped at the start of a process's memory."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def sensor(root: Path, number: int, name: str, **files: object) -> Path:
    """A chip in /sys/class/hwmon with these files."""
    folder = root / f"sys/class/hwmon/hwmon{number}"
    folder.mkdir(parents=True)
    for file, value in {"name": name, **files}.items():
        (folder / file).write_text(f"{value}\n")
    return folder


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """One that everybody may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
