"""Who serves metrics on this machine: one file for each serving process, as Prometheus' `file_sd` reads them.

https://prometheus.io/docs/prometheus/latest/configuration/configuration/#file_sd_config: a list of targets with labels,
read again whenever a file changes.  A file says in its name which process wrote it, because its content may hold
nothing else; the file of a process that was killed is swept away by the next one.  Files of other names are the user's
own and left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from testbed.cache import cache_folder
from testbed.durable import read_json, write_json
from testbed.errors import StoreError
from testbed.process_identity import ProcessIdentity


def targets_folder() -> Path:
    """The folder whose *.json Prometheus reads."""
    return cache_folder() / "prometheus" / "targets"


@contextmanager
def announced(target: str, serves: str) -> Iterator[None]:
    """Let Prometheus find `target` (HOST:PORT) for as long as this lasts; `serves`: "run" or "store"."""
    folder = targets_folder()
    folder.mkdir(parents=True, exist_ok=True)
    sweep()
    me = ProcessIdentity.own()
    path = folder / f"{serves}.{me.pid}.{me.started}.{me.boot}.{target.rpartition(':')[2]}.json"
    write_json(path, [{"targets": [target], "labels": {"serves": serves}}])
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def sweep() -> None:
    """Remove the files of processes that are gone."""
    for path in targets_folder().glob("*.json"):
        if _left_behind(path):
            path.unlink(missing_ok=True)


def all_targets() -> list[Any]:
    """What the files say together: the answer of an `http_sd` endpoint."""
    found: list[Any] = []
    for path in sorted(targets_folder().glob("*.json")):
        if _left_behind(path):
            continue
        try:
            found += read_json(path)
        except StoreError:  # removed in this very moment, or not ours
            continue
    return found


def _left_behind(path: Path) -> bool:
    words = path.name.split(".")
    if len(words) != 6 or not words[1].isdigit():
        return False
    return not ProcessIdentity(int(words[1]), words[2], words[3]).alive
