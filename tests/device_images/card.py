"""The image of a small card, as a publisher gives it: a partition table, a FAT partition, and another one after it."""

from __future__ import annotations

import hashlib
import lzma
import os
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.needed import need

TOOLS = ("mcopy", "mkfs.vfat", "sfdisk")  # of mtools, dosfstools, fdisk
COMMAND_LINE = "console=tty1 root=PARTUUID=1-02 rootwait"  # without an end of line, as it comes
NAME = "some-os-lite.img.xz"
_MIB_SECTORS = 2048
_START, _SECTORS = 2 * _MIB_SECTORS, 34 * _MIB_SECTORS  # as many clusters as FAT32 must have
OFFSET, END = _START * 512, (_START + _SECTORS) * 512


def need_tools() -> None:
    """Where they are lacking there is nothing to see, and in CI that is a failure."""
    need(*TOOLS)


def make_card(folder: Path, marks: dict[str, str] | None = None) -> Path:
    """An .img whose FAT partition has these files."""
    card = folder / "card.img"
    card.unlink(missing_ok=True)
    with card.open("wb") as file:
        file.truncate(END + (1 << 20))
    _run("sfdisk", "--quiet", card, given=f"label: dos\n,{_MIB_SECTORS},83\n{_START},{_SECTORS},c,*\n,,83\n")
    _run("mkfs.vfat", "-F", "32", "-s", "1", "--offset", _START, card, _SECTORS // 2)
    for name, text in (marks or {"cmdline.txt": COMMAND_LINE, "config.txt": "arm_64bit=1\n"}).items():
        _run("mcopy", "-i", f"{card}@@{OFFSET}", "-", f"::{name}", given=text)
    return card


def fill(card: Path) -> None:
    """Leave no room in the FAT partition."""
    for size in (1 << power for power in range(25, 8, -1)):
        with suppress(subprocess.CalledProcessError):
            _run("mcopy", "-i", f"{card}@@{OFFSET}", "-", f"::{size}", given="x" * size)


def publish(card: Path) -> tuple[Path, Path]:
    """As it is downloaded: packed, and with its file of checksums."""
    packed = card.with_name(NAME)
    packed.write_bytes(lzma.compress(card.read_bytes(), preset=0))
    checksums = card.with_name("SHA256SUMS")
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    checksums.write_text(f"{'0' * 64} *another-os.img.xz\n{digest} *{NAME}\n")
    return packed, checksums


def typed(card: Path, name: str) -> str:
    """What a file of the FAT partition holds."""
    return _run("mtype", "-i", f"{card}@@{OFFSET}", f"::{name}")


def _run(*words: object, given: str = "") -> str:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/sbin:/usr/sbin"}
    command = [str(word) for word in words]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True, env=environment).stdout
