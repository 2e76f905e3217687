"""A lab's folder: what is where in it, when a lab may be made there, and what of it may be removed.

lab.json is the mark of a lab: the first file that is made, and the last that is removed.  A folder without it is
somebody's own, whatever its files are called: none of them is overwritten or removed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from testbed.errors import LabError, UsageError

LAB_FILE = "lab.json"
INVENTORY, SSH_CONFIG, KNOWN_HOSTS, KEY = "inventory.yaml", "ssh_config", "known_hosts", "id_ed25519"
PROFILES, HOSTS = "profiles", "hosts"
TIME_SERVER = "time_server.json"  # of virtual machines: which process it is
_KEYS = {"made_of", "hosts"}  # of lab.json: every one has one of them
_FILES = (INVENTORY, SSH_CONFIG, KNOWN_HOSTS, KEY, f"{KEY}.pub", TIME_SERVER)


def has_lab(folder: Path) -> bool:
    """Whether there is a lab, be it whole, half made or half removed.

    What cannot be parsed was torn when its writer was killed; what can, and is none of ours, is somebody's own.
    """
    try:
        record = json.loads((folder / LAB_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    except ValueError:
        return True
    return isinstance(record, dict) and not _KEYS.isdisjoint(record)


def expect_free(folder: Path) -> None:
    """Raises UsageError for a file, and LabError for a folder with a lab or anything else in it."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"--folder: expected a folder, {there} is a file")
    if has_lab(folder):
        raise LabError(f"there is a lab in {folder}; see `testbed lab status`, and `testbed lab down` to remove it")
    if folder.is_dir() and (others := sorted(path.name for path in folder.iterdir())):
        names = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise LabError(f"{folder} holds other files ({names}) and no lab: name a new folder with --folder")


def claim(folder: Path, text: str) -> None:
    """Put the mark into a folder that is free: from now on `down` finds what is made there, and nobody else makes any.

    Raises LabError when somebody else was quicker.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / LAB_FILE).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise LabError(f"another `testbed lab up` makes a lab in {folder}; name a new folder with --folder") from None


def remove_files(folder: Path) -> None:
    """What a lab has in its folder, and nothing else that somebody may have put there.

    Raises LabError when something stays; its mark stays too then, so that it can be removed later.
    """
    if not has_lab(folder):
        return
    try:
        for name in (HOSTS, PROFILES):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        for name in (*_FILES, LAB_FILE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise LabError(
            f"the lab in {folder} cannot be removed: {error.filename or folder}: {error.strerror or error}; "
            "it may belong to another user (sudo)"
        ) from None
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()
