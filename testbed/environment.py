"""What a run ran with: package versions, commit, machine.  Written into every run folder."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("edge-testbed", "torch", "transformers", "safetensors", "peft", "numpy", "flwr-datasets", "scikit-learn")


def describe_environment(model_hash: str | None = None, data_hash: str | None = None) -> dict[str, Any]:
    """The record `versions.json` holds; what could not be found out is None."""
    return {
        "packages": {name: package_version(name) for name in PACKAGES},
        "python": platform.python_version(),
        **commit_of(Path(__file__).resolve().parent),
        "machine": describe_machine(),
        "model": model_hash,
        "data": data_hash,
    }


def package_version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit_of(folder: Path) -> dict[str, Any]:
    """{"commit": hash or None, "dirty": whether tracked files differ from it, or None}."""
    if _git(folder, "ls-files", "--error-unmatch", __file__) is None:  # installed inside somebody else's repository
        return {"commit": None, "dirty": None}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def describe_machine() -> dict[str, Any]:
    """The controller's machine: CPU model, cores this process may use, memory, kernel."""
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or None,
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _field(path: Path, name: str) -> str | None:
    """The first value of `name` in a file of `name : value` lines."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
