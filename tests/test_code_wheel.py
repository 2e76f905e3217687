"""The code wheel: same content, same hash; enough to run a node; every package that offers methods is in it."""

import subprocess
import sys
import zipfile
from importlib import metadata

import pytest

from testbed import code_wheel
from testbed.errors import ConfigError

IMPORTED_ON_A_NODE = (
    "testbed.node.agent, testbed.node.trainer, testbed.node.baseline, testbed.plugins, methods.lora, methods.fedpruner"
)


@pytest.fixture
def wheel(tmp_path):
    return code_wheel.build(tmp_path / "wheels")


@pytest.fixture
def unpacked(wheel, tmp_path):
    folder = tmp_path / "code"
    zipfile.ZipFile(wheel.path).extractall(folder)
    return folder


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    """A lab's own package of methods, installed; gives the folder of its distribution."""
    site = tmp_path / "site"
    package = site / "lab_methods"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""Ours."""\n')
    (package / "slow.py").write_text("from testbed.method import Method\n")
    info = site / "lab_methods-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-methods\nVersion: 1.2\n\nA long description.\n")
    (info / "entry_points.txt").write_text("[testbed.methods]\nlab = lab_methods\n")
    (info / "RECORD").write_text("lab_methods/__init__.py,,\nlab_methods-1.2.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(site)
    return site


def test_the_same_code_gives_the_same_hash(wheel, tmp_path):
    again = code_wheel.build(tmp_path / "elsewhere")
    assert again.sha256 == wheel.sha256
    assert again.path.read_bytes() == wheel.path.read_bytes()


def test_it_is_named_by_its_hash_and_written_once(wheel, tmp_path):
    written = wheel.path.stat().st_mtime_ns
    assert wheel.path.name == f"{wheel.sha256}.whl"
    assert code_wheel.build(tmp_path / "wheels").path.stat().st_mtime_ns == written


def test_what_only_the_controller_runs_stays_at_home(wheel):
    assert not [name for name in wheel.files if name.startswith(("testbed/commands", "testbed/quickstart"))]
    assert not [name for name in wheel.files if name.endswith(".pyc")]


def test_a_node_runs_from_it(unpacked):
    """Isolated, so that the clone, which is installed here, cannot help out."""
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r}); import {IMPORTED_ON_A_NODE}; print(testbed.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(unpacked))


def test_methods_are_found_in_it_without_site_packages(unpacked):
    look = "from testbed import plugins; print(*plugins._method_modules())"
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r}); {look}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert {"lora", "fedpruner"} <= set(done.stdout.split())


def test_the_record_lists_every_file_of_a_distribution(unpacked):
    (distribution,) = metadata.distributions(path=[str(unpacked)])
    listed = {str(file) for file in distribution.files or ()}
    there = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert listed == there


def test_another_package_of_methods_comes_along(wheel, other_package, tmp_path):
    more = code_wheel.build(tmp_path / "wheels")
    assert {"lab_methods/slow.py", "lab_methods-1.2.dist-info/entry_points.txt"} <= set(more.files)
    assert more.sha256 != wheel.sha256


def test_a_compiled_package_of_methods_is_refused(other_package, tmp_path):
    (other_package / "lab_methods" / "fast.cpython-311-x86_64-linux-gnu.so").write_bytes(b"\x7fELF")
    with pytest.raises(ConfigError, match="lab-methods must be Python only"):
        code_wheel.build(tmp_path)
