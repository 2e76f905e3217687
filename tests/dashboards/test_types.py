"""The dashboards against Grafana's own types, by TypeScript's compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dashboards.server import committed

HERE = Path(__file__).parent
pytestmark = [pytest.mark.npm, pytest.mark.slow]
#: Of the compiler: strict, and nothing written.
FLAGS = ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "esnext"]


def _wrong_option(dashboard):
    dashboard["panels"][0]["options"]["showHeadr"] = True


def _wrong_kind(dashboard):
    dashboard["panels"][0]["type"] = "tabel"


def _wrong_word(dashboard):
    dashboard["panels"][0]["options"]["cellHeight"] = "tiny"


def _wrong_variable(dashboard):
    dashboard["templating"]["list"][1]["refresh"] = "often"


def _wrong_place(dashboard):
    del dashboard["panels"][0]["gridPos"]["w"]


SPOILT = [_wrong_option, _wrong_kind, _wrong_word, _wrong_variable, _wrong_place]


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """What the compiler says, by the name of the dashboard: of those that are committed, and of spoilt ones."""
    folder = tmp_path_factory.mktemp("types")
    _install(folder)
    dashboards = committed()
    for spoil in SPOILT:
        spoil(dashboards.setdefault(spoil.__name__, committed()["fleet"]))
    for name, dashboard in dashboards.items():
        head = "import type { OurDashboard } from './types';\nexport const it: OurDashboard = "
        (folder / f"{name}.ts").write_text(f"{head}{json.dumps(dashboard)};\n")
    command = [folder / "node_modules" / ".bin" / "tsc", *FLAGS, "--moduleResolution", "bundler"]
    done = subprocess.run(
        [*command, *(f"{name}.ts" for name in dashboards)], cwd=folder, capture_output=True, text=True, check=False
    )
    found = dict.fromkeys([*dashboards, "types"], "")
    for name, said in re.findall(r"^(\w+)\.ts\S* error (.*)$", done.stdout, re.MULTILINE):
        found[name] += said + "\n"
    assert done.returncode == 2, done.stdout + done.stderr
    return found


def _install(folder):
    """The locked packages, and our types beside them."""
    for name in ("package.json", "package-lock.json", ".npmrc", "types.ts"):
        shutil.copy(HERE / name, folder)
    command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0 and not os.environ.get("CI"):
        pytest.skip(f"npm cannot install the types: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(committed()))
def test_grafanas_types_fit(complaints, name):
    assert complaints[name] == ""
    assert complaints["types"] == ""


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_is_wrong_is_found(complaints, spoil):
    """The check can fail: in one panel, or one variable, of Fleet something is not as Grafana has it."""
    assert complaints[spoil.__name__].startswith("TS")
