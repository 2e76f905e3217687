"""Where things are kept that can be made again: the corpus, content-addressed blocks, measured baselines."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
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
def held(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder of the cache: one fills it, whoever else wants what will be in it says so and waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{folder} is being filled already: waiting for that")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
