"""The publisher's file that an image starts from: whether it is that file, and what is in it.

A file of checksums has lines `digest  name` or `digest *name` (SHA256SUMS), or one digest alone (IMAGE.img.xz.sha256).
SHA-256 and SHA-512 are told apart by their length; digests of any other kind are passed over, and told where there are
no better ones.
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

from testbed.device_images.catalogue import Base, Image
from testbed.errors import UsageError

#: Called with what is being done, bytes done so far, and bytes in all.
Progress = Callable[[str, int, int], None]

_ALGORITHMS = {64: "SHA-256", 128: "SHA-512"}  # by the digits of a digest
_TOO_WEAK = {32: "MD5", 40: "SHA-1"}  # made to be forged by now
_LINE = re.compile(r"([0-9a-fA-F]+)(?:[ \t]+\*?(\S.*))?")
_XZ = b"\xfd7zXZ\x00"
#: What a file begins with that is packed in another way.
_OTHER_PACKINGS = {
    b"PK\x03\x04": "zip",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7-Zip",
}
_NAMES_SHOWN = 3
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


def refuse_base(image: Image, base: Path | None, checksums: Path | None) -> None:
    """Raises UsageError where an image starts from no publisher's file, and one is given."""
    if image.kind == "generic" and (base is not None or checksums is not None):
        raise UsageError(f"{image.title}: it is built from Debian's packages; it takes no --base and no --checksums")


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
    return tuple(
        Checksum(digest.lower(), Path(name).name if name else None)
        for digest, name in _lines(text)
        if len(digest) in _ALGORITHMS
    )


def require_image(file: Path) -> None:
    """Raises UsageError for what is packed in another way than by xz."""
    with _opened(file) as stream:
        start = stream.read(len(_XZ))
    packing = next((name for mark, name in _OTHER_PACKINGS.items() if start.startswith(mark)), None)
    if packing is not None:
        raise UsageError(
            f"--base: expected an .img.xz or .img, and {file} is packed by {packing}: unpack it, and give the image in "
            "it with that image's own checksum"
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
        return _of_file(file.name, checksums, base), "the file of checksums"
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


def _lines(text: str) -> Iterator[tuple[str, str | None]]:
    """Digest and name."""
    lines = (_LINE.fullmatch(line.strip()) for line in text.splitlines())
    return ((line[1], line[2]) for line in lines if line is not None)


def _of_file(name: str, checksums: Path, base: Base) -> Checksum:
    text = _text_of(checksums)
    known = parse_checksums(text)
    where = f"get the publisher's file of checksums for {name}; it is at {base.checksums or base.page}"
    if not known:
        weak = sorted({_TOO_WEAK[len(digest)] for digest, _ in _lines(text) if len(digest) in _TOO_WEAK})
        found = f"digests by {' and '.join(weak)} only, which can be forged" if weak else "none"
        raise UsageError(
            f"--checksums: expected digests by SHA-256 or SHA-512, lines of `digest  name`; {checksums} has {found}; "
            f"{where}"
        )
    found_here = [each for each in known if each.name == name]
    if not found_here and len(known) == 1 and known[0].name is None:
        found_here = list(known)
    if not found_here:
        raise UsageError(f"--checksums: {checksums} is the file of checksums of {_others(known)}; {where}")
    return max(found_here, key=lambda each: len(each.digest))


def _others(known: tuple[Checksum, ...]) -> str:
    names = sorted({each.name for each in known if each.name is not None})
    if not names:
        return f"{len(known)} files that it does not name"
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


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
