"""Whether a folder of rendered files is what it should be, and what its own tools say of the files.

Nothing is changed.  A tool that is not installed is told: then its files were not looked at.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from testbed.device_images import catalogue
from testbed.device_images.render import MANIFEST, PRIVATE_SUFFIX, read_manifest, recipe_digest

GOOD, WRONG, UNSEEN = "good", "wrong", "not looked at"
#: What is looked at where only a mode is wrong: chmod mends it, nothing needs to be rendered.
PRIVACY = "privacy"
_SECONDS = 60.0
_KEY_MARK = "PRIVATE KEY"
_NETPLAN_VERSION = 2
#: The whole of a kernel's command line, on one line.
_COMMAND_LINE = "cmdline.append"


@dataclass(frozen=True)
class Finding:
    """One look at one file."""

    file: str
    looked_at: str
    verdict: str  # GOOD, WRONG or UNSEEN
    text: str = ""


def check(folder: Path) -> tuple[Finding, ...]:
    """Every look at every file; raises UsageError for a folder that was not rendered."""
    manifest = read_manifest(folder)
    findings = [*_as_rendered(folder, manifest), _recipe(manifest), _privacy(folder)]
    for name in sorted(manifest["files"]):
        path = folder / name
        if path.is_file():
            findings += _content(path, name)
    return tuple(findings)


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────
def _as_rendered(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    for name, digest in sorted(manifest["files"].items()):
        path = folder / name
        if not path.is_file():
            yield Finding(name, "as rendered", WRONG, "it is gone")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            yield Finding(name, "as rendered", WRONG, "it was changed by hand")
        else:
            yield Finding(name, "as rendered", GOOD)


def _recipe(manifest: Mapping[str, Any]) -> Finding:
    image = catalogue.images().get(manifest["image"])
    if image is None:
        return Finding(MANIFEST, "recipe", WRONG, f"the catalogue has no image {manifest['image']}")
    if recipe_digest(image) != manifest["recipe"]:
        return Finding(MANIFEST, "recipe", WRONG, "rendered from another state of the recipe: render it anew")
    return Finding(MANIFEST, "recipe", GOOD)


def _privacy(folder: Path) -> Finding:
    if folder.stat().st_mode & 0o077:
        return Finding(".", PRIVACY, WRONG, f"others may read it, and it holds secrets: chmod 700 {folder}")
    return Finding(".", PRIVACY, GOOD)


# ── one file ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _content(path: Path, name: str) -> Iterator[Finding]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        yield Finding(name, "text", WRONG, "it is no text (UTF-8)")
        return
    if _KEY_MARK in text or path.suffix == PRIVATE_SUFFIX:
        yield _secret(path, name)
    if text.startswith("#cloud-config"):
        command = ["cloud-init", "schema", "--config-file", str(path)]
        yield _by_tool(name, "cloud-init schema", command, "cloud-init")
    elif path.name == "network-config":
        yield _network(name, text)
    elif path.name == "meta-data" or path.suffix in {".yaml", ".yml"}:
        yield _parsed(name, "YAML", lambda: yaml.safe_load(text))
    elif path.suffix == ".json":
        yield _parsed(name, "JSON", lambda: json.loads(text))
    elif path.name == _COMMAND_LINE:
        right = len(text.splitlines()) == 1
        yield Finding(name, "kernel command line", *((GOOD,) if right else (WRONG, "expected its words on one line")))
    elif text.startswith("#!"):
        yield _by_tool(name, "shellcheck", ["shellcheck", str(path)], "shellcheck")


def _secret(path: Path, name: str) -> Finding:
    if path.stat().st_mode & 0o077:
        return Finding(name, PRIVACY, WRONG, f"others may read it, and it holds a secret: chmod 600 {path}")
    return Finding(name, PRIVACY, GOOD)


def _by_tool(name: str, looked_at: str, command: list[str], package: str) -> Finding:
    if shutil.which(command[0]) is None:
        return Finding(name, looked_at, UNSEEN, f"{command[0]} is not installed (apt install {package})")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, looked_at, UNSEEN, f"{command[0]} cannot be run: {error}")
    if done.returncode == 0:
        return Finding(name, looked_at, GOOD)
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return Finding(name, looked_at, WRONG, " · ".join(lines[:6]) or f"{command[0]} ended with {done.returncode}")


def _network(name: str, text: str) -> Finding:
    """Its shape only: Netplan's own check needs a whole system."""
    finding = _parsed(name, "network", lambda: yaml.safe_load(text))
    if finding.verdict == WRONG:
        return finding
    told = yaml.safe_load(text)
    network = told.get("network") if isinstance(told, dict) else None
    if isinstance(network, dict) and network.get("version") == _NETPLAN_VERSION:
        return finding
    return Finding(name, "network", WRONG, f"expected `network:` with `version: {_NETPLAN_VERSION}`")


def _parsed(name: str, looked_at: str, parse: Callable[[], object]) -> Finding:
    try:
        parse()
    except (yaml.YAMLError, ValueError) as error:
        return Finding(name, looked_at, WRONG, " ".join(str(error).split()))
    return Finding(name, looked_at, GOOD)
