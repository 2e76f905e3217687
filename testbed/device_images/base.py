"""The publisher's file that an image starts from: whether it is that file, and what is in it.

A file of checksums has lines `digest  name` or `digest *name` (SHA256SUMS), or one digest alone (IMAGE.img.xz.sha256).
SHA-256 and SHA-512 are told apart by their length; digests of any other kind are passed over.
"""

from __future__ import annotations

import hashlib
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from testbed.device_images.catalogue import Base
from testbed.errors import UsageError
from testbed.spelling import did_you_mean

#: Called with what is being done, bytes done so far, and bytes in all.
Progress = Callable[[str, int, int], None]

_ALGORITHMS = {64: "SHA-256", 128: "SHA-512"}  # by the digits of a digest
_LINE = re.compile(r"([0-9a-fA-F]+)(?:[ \t]+\*?(\S.*))?")
_XZ = b"\xfd7zXZ\x00"
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Checksum:
    """One line of a file of checksums; a digest alone has no name."""

    digest: str
    name: str | None

    @property
    def algorithm(self) -> str:
        return _ALGORITHMS[len(self.digest)]


@dataclass(frozen=True)
class Verified:
    """A file whose digest is the one that was expected."""

    algorithm: str
    digest: str
    told_by: str  # where the expected one stood

    def __str__(self) -> str:
        return f"its {self.algorithm} is the one in {self.told_by}: {self.digest}"


def verify(file: Path, checksums: Path | None, base: Base, tell: Progress) -> Verified:
    """Compare a file with its publisher's file of checksums, or without one with the catalogue.

    Raises UsageError: it is not named there, its digest is another one, there is nothing to compare it with, or one of
    the files cannot be read.
    """
    if not file.is_file():
        raise UsageError(f"--base: there is no file {file}")
    expected, told_by = _expected(file, checksums, base)
    found = _digest(file, expected.algorithm, tell)
    if found != expected.digest:
        raise UsageError(
            f"{file} is damaged, or it is not the publisher's file: its {expected.algorithm} is {found}, and {told_by} "
            f"says {expected.digest}; get it again from {base.page}"
        )
    return Verified(expected.algorithm, found, told_by)


def parse_checksums(text: str) -> tuple[Checksum, ...]:
    """Every SHA-256 and SHA-512 in a file of checksums, with the names of files without their folders."""
    lines = (_LINE.fullmatch(line.strip()) for line in text.splitlines())
    return tuple(
        Checksum(line[1].lower(), Path(line[2]).name if line[2] else None)
        for line in lines
        if line is not None and len(line[1]) in _ALGORITHMS
    )


def unpack(file: Path, output: BinaryIO, tell: Progress) -> None:
    """Write what is in an .img or .img.xz, a piece at a time; raises UsageError for one that is cut short."""
    total = file.stat().st_size
    with _opened(file) as packed, _unpacked(packed) as plain:
        for piece in _pieces(file, plain):
            output.write(piece)
            tell("unpacking", packed.tell(), total)


# ── what is expected, and what is there ──────────────────────────────────────────────────────────────────────────────
def _expected(file: Path, checksums: Path | None, base: Base) -> tuple[Checksum, str]:
    """A file of checksums counts more than the catalogue, which may know an older file only."""
    if checksums is not None:
        return _of_file(file.name, parse_checksums(_text_of(checksums))), "the file of checksums"
    if base.sha256 is not None:
        return Checksum(base.sha256, None), "the catalogue"
    raise UsageError(
        f"there is nothing to compare {file} with: give its publisher's file of checksums by `--checksums FILE`; "
        f"it is at {base.checksums or base.page}"
    )


def _text_of(checksums: Path) -> str:
    try:
        return checksums.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"--checksums: {checksums} cannot be read: {reason}") from None


def _of_file(name: str, checksums: tuple[Checksum, ...]) -> Checksum:
    if not checksums:
        raise UsageError("expected a file of checksums by SHA-256 or SHA-512, lines of `digest  name`; it has none")
    found = [each for each in checksums if each.name == name]
    if not found and len(checksums) == 1 and checksums[0].name is None:
        found = list(checksums)
    if not found:
        names = {each.name for each in checksums if each.name is not None}
        raise UsageError(
            f"{name} is not named in the file of checksums; {did_you_mean(name, names)}; a file keeps the name that "
            "its publisher gave it"
        )
    return max(found, key=lambda each: len(each.digest))


def _digest(file: Path, algorithm: str, tell: Progress) -> str:
    total, done = file.stat().st_size, 0
    digest = hashlib.new(algorithm.replace("-", "").lower())
    with _opened(file) as stream:
        for piece in _pieces(file, stream):
            digest.update(piece)
            done += len(piece)
            tell("verifying", done, total)
    return digest.hexdigest()


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        stream = file.open("rb")
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    with stream:
        yield stream


def _unpacked(packed: BinaryIO) -> AbstractContextManager[IO[bytes]]:
    by_xz = packed.read(len(_XZ)) == _XZ
    packed.seek(0)
    return lzma.open(packed) if by_xz else nullcontext(packed)


def _pieces(file: Path, stream: IO[bytes]) -> Iterator[bytes]:
    try:
        while piece := stream.read(_PIECE_BYTES):
            yield piece
    except (EOFError, lzma.LZMAError) as error:
        raise UsageError(f"{file} cannot be unpacked, it is damaged or cut short: {error}") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
