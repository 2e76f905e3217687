"""A standalone CPython that the user gives, really pushed and unpacked; and one that is not whole."""

from __future__ import annotations

import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from testbed.connection import LocalConnection
from testbed.errors import DeviceError
from testbed.inventory import Budget, Device, HardwareProfile
from testbed.provision import environment
from testbed.provision.environment import EnvironmentOptions
from testbed.provision.environment_torch import CPU
from testbed.provision.facts import FACTS_SCRIPT_PARTS, gather
from testbed.provision.runner import ENVIRONMENT_PARTS
from testbed.provision.step import Change, Problem

VERSION, MACHINE = f"3.{sys.version_info.minor}", sysconfig.get_platform().partition("-")[2]
pytestmark = pytest.mark.skipif(
    VERSION not in CPU.pythons or MACHINE not in CPU.machines, reason="no wheels of torch for this Python"
)


@pytest.fixture
def archive(tmp_path):
    """This machine's interpreter in the layout of python-build-standalone's `install_only`; its library by a link."""
    path = tmp_path / "cpython.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(Path(sys._base_executable).resolve(), f"python/bin/python{VERSION}")
        for name, target in (("bin/python3", f"python{VERSION}"), ("lib", f"{sys.base_prefix}/lib")):
            link = tarfile.TarInfo(f"python/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
    return path


@pytest.fixture
def device(tmp_path):
    profile = HardwareProfile("generic", "this machine", 1 << 33, 1 << 33, 2, MACHINE, torch_source="cpu")
    return Device("here", "generic", profile, Budget(1 << 30), folder=str(tmp_path / "testbed"))


def interpreters(device):
    """The facts of this machine, as if it had no other interpreters than the testbed's own."""
    facts = gather(LocalConnection("here"), device, (*FACTS_SCRIPT_PARTS, *ENVIRONMENT_PARTS))
    own = [found for found in facts["python"]["candidates"] if found["path"].startswith(device.folder)]
    return {**facts, "python": {**facts["python"], "candidates": own}}


def checked(device, archive):
    """What the step says of them."""
    return environment.Python(EnvironmentOptions(python_archive=archive)).check(interpreters(device), device)


def test_it_is_unpacked_runs_and_is_found_by_the_next_visit(device, archive):
    here, change, said = LocalConnection("here"), checked(device, archive), []
    assert isinstance(change, Change)
    assert (change.found, change.wanted) == ("Python none", "the Python of cpython.tar.gz")
    change.action(here, said.append)
    assert said[-1] == "unpacking cpython.tar.gz"
    python = f"{device.folder}/python/bin/python3"
    assert here.run([python, "-I", "-c", "import sys; print(sys.executable)"]) == f"{python}\n"
    assert not Path(device.folder, "python.partial").exists()
    [candidate] = interpreters(device)["python"]["candidates"]
    assert candidate["path"] == python
    assert checked(device, archive) is None


def test_one_that_is_cut_off_is_an_error_and_leaves_the_python_that_was_there(device, archive, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    here, change = LocalConnection("here"), checked(device, archive)
    change.action(here, lambda words: None)
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(
        DeviceError, match=r"^here: \S+cpython.tar.gz cannot be unpacked there: .*; is the file whole\?$"
    ):
        change.action(here, lambda words: None)
    assert here.run([f"{device.folder}/python/bin/python3", "-I", "-c", "print(1)"]) == "1\n"


@pytest.mark.parametrize("part", [slice(0, 200), slice(200, None)])
def test_a_file_that_is_no_archive_is_a_problem_before_anything_is_pushed(device, archive, part):
    archive.write_bytes(archive.read_bytes()[part])
    problem = checked(device, archive)
    assert isinstance(problem, Problem)
    assert problem.text.startswith(f"{archive}: expected an archive (.tar.gz, .tar.xz) with a Python, got ")
    assert not Path(device.folder).exists()
