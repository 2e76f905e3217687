"""The image of a Raspberry Pi's card: its publisher's, with the board's files in its boot partition."""

from __future__ import annotations

import shlex
from pathlib import Path

from testbed.device_images import boot_partition
from testbed.device_images.base import Progress, require_image, unpack, verify
from testbed.device_images.boot_partition import COMMAND_LINE, BootPartition, with_words
from testbed.device_images.build import Order
from testbed.errors import UsageError

_BOOT_FILES = "bootfs"
#: Words for the kernel's command line, not a file of the partition.
_ADDED_WORDS = "cmdline.append"


def build(order: Order, part: Path, tell: Progress) -> tuple[str, ...]:
    """Verify the publisher's file, unpack it, and do to its boot partition what apply.sh does to a card's."""
    base = _base_of(order)
    boot_partition.require_tool()
    if base.is_file():
        require_image(base)
    verified = verify(base, order.checksums, order.image.base, tell)
    with part.open("r+b") as card:
        unpack(base, card, tell)
    _refuse_short(part, base)
    _fill(_partition_of(part, base), order)
    image = shlex.quote(str(order.output))
    return (
        f"{order.output}: {order.image.title}, from {base.name}",
        str(verified),
        f"write it to a card:  sudo dd if={image} of=/dev/CARD bs=4M conv=fsync status=progress",
        'or by the Imager:    "Use custom", and no customisation, which would replace the files of this board',
    )


def _base_of(order: Order) -> Path:
    if order.base is None:
        raise UsageError(
            f"{order.image.title}: an image starts from the publisher's: get it from {order.image.base.page}, and give "
            "it by `--base FILE` as it was downloaded (.img.xz or .img)"
        )
    return order.base


def _refuse_short(card: Path, base: Path) -> None:
    needed, found = boot_partition.end_bytes(card), card.stat().st_size
    if found < needed:
        raise UsageError(
            f"{base} is cut short: its partitions end at {needed} bytes, and there are {found}; get it again"
        )


def _partition_of(card: Path, base: Path) -> BootPartition:
    partition = boot_partition.find(card)
    if partition is None:
        raise UsageError(
            f"{base} is no image of a Raspberry Pi's card: it has no FAT partition with cmdline.txt and config.txt"
        )
    return partition


def _fill(partition: BootPartition, order: Order) -> None:
    for path in map(Path, order.files):
        if path.parent.name == _BOOT_FILES and path.name != _ADDED_WORDS:
            partition.write(path.name, (order.folder / path).read_bytes())
    line = (partition.read(COMMAND_LINE) or b"").decode(errors="surrogateescape")
    if not line.partition("\n")[0].strip():
        raise UsageError(
            f"{order.base}: its {COMMAND_LINE} has no words in its first line, and a board does not boot without them"
        )
    added = (order.folder / _BOOT_FILES / _ADDED_WORDS).read_text(encoding="utf-8")
    partition.write(COMMAND_LINE, with_words(line, added).encode(errors="surrogateescape"))
