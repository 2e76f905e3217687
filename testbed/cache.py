"""Where things are kept that can be made again: the corpus, content-addressed blocks, measured baselines."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "TESTBED_CACHE"


def cache_folder() -> Path:
    """$TESTBED_CACHE, or edge-testbed in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "edge-testbed"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder of the cache: one fills it, whoever else wants what will be in it waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
