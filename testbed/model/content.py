"""Files named by the SHA-256 of their bytes.  Standard library only.

    <folder>/<sha256>           a block, an outside part, a configuration, a shard

A file appears under its name only when it is complete, and is checked against its name before its first use.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from testbed.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK_BYTES = 1 << 20


class ContentStore:
    """Content-addressed files in one folder; safe to share between processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checked: dict[str, tuple[int, int]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, content: str) -> bool:
        return (self.folder / content).is_file()

    def path(self, content: str) -> Path:
        """Where the content lies; its bytes are checked once per process and again whenever the file changed.

        Raises WireError when it is absent or is not what its name says.
        """
        path = self.folder / content
        try:
            state = path.stat()
        except OSError:
            raise WireError(f"content {content} is not in {self.folder}: deploy it first") from None
        stamp = (state.st_mtime_ns, state.st_size)
        if self._checked.get(content) != stamp:
            self._check(path, content)
            self._checked[content] = stamp
        return path

    def read(self, content: str) -> bytes:
        return self.path(content).read_bytes()

    def put_bytes(self, data: bytes) -> str:
        with self.writing() as draft:
            draft.write(data)
        return draft.content

    def put_file(self, source: Path) -> str:
        with source.open("rb") as stream, self.writing() as draft:
            shutil.copyfileobj(stream, draft, _CHUNK_BYTES)
        return draft.content

    @contextmanager
    def writing(self) -> Iterator[Draft]:
        """A file to write to; when the block ends it is published, and `draft.content` is its name."""
        handle, name = tempfile.mkstemp(prefix=".draft-", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as stream:
                draft = Draft(stream)
                yield draft
                stream.flush()
                os.fsync(stream.fileno())
            self._publish(Path(name), draft)
        finally:
            Path(name).unlink(missing_ok=True)

    def _publish(self, written: Path, draft: Draft) -> None:
        written.chmod(0o644)
        target = self.folder / draft.content
        written.replace(target)
        state = target.stat()
        self._checked[draft.content] = (state.st_mtime_ns, state.st_size)

    def _check(self, path: Path, content: str) -> None:
        found = hash_file(path)
        if found != content:
            raise WireError(f"{path} holds {found}, not what its name says: remove the file and deploy again")


class Draft:
    """A file being written, and the hash of what was written so far."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        return self._stream.write(data)

    @property
    def content(self) -> str:
        return self._hash.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
