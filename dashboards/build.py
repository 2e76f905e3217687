"""Write json/*.json from the Python beside it: `python -m dashboards.build`, in the folder above.

The same input gives the same bytes; a test holds what is committed to this.
"""

from __future__ import annotations

import json
from pathlib import Path

from dashboards.compare import compare
from dashboards.fleet import fleet
from dashboards.panels import Json
from dashboards.run import run

FOLDER = Path(__file__).parent / "json"


def all_dashboards() -> dict[str, Json]:
    """File name → dashboard."""
    return {"fleet.json": fleet(), "run.json": run(), "compare.json": compare()}


def text_of(dashboard: Json) -> str:
    return json.dumps(dashboard, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, dashboard in all_dashboards().items():
        (FOLDER / name).write_text(text_of(dashboard), encoding="utf-8")
