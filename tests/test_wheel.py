"""The built wheel, installed outside the clone, brings everything that the command needs."""

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from testbed.package_data import PACKAGE

pytestmark = [pytest.mark.slow, pytest.mark.beside]
CLONE = PACKAGE.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=CLONE, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A virtual environment with the wheel and, beside it, the libraries of this one; gives its folder."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--quiet", str(wheel)], check=True)
    # The libraries only: a .pth does not read the .pth inside that folder, which would bring the clone back.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture
def run(installed, tmp_path):
    """Run the installed command in a folder of its own; gives what it prints."""

    def run(*args):
        command = [str(installed / "bin" / "testbed"), *args]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_code_methods_and_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {"testbed", "methods"}
    assert "testbed/package_data/inventory/emulated.yaml" in names
    assert "testbed/package_data/experiments/quickstart.yaml" in names
    assert "testbed/package_data/inventory/traces/jetson_orin_nano.csv" in names
    assert "testbed/package_data/dashboards/json/fleet.json" in names
    assert "testbed/reports/page.html.jinja" in names
    assert "testbed/package_data/inventory/profiles/jetson_nano_4gb.yaml" in names
    assert "testbed/py.typed" in names


def test_the_code_is_that_of_the_wheel(installed):
    code = "import testbed, methods; print(testbed.__file__, methods.__file__)"
    python = installed / "bin" / "python"
    printed = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(path.startswith(str(installed)) for path in printed.split())


def test_help_works_outside_the_clone(run):
    assert "inventory" in run("--help")


def test_inventory_finds_its_files_outside_the_clone(run):
    devices = json.loads(run("inventory", "--json"))
    assert len(devices) == 4


def test_a_run_is_planned_outside_the_clone_with_the_model_that_comes_along(run, tmp_path):
    rows = [{"text": f"text number {index}", "label": "ab"[index % 2]} for index in range(80)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = json.loads(run("run-method", "fedpruner", "--data", "data.jsonl", "--dry-run", "--json"))
    assert plan["model"] == {"name": "quickstart", "blocks": 12}
    assert {client["outcome"] for client in plan["clients"]} == {"planned"}


def test_methods_are_found_outside_the_clone(run):
    assert "lora" in [method["name"] for method in json.loads(run("methods", "--json"))]
