"""The boot partition in the image of a whole card: a FAT file system within a file, read and written by mtools.

No right is needed for that and nothing is mounted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import UsageError

#: What tells the boot partition of a Raspberry Pi from any other FAT partition.
COMMAND_LINE = "cmdline.txt"
_MARKS = (COMMAND_LINE, "config.txt")
_TOOL, _PACKAGE = "mcopy", "mtools"
_SECTOR_BYTES = 512
# The partition table of a PC (MBR): four entries of 16 bytes, and two bytes by which it is known.
_ENTRIES = range(446, 510, 16)
_SIGNATURE = b"\x55\xaa"
_UNUSED, _GPT = 0x00, 0xEE
_FAT_TYPES = {0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E}
#: The size that the file system was made for need not be that of the partition, nor its geometry any drive's.
_SIZES = {"MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"}
#: The first day that FAT can tell is every file's, so that an image that is built again is the same byte by byte.
_TIMES = {"SOURCE_DATE_EPOCH": "315532800", "TZ": "UTC"}


def require_tool() -> None:
    """Raises UsageError where mtools is lacking."""
    if shutil.which(_TOOL) is None:
        raise UsageError(f"{_TOOL} is not installed, which writes into the boot partition: apt install {_PACKAGE}")


@dataclass(frozen=True)
class BootPartition:
    """A FAT file system that begins at an offset in a file."""

    card: Path
    offset_bytes: int

    def read(self, name: str) -> bytes | None:
        """None for a file that is not there."""
        done = self._mcopy(f"::{name}", "-")
        return done.stdout if done.returncode == 0 else None

    def write(self, name: str, content: bytes) -> None:
        """Put a file there, in place of one of that name; raises UsageError where it is not there afterwards."""
        done = self._mcopy("-o", "-", f"::{name}", content=content)
        if done.returncode != 0 or self.read(name) != content:
            said = " ".join(done.stderr.decode(errors="replace").split())
            raise UsageError(f"{name} cannot be written to the boot partition: {said or 'it is not as it was written'}")

    def _mcopy(self, *words: str, content: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        drive = f"{self.card.resolve()}@@{self.offset_bytes}"
        return subprocess.run(
            [_TOOL, "-i", drive, *words], input=content, capture_output=True, check=False,
            env={**os.environ, **_SIZES, **_TIMES},
        )  # fmt: skip


def find(card: Path) -> BootPartition | None:
    """The partition with cmdline.txt and config.txt in it, or None."""
    for offset in _fat_offsets(card):
        partition = BootPartition(card, offset)
        if all(partition.read(mark) is not None for mark in _MARKS):
            return partition
    return None


def end_bytes(card: Path) -> int:
    """How long an image must be to hold all that its partition table names; 0 without one."""
    ends = (_number(entry[8:12]) + _number(entry[12:16]) for entry in _entries(card))
    return max((end * _SECTOR_BYTES for end in ends), default=0)


def with_words(command_line: str, added: str) -> str:
    """A kernel's command line with the words that it lacks, as apply.sh does it.

    The kernel reads one line, whatever else stands in the file.
    """
    line = command_line.partition("\n")[0].strip()
    for word in added.split():
        if f" {word} " not in f" {line} ":
            line = f"{line} {word}".lstrip()
    return line + "\n"


def _fat_offsets(card: Path) -> Iterator[int]:
    for entry in _entries(card):
        if entry[4] in _FAT_TYPES:
            yield _number(entry[8:12]) * _SECTOR_BYTES


def _entries(card: Path) -> Iterator[bytes]:
    """The entries of its partition table that are in use; the one that stands for a GPT is of no partition."""
    with card.open("rb") as file:
        table = file.read(_SECTOR_BYTES)
    if table[-len(_SIGNATURE) :] != _SIGNATURE or len(table) != _SECTOR_BYTES:
        return
    for start in _ENTRIES:
        entry = table[start : start + 16]
        if entry[4] not in {_UNUSED, _GPT}:
            yield entry


def _number(field: bytes) -> int:
    return int.from_bytes(field, "little")
