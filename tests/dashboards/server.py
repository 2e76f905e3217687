"""A Prometheus of this machine, and the tools that check what is written for it and for Grafana."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent.parent
DASHBOARDS = ROOT / "dashboards"
PATIENCE_SECONDS = 90.0


def why_no_prometheus() -> str | None:
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    return f"there is no {' and no '.join(missing)} here (Debian, Ubuntu: prometheus)" if missing else None


def why_no_npm() -> str | None:
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    return f"there is no {' and no '.join(missing)} here (Debian, Ubuntu: nodejs, npm)" if missing else None


def committed() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((DASHBOARDS / "json").glob("*.json"))}


def targets_of(dashboard: dict) -> list[tuple[str, str]]:
    """(panel, expression) of every query."""
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]


def rules() -> list[dict]:
    groups = yaml.safe_load((DASHBOARDS / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def plain(expr: str) -> str:
    """As Grafana sends it with every variable at All."""
    return re.sub(r"\$\w+", ".*", expr.replace("$__rate_interval", "30s"))


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read()


class Asked:
    """A running Prometheus that can be asked."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expr: str) -> list[dict]:
        question = urllib.parse.urlencode({"query": expr})
        try:
            answer = get(f"{self.url}/api/v1/query?{question}")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expr}: {error.read().decode()}") from error
        return json.loads(answer)["data"]["result"]

    def silent(self, expressions: list[str]) -> list[str]:
        """Those that return nothing, after as long as it may take them."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (silent := [expr for expr in expressions if not self.query(plain(expr))]) and time.monotonic() < deadline:
            time.sleep(0.2)
        return silent
