"""What all tests share: when a test that needs a memory cgroup is skipped, and when that is a failure."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from testbed.errors import LimitError
from testbed.node import limits

MIB = 1 << 20


@functools.cache
def why_no_cgroup() -> str | None:
    """Cap a real process and look whether the kernel knows; None when it does, else the reason why not."""
    try:
        group = limits.create(f"probe-{os.getpid()}", 64 * MIB)
    except LimitError as error:
        return str(error)
    try:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
            group.add(process.pid)
            inside = str(process.pid) in (group.path / "cgroup.procs").read_text().split()
            process.communicate(b"\n")
    except OSError as error:
        return f"a process cannot be moved into a memory cgroup here: {error}"
    finally:
        group.remove()
    return None if inside else "a process was moved into a memory cgroup, and is not in it"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cgroup") is None or (reason := why_no_cgroup()) is None:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI must be able to cap memory: {reason}", pytrace=False)
    pytest.skip(reason)
