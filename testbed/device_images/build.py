"""A whole image of one board: the rendered files, in what its system's publisher gives.

Each recipe names the module that builds it; its `build(order, part, tell)` writes the image into `part`, a private file
that is there and empty, and gives what is to be said of it, line by line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from testbed.device_images import catalogue
from testbed.device_images.base import Progress
from testbed.device_images.catalogue import Image
from testbed.device_images.check import WRONG, check, read_manifest
from testbed.errors import UsageError

#: Recipe → the module of this package that builds it.
_BUILDERS = {"raspberry_pi_os": "raspberry_pi", "ubuntu_raspberry_pi": "raspberry_pi", "debian": "virtual_board"}
_UNFINISHED = ".part"

Builder = Callable[["Order", Path, Progress], tuple[str, ...]]


@dataclass(frozen=True)
class Order:
    """What is to be built of which files; the rendered ones were checked."""

    folder: Path
    files: tuple[str, ...]  # that were rendered into it, by their paths there
    image: Image
    architecture: str  # the kernel's name, "aarch64"
    output: Path
    base: Path | None = None
    checksums: Path | None = None


def build(
    folder: Path, output: Path, *, base: Path | None = None, checksums: Path | None = None, tell: Progress
) -> tuple[str, ...]:
    """Build the image of a rendered folder into a file that only its owner reads: it holds the board's host key.

    Raises UsageError, also for a folder that is not as it was rendered.  Whatever ends it, no half image is left.
    """
    manifest = read_manifest(folder)
    image = catalogue.named(manifest["image"])
    builder = _builder(folder, image)
    _refuse_output(output, base)
    _refuse_changed(folder)
    order = Order(folder, tuple(manifest["files"]), image, manifest["architecture"], output, base, checksums)
    with _whole(output) as part:
        return builder(order, part, tell)


def _builder(folder: Path, image: Image) -> Builder:
    if image.kind == "jetson":
        raise UsageError(
            f"{folder}: a Jetson is flashed, not built: run flash.sh of that folder on the machine that the board is "
            "connected to; the README.txt there has the steps"
        )
    module = f"{__package__}.{_BUILDERS.get(image.recipe)}"
    if image.recipe not in _BUILDERS or find_spec(module) is None:
        raise UsageError(f"{image.title} cannot be built here; {folder / 'README.txt'} says what to do with the files")
    builder: Builder = import_module(module).build
    return builder


def _refuse_output(output: Path, base: Path | None) -> None:
    if output.exists() and not output.is_file():
        raise UsageError(f"{output}: expected the name of a file; the image is written to a card afterwards")
    if base is not None and output.exists() and base.exists() and output.samefile(base):
        raise UsageError(f"{output} is the publisher's file; name another one for the image")


def _refuse_changed(folder: Path) -> None:
    wrong = [each for each in check(folder) if each.verdict == WRONG]
    if wrong:
        first = wrong[0]
        raise UsageError(
            f"{folder}: {first.file}: {first.text or first.looked_at}; `testbed image check {folder}` shows all "
            f"{len(wrong)}; render it anew"
        )


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A private file beside the output, which takes its place when all went well, and is gone otherwise."""
    part = output.with_name(output.name + _UNFINISHED)
    try:
        part.unlink(missing_ok=True)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(output)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
