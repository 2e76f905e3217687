"""A run that has ended is sealed: manifest.json holds the SHA-256 of every file that does not change any more.

    {"config.json": "9f86d0…", "results/lora-…-r0-c0.json": "60303a…", …}

The manifest's own SHA-256 stands in status.json (facts: "sealed"), so that neither can be replaced alone.  It tells
what has changed since, by mistake or on purpose; it is no signature: whoever may write the folder may seal it again.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.durable import disk_errors_in_words, read_json, write_json
from testbed.errors import StoreError
from testbed.job_energy import record_energies

if TYPE_CHECKING:
    from testbed.store import RunFolder

MANIFEST = "manifest.json"
#: In a run's status: the SHA-256 of its manifest; None once the run goes on.
SEALED = "sealed"
#: What goes on changing: how the run stands, what devices emulated here keep, what is spooled for a round under way,
#: and what is measured of the finished model afterwards.
_CHANGING_FILES = frozenset({"status.json", MANIFEST})
_CHANGING_FOLDERS = frozenset({"nodes", "updates", "evaluations"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Differences:
    """Files of a run that are not as they were sealed, by their paths within its folder."""

    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    additional: tuple[str, ...] = ()

    @property
    def none(self) -> bool:
        return not (self.changed or self.missing or self.additional)


def seal(folder: RunFolder) -> bool:
    """Derive what the end of a run derives, and seal its files; whether that was possible.

    A run that cannot be sealed (a full disk, unreadable samples) is not lost for it: the log says why.
    """
    try:
        record_energies(folder)
        write_json(folder.path / MANIFEST, hashes(folder.path), sync=True)
        folder.note(**{SEALED: sha256_of(folder.path / MANIFEST)})
    except StoreError as error:
        logger.warning("run %s is stored, but not sealed: %s", folder.run_id, error)
        return False
    return True


def unseal(folder: RunFolder) -> None:
    """Take the manifest away from a run that goes on: what is under way is not as it was."""
    with disk_errors_in_words(folder.path):
        (folder.path / MANIFEST).unlink(missing_ok=True)


def hashes(folder: Path) -> dict[str, str]:
    """Path within the folder → SHA-256 of every file that the seal covers, by name."""
    with disk_errors_in_words(folder):
        return {name: sha256_of(folder / name) for name in sorted(_sealed_names(folder))}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with disk_errors_in_words(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stored_manifest(folder: Path) -> dict[str, str]:
    """What was sealed; raises StoreError when the manifest is missing or is none."""
    content = read_json(folder / MANIFEST)
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise StoreError(f"{folder / MANIFEST}: expected a hash for every path")
    return content


def differences(folder: Path) -> Differences:
    """What is not as it was sealed; raises StoreError when the manifest, or a file, cannot be read."""
    sealed, now = stored_manifest(folder), hashes(folder)
    return Differences(
        changed=tuple(name for name in sealed if name in now and now[name] != sealed[name]),
        missing=tuple(name for name in sealed if name not in now),
        additional=tuple(name for name in now if name not in sealed),
    )


def _sealed_names(folder: Path) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path.as_posix() for path in paths if not _changes(path)]


def _changes(path: Path) -> bool:
    """Whether a file may still change; one whose name begins with a dot is half written, and counts for nothing."""
    return (
        path.parts[0] in _CHANGING_FOLDERS
        or path.as_posix() in _CHANGING_FILES
        or any(part.startswith(".") for part in path.parts)
    )
