"""Images of a data set: scikit-learn's digits, or a user's folder that holds one folder of images for each class.

    FOLDER/cat/1.png  FOLDER/cat/2.jpg  FOLDER/dog/1.png …

A row is known before its image is decoded, so that only chosen images are: its `id` says where the image stands, and
its `text` is the SHA-256 of the image's content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.data_sources import DIGITS, DataSpec, Row
from testbed.errors import DataError
from testbed.method import IMAGE_CLASSIFICATION

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUFFIXES = (".png", ".jpg", ".jpeg")
_DIGITS_BRIGHTEST = 16  # of the digits' grey levels
#: Pillow's word, by number of channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def read_image_rows(spec: DataSpec) -> tuple[list[Row], list[Row] | None]:
    """Training rows, and held-out rows where the data itself says which these are (else None).

    Raises DataError when the data is missing, holds no images in folders, or is asked for what images do not have.
    """
    if spec.columns or spec.template:
        raise DataError(
            f"data {spec.name!r}: columns and template are for texts; leave them out of the images' settings"
        )
    if spec.name == DIGITS:
        if isinstance(spec.held_out, str):
            raise DataError(f"data '{DIGITS}': held_out: expected a share between 0 and 1, got {spec.held_out!r}")
        return _digit_rows(), None
    held_out = _folder_rows(spec.held_out) if isinstance(spec.held_out, str) else None
    return _folder_rows(spec.name), held_out


def pixels_of(name: str, rows: Sequence[Row], shape: tuple[int, int, int]) -> Iterator[NDArray[np.uint8]]:
    """The images of some rows of the data `name` as (channels, height, width), each resized to the shape.

    Raises DataError for a file that is no image.
    """
    if name == DIGITS:
        yield from _digits_as(rows, shape)
        return
    folder = Path(name).expanduser()
    for row in rows:
        yield _decoded(folder / (row.id or ""), shape)


# ── digits ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@lru_cache(maxsize=1)
def _digits() -> tuple[NDArray[np.uint8], list[int]]:
    """Grey levels 0–16 (count, 8, 8), and the digit that each one is."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return found.images.astype("uint8"), found.target.tolist()


def _digit_rows() -> list[Row]:
    images, labels = _digits()
    return [
        Row(hashlib.sha256(image.tobytes()).hexdigest(), label=str(label), id=str(index))
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def _digits_as(rows: Sequence[Row], shape: tuple[int, int, int]) -> Iterator[NDArray[np.uint8]]:
    """Between the given pixels the grey is linear; of several channels each is the grey."""
    import numpy as np
    import torch
    from torch.nn.functional import interpolate

    channels, height, width = shape
    chosen = torch.from_numpy(_digits()[0][[int(row.id or 0) for row in rows]]).float()[:, None]
    grey = interpolate(chosen, (height, width), mode="bilinear") * (255 / _DIGITS_BRIGHTEST)
    for image in grey.round().to(torch.uint8).numpy():
        yield np.repeat(image, channels, axis=0)


# ── a folder ───────────────────────────────────────────────────────────────────────────────────────────────────────
def _folder_rows(name: str) -> list[Row]:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"data {name!r}: the task {IMAGE_CLASSIFICATION} needs '{DIGITS}', or a folder with one folder of images "
            "for each class; for texts choose another --task"
        )
    rows = [row for own in _class_folders(folder) for row in _class_rows(folder, own)]
    if not rows:
        raise DataError(
            f"data {name!r}: no image was found; expected FOLDER/CLASS/IMAGE, the images ending in "
            f"{', '.join(SUFFIXES)}"
        )
    return rows


def _class_folders(folder: Path) -> list[Path]:
    return sorted(own for own in folder.iterdir() if own.is_dir() and not own.name.startswith("."))


def _class_rows(folder: Path, own: Path) -> Iterator[Row]:
    for path in sorted(own.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            try:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise DataError(f"data '{path}': cannot be read ({error.strerror})") from None
            yield Row(content, label=own.name, id=path.relative_to(folder).as_posix())


def _decoded(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    import numpy as np
    from PIL import Image, ImageOps

    channels, height, width = shape
    if channels not in _MODES:
        raise DataError(f"data '{path}': the model wants images of {channels} channels; an image has 1, 3 or 4")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            coloured = upright.convert("RGBA") if upright.mode == "P" else upright
            if coloured.mode[0] in "IF":
                raise DataError(f"data '{path}': it has the mode {image.mode}, expected 8 bits for each channel")
            plain = coloured.convert(_MODES[channels]).resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"data '{path}': not a readable image ({error})") from None
    return np.ascontiguousarray(np.asarray(plain, np.uint8).reshape(height, width, channels).transpose(2, 0, 1))
