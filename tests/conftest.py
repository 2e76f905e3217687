"""What all tests share: when one that needs more than Python is skipped, when that is a failure; the virtual labs."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from testbed.errors import LimitError
from testbed.node import limits
from tests.browser.chromium import why_no_browser
from tests.dashboards.server import why_no_npm, why_no_prometheus
from tests.lab_runs import boards_put_right, on_this_machine, study, undisturbed  # noqa: F401 -- fixtures
from tests.machines.machine_lab import machine, why_no_vm  # noqa: F401 -- a fixture
from tests.meters.jtop_server import why_no_jtop
from tests.ssh_server import why_no_sshd
from tests.virtual_lab import boards, plain_lab, why_no_lab  # noqa: F401 -- fixtures

MIB = 1 << 20

# Tests that run side by side have a processor each: more threads of torch would only wait for each other, busily.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


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


#: By marker: why such a test cannot run here, or None; and what CI must be able to do.
NEEDS = {
    "cgroup": (why_no_cgroup, "cap memory"),
    "sshd": (why_no_sshd, "start an SSH server"),
    "lab": (why_no_lab, "bring a virtual lab up"),
    "jtop": (why_no_jtop, "run the service of jetson-stats"),
    "browser": (why_no_browser, "open a page in Chromium"),
    "npm": (why_no_npm, "install packages of npm"),
    "prometheus": (why_no_prometheus, "start a Prometheus server"),
    "vm": (why_no_vm, "make a virtual machine"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that take up to an hour, too")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("long") and not item.config.getoption("--long"):
        pytest.skip("takes minutes to an hour: --long runs it")
    for marker, (why_not, ability) in NEEDS.items():
        if item.get_closest_marker(marker) is None or (reason := why_not()) is None:
            continue
        if os.environ.get("CI"):
            pytest.fail(f"CI must be able to {ability}: {reason}", pytrace=False)
        pytest.skip(reason)
