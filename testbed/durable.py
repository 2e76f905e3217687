"""Files that are either whole or not there, and errors of the disk in words."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from testbed.errors import StoreError
from testbed.quantities import bytes_text


@contextmanager
def disk_errors_in_words(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into a StoreError with the way out."""
    try:
        yield
    except OSError as error:
        raise StoreError(_in_words(path, error)) from error


def _in_words(path: Path, error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return (
            f"{path}: the disk is full ({bytes_text(_free_bytes(path))} free); free some space, then continue with "
            "`--resume`, or choose another folder with `--runs`"
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"{path}: not writable ({error.strerror}); change its owner, or choose another folder with `--runs`"
    if error.errno in {errno.ENOTDIR, errno.EEXIST}:
        return f"{path}: expected a folder, there is a file; move it away, or choose another folder with `--runs`"
    if error.errno == errno.ENOENT:
        return f"{path}: there is no such file or folder, and none can be made there; name another one"
    return f"{path}: {error.strerror or error}"


def _free_bytes(path: Path) -> int | None:
    existing = next((folder for folder in (path, *path.parents) if folder.exists()), None)
    return shutil.disk_usage(existing).free if existing else None


def plain(value: Any) -> Any:
    """What json cannot write by itself: nouns, sets, paths, numbers of numpy."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON")


def write_json(path: Path, data: Any, *, sync: bool = False) -> None:
    """Replace a JSON file at once: a reader, or a crash, sees the old one or the new one."""
    text = json.dumps(data, default=plain, indent=1) + "\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    with disk_errors_in_words(path):
        try:
            with partial.open("w", encoding="utf-8") as stream:
                stream.write(text)
                if sync:
                    stream.flush()
                    os.fsync(stream.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises StoreError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path}: missing; the run folder is not complete") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise StoreError(f"{path}: not valid JSON ({error}); restore the file, or remove the run folder") from error


def read_text(path: Path) -> str:
    """The content of a text file, with a sign for what is not UTF-8; raises StoreError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise StoreError(f"{path}: missing; the run folder is not complete") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error


def sync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(paths: Iterable[Path]) -> None:
    """`sync_path` for all of these at once: the file system commits them together, which costs little more than one."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        for _ in pool.map(sync_path, paths):
            pass
