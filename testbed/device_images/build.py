"""A whole image of one board: the rendered files, in what its system's publisher gives.

Each recipe names the module that builds it; its `build(order, part, tell)` writes the image into `part`, a private file
that is there and empty, and gives what is to be said of it, line by line.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from testbed.device_images import catalogue
from testbed.device_images.base import Progress
from testbed.device_images.catalogue import Image
from testbed.device_images.check import PRIVACY, WRONG, check
from testbed.device_images.render import read_manifest
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
    _refuse_output(output, folder, base, checksums)
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


def _refuse_output(output: Path, folder: Path, base: Path | None, checksums: Path | None) -> None:
    """An image takes no file's place: none tells whether it is an earlier image, or all that there is of something."""
    if output.exists() and not output.is_file():
        raise UsageError(f"-o {output}: expected the name of a file; the image is written to a card afterwards")
    if output.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"-o {output}: {folder} holds the files that the image is made of; name a file elsewhere")
    for what, given in (("file", base), ("file of checksums", checksums)):
        if given is not None and output.exists() and given.exists() and output.samefile(given):
            raise UsageError(f"-o {output} is the publisher's {what}; name another one for the image")
    if os.path.lexists(output):
        raise UsageError(f"-o {output} is there already; name another file for the image, or remove this one")
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}; make it, or name another one")


def _refuse_changed(folder: Path) -> None:
    wrong = [each for each in check(folder) if each.verdict == WRONG]
    if wrong:
        first = wrong[0]
        raise UsageError(
            f"{folder}: {first.file}: {first.text or first.looked_at}; `testbed image check {folder}` shows all "
            f"{len(wrong)}{'' if all(each.looked_at == PRIVACY for each in wrong) else '; render it anew'}"
        )


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A private file beside the output, which takes its name when all went well, and is gone otherwise."""
    part = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{output.name}-", suffix=_UNFINISHED, dir=output.parent)
        part = Path(name)
        os.close(handle)
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(output)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
