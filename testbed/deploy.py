"""Make these hashes present on this device: the base model's configuration and blocks, and the shards.

The round loop calls it for every job, because a method may bring new blocks in mid-run; what is there already costs
one look.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from testbed.model.checkpoint import ContentStore


class ContentHolder(Protocol):
    """A node's content folder, here or over a connection."""

    def missing(self, hashes: Iterable[str]) -> tuple[str, ...]: ...

    def put_content(self, content: str, path: Path) -> None: ...


def deploy(node: ContentHolder, store: ContentStore, hashes: Iterable[str]) -> int:
    """Put what the node lacks of `hashes` there; returns the bytes that travelled."""
    sent = 0
    for content in node.missing(hashes):
        path = store.path(content)
        node.put_content(content, path)
        sent += path.stat().st_size
    return sent
