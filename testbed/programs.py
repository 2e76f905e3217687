"""Programs of this machine that the testbed calls: where they are, and which lack."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from testbed.errors import UsageError

#: Where programs are, whatever the caller's PATH says: not every user's has the administrators' folders.
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LAST_CHARACTERS = 400


def find(name: str) -> str | None:
    """Where a program is."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SEARCH_PATH}")


def lacking(packages: Mapping[str, str]) -> list[str]:
    """Of programs, with the package that each is in, those that are not there: "mcopy (package mtools)"."""
    return [f"{name} (package {package})" for name, package in packages.items() if find(name) is None]


def run(command: Sequence[str]) -> None:
    """Raises UsageError with the last that the program said."""
    name, *words = command
    program = find(name)
    if program is None:
        raise UsageError(f"there is no program {name} on this machine")
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise UsageError(f"{name} failed ({done.returncode}): {done.stderr.strip()[-_LAST_CHARACTERS:]}")
