"""The few kinds of panels that our dashboards use, as the JSON of Grafana 11 and 12 (schemaVersion 39)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = dict[str, Any]
SCHEMA_VERSION = 39
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_NEWEST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
GREEN_TO_RED = ("green", "yellow", "red")


# ── queries ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def over_time(expr: str, legend: str) -> Json:
    return {"datasource": SOURCE, "editorMode": "code", "expr": expr, "legendFormat": legend, "range": True}


def now(expr: str, legend: str = "__auto") -> Json:
    """The newest value alone; in a table, one row per series."""
    return {**over_time(expr, legend), "range": False, "instant": True}


# ── panels: a title, a unit, queries ─────────────────────────────────────────────────────────────────────────────────
def curves(title: str, unit: str, *queries: Json, about: str = "", custom: Mapping[str, Any] | None = None) -> Json:
    options = {
        "legend": {"calcs": ["lastNotNull"], "displayMode": "table", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    drawn = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 8, "showPoints": "auto", "spanNulls": False}
    return _panel("timeseries", title, queries, options, _fields(unit, {**drawn, **(custom or {})}), about)


def number(title: str, unit: str, query: Json, *, thresholds: Sequence[float] = (), about: str = "") -> Json:
    options = {
        "colorMode": "value", "graphMode": "none", "justifyMode": "auto", "orientation": "auto",
        "percentChangeColorMode": "standard", "reduceOptions": _NEWEST, "showPercentChange": False,
        "textMode": "auto", "wideLayout": True,
    }  # fmt: skip
    return _panel("stat", title, [query], options, _fields(unit, {}, thresholds), about)


def bars(title: str, unit: str, *queries: Json, about: str = "") -> Json:
    options = {
        "displayMode": "basic", "maxVizHeight": 300, "minVizHeight": 16, "minVizWidth": 8, "namePlacement": "left",
        "orientation": "horizontal", "reduceOptions": _NEWEST,
        "legend": {"calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": False},
        "showUnfilled": True, "sizing": "auto", "valueMode": "color",
    }  # fmt: skip
    return _panel("bargauge", title, queries, options, {**_fields(unit, {}), "defaults": _bar_defaults(unit)}, about)


def states(title: str, *queries: Json, texts: Mapping[int, tuple[str, str]], about: str = "") -> Json:
    """One row per series; each value of `texts` has its word and colour."""
    options = {
        "alignValue": "left", "mergeValues": True, "rowHeight": 0.8, "showValue": "never",
        "legend": {"calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "single", "sort": "none"},
    }  # fmt: skip
    fields = _fields("none", {"fillOpacity": 70, "lineWidth": 0})
    fields["defaults"]["mappings"] = _mappings(texts)
    return _panel("state-timeline", title, queries, options, fields, about)


def table(title: str, columns: Mapping[str, tuple[str, Json]], *, hidden: Iterable[str] = (), about: str = "") -> Json:
    """Heading → (unit, query); rows of the same labels are joined."""
    queries = [query for _, query in columns.values()]
    fields = _fields("none", {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False})
    fields["overrides"] = [
        _override(_column(index, len(queries)), heading, unit)
        for index, (heading, (unit, _)) in enumerate(columns.items())
    ]
    panel = _panel("table", title, queries, {"cellHeight": "sm", "frameIndex": 0, "showHeader": True}, fields, about)
    for query in panel["targets"]:
        query["format"] = "table"
    gone = dict.fromkeys(("Time", "__name__", "instance", "job", "serves", *hidden), True)
    panel["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": gone, "indexByName": {}, "renameByName": {}}},
    ]
    return panel


# ── a dashboard: rows of panels with their widths ────────────────────────────────────────────────────────────────────
def dashboard(
    uid: str, title: str, about: str, variables: Sequence[Json], rows: Sequence[tuple[int, list[Any]]]
) -> Json:
    """Rows: their height, and panels, each with its width; 24 make a whole row."""
    return {
        "uid": f"testbed-{uid}", "title": title, "description": about, "tags": ["edge-testbed"], "id": None,
        "schemaVersion": SCHEMA_VERSION, "version": 1, "editable": True, "graphTooltip": 1, "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"}, "timezone": "browser",
        "annotations": {"list": []}, "templating": {"list": [_source_variable(), *variables]},
        "links": [{
            "asDropdown": False, "icon": "external link", "includeVars": True, "keepTime": True,
            "tags": ["edge-testbed"], "targetBlank": False, "title": "", "tooltip": "", "type": "dashboards", "url": "",
        }],
        "panels": list(_placed(rows)),
    }  # fmt: skip


def variable(name: str, label: str, query: str) -> Json:
    """All that `query` finds, or some of them."""
    return {
        "type": "query", "name": name, "label": label, "datasource": SOURCE, "definition": query,
        "query": {"query": query, "refId": f"{name}-variable"}, "refresh": 2, "sort": 1, "multi": True,
        "includeAll": True, "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def _source_variable() -> Json:
    return {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus", "refresh": 1}


def _placed(rows: Sequence[tuple[int, list[Any]]]) -> Iterable[Json]:
    number, top = 0, 0
    for height, panels in rows:
        left = 0
        for width, panel in panels:
            number += 1
            yield {"id": number, **panel, "gridPos": {"h": height, "w": width, "x": left, "y": top}}
            left += width
        top += height


def _panel(kind: str, title: str, queries: Sequence[Json], options: Json, fields: Json, about: str) -> Json:
    targets = [{"refId": _letter(index), **query} for index, query in enumerate(queries)]
    described = {"description": about} if about else {}
    return {
        "type": kind, "title": title, **described, "datasource": SOURCE, "targets": targets, "options": options,
        "fieldConfig": fields,
    }  # fmt: skip


def _fields(unit: str, custom: Json, thresholds: Sequence[float] = ()) -> Json:
    defaults: Json = {"unit": unit, "custom": custom}
    if thresholds:
        steps = zip(GREEN_TO_RED, [None, *thresholds], strict=False)
        defaults["thresholds"] = {"mode": "absolute", "steps": [{"color": c, "value": value} for c, value in steps]}
    return {"defaults": defaults, "overrides": []}


def _bar_defaults(unit: str) -> Json:
    return {"unit": unit, "min": 0, "color": {"mode": "palette-classic"}}


def _mappings(texts: Mapping[int, tuple[str, str]]) -> list[Json]:
    options = {
        str(value): {"text": text, "color": color, "index": index}
        for index, (value, (text, color)) in enumerate(texts.items())
    }
    return [{"type": "value", "options": options}]


def _column(index: int, count: int) -> str:
    """What Grafana calls the value of a query, alone and merged with others."""
    return "Value" if count == 1 else f"Value #{_letter(index)}"


def _override(column: str, heading: str, unit: str) -> Json:
    properties = [{"id": "displayName", "value": heading}, {"id": "unit", "value": unit}]
    return {"matcher": {"id": "byName", "options": column}, "properties": properties}


def _letter(index: int) -> str:
    return chr(ord("A") + index)
