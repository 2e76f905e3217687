"""Files of a report: each is whole or not there, and what stood there before is replaced at once."""

from __future__ import annotations

import os
from pathlib import Path

from testbed.errors import StoreError


def write_file(path: Path, content: bytes | str) -> Path:
    """Write, and give the path; raises StoreError that says what to do when the place takes nothing."""
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error}); name another place for it") from error
    return path
