"""A headless Chromium, driven by playwright-core, that says what it finds on a page (drive.mjs)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_NAMES = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str | None:
    """Where Chromium is."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


def why_no_browser() -> str | None:
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    missing += [] if browser() else ["chromium"]
    return f"there is no {' and no '.join(missing)} here (Debian, Ubuntu: nodejs, npm, chromium)" if missing else None


def install(folder: Path) -> str | None:
    """Put the locked packages into a folder; gives npm's complaint when it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(HERE / name, folder)
    command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip()


def look(packages: Path, page: Path) -> dict[str, Any]:
    """What drive.mjs finds on a page, wide and narrow, light and dark."""
    return json.loads(_drive(packages, "look", page))


def shoot(packages: Path, page: Path, folder: Path, sections: Sequence[str] = ()) -> list[Path]:
    """Pictures of a page, or of some of its sections, wide and narrow, light and dark."""
    return [Path(line) for line in _drive(packages, "shoot", page, folder, sections=sections).splitlines()]


def _drive(packages: Path, action: str, *paths: Path, sections: Sequence[str] = ()) -> str:
    places = [str(path.absolute()) for path in paths]
    command = ["node", str(HERE / "drive.mjs"), action, str(browser()), *places, *sections]
    done = subprocess.run(command, cwd=packages, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
