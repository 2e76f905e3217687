"""The dashboards, the rules, and the Prometheus and Grafana that show them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dashboards.build import all_dashboards, text_of
from testbed.cli import main
from testbed.exporter.families import FAMILIES
from testbed.exporter.targets import targets_folder
from tests.dashboards.server import DASHBOARDS, committed, get, rules, targets_of

ALL = committed()
NUMBERS = {"timeseries", "stat", "bargauge", "state-timeline", "table"}
RECORDED = {rule["record"] for rule in rules() if "record" in rule}
OTHERS = {"ALERTS"}
BUILT_IN = {"__rate_interval"}


# ── what is committed ───────────────────────────────────────────────────────────────────────────────────────────────
def test_what_is_committed_is_what_the_code_makes():
    made = {name: text_of(dashboard) for name, dashboard in all_dashboards().items()}
    there = {path.name: path.read_text(encoding="utf-8") for path in (DASHBOARDS / "json").iterdir()}
    assert there == made, "run: python -m dashboards.build"


def test_each_dashboard_can_be_told_apart():
    assert {name: dashboard["uid"] for name, dashboard in ALL.items()} == {
        "compare": "testbed-compare", "fleet": "testbed-fleet", "run": "testbed-run",
    }  # fmt: skip
    assert {dashboard["title"] for dashboard in ALL.values()} == {"Compare", "Fleet", "Run"}
    assert all(dashboard["tags"] == ["edge-testbed"] for dashboard in ALL.values())


@pytest.fixture(params=sorted(ALL))
def dashboard(request):
    return ALL[request.param]


def test_panels_have_ids_of_their_own_and_titles(dashboard):
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert all(titles)
    assert len(set(titles)) == len(titles)


def test_panels_do_not_lie_on_one_another_and_rows_are_full(dashboard):
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (x, y)
        for at in places
        for x, y in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
    ]
    assert len(set(cells)) == len(cells)
    height = max(at["y"] + at["h"] for at in places)
    assert set(cells) == set(itertools.product(range(24), range(height)))


def test_every_panel_with_numbers_has_units(dashboard):
    for panel in dashboard["panels"]:
        assert panel["type"] in NUMBERS
        assert panel["fieldConfig"]["defaults"]["unit"]
        if panel["type"] == "table":
            columns = panel["fieldConfig"]["overrides"]
            units = [each["value"] for column in columns for each in column["properties"] if each["id"] == "unit"]
            assert len(units) == len(panel["targets"])
            assert all(units)


#: Grafana's names of units (its value formats), as far as ours go, by the unit in a metric's name.
UNITS = {
    "bytes": "bytes",
    "seconds": "s",
    "joules": "joule",
    "watts": "watt",
    "celsius": "celsius",
    "ratio": "percentunit",
}


def test_a_panel_of_curves_has_the_unit_of_its_metrics(dashboard):
    for panel in (panel for panel in dashboard["panels"] if panel["type"] in {"timeseries", "bargauge"}):
        for target in panel["targets"]:
            name = metrics_in(target["expr"])[0]
            if name in FAMILIES and "/" not in target["expr"] and "rate(" not in target["expr"]:
                assert panel["fieldConfig"]["defaults"]["unit"] == UNITS.get(FAMILIES[name].unit, "none"), name


def test_variables_resolve(dashboard):
    defined = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert len(set(defined)) == len(defined)
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) - {"__all"}
    assert used <= {*defined, *BUILT_IN}
    assert set(defined) <= used  # none is for nothing
    for index, variable in enumerate(dashboard["templating"]["list"]):
        earlier = set(defined[:index])
        assert set(re.findall(r"\$(\w+)", str(variable["query"]))) <= earlier


def test_every_source_is_the_variable(dashboard):
    sources = [panel["datasource"] for panel in dashboard["panels"]]
    sources += [target["datasource"] for panel in dashboard["panels"] for target in panel["targets"]]
    sources += [variable["datasource"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_queries_of_a_panel_are_told_apart(dashboard):
    for panel in dashboard["panels"]:
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)


def metrics_in(expr):
    """Names of metrics in an expression, in order: words that are no label, function or keyword."""
    without = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"|\b(on|by|group_left|ignoring)\s*\([^)]*\)", " ", expr)
    return [word for word in re.findall(r"[a-zA-Z_:][\w:]*", without) if re.match("testbed_|device:|ALERTS", word)]


def test_every_metric_of_a_query_is_exported_or_recorded(dashboard):
    for panel, expr in targets_of(dashboard):
        names = metrics_in(expr)
        assert names, (panel, expr)
        assert set(names) <= {*FAMILIES, *RECORDED, *OTHERS}, panel


def test_every_label_of_a_query_is_one_of_its_metrics(dashboard):
    for panel, expr in targets_of(dashboard):
        for name, matchers in re.findall(r"(testbed_\w+)\{([^}]*)\}", expr):
            labels = set(re.findall(r"(\w+)[!=]", matchers))
            assert labels <= set(FAMILIES[name].labels), (panel, name)


def test_every_metric_that_is_exported_is_shown_or_alerted_on():
    """What nobody looks at need not be told."""
    shown = {name for dashboard in ALL.values() for _, expr in targets_of(dashboard) for name in metrics_in(expr)}
    shown |= {name for rule in rules() for name in metrics_in(rule["expr"])}
    assert set(FAMILIES) - shown == set()


def test_every_rule_is_of_metrics_that_there_are():
    for rule in rules():
        assert metrics_in(rule["expr"])
        assert set(metrics_in(rule["expr"])) <= {*FAMILIES, *RECORDED}


def test_every_alert_is_in_the_page_and_has_a_test():
    page = (DASHBOARDS.parent / "docs" / "watching.md").read_text(encoding="utf-8")
    tested = (DASHBOARDS / "rules_test.yml").read_text(encoding="utf-8")
    for rule in rules():
        name = rule.get("alert") or rule["record"]
        assert name in tested
        assert "record" in rule or f"| {name} |" in page


def test_what_grafana_is_provisioned_with_names_what_up_gives_it():
    source = yaml.safe_load((DASHBOARDS / "provisioning/datasources/testbed.yaml").read_text())["datasources"][0]
    provider = yaml.safe_load((DASHBOARDS / "provisioning/dashboards/testbed.yaml").read_text())["providers"][0]
    assert (source["type"], source["url"]) == ("prometheus", "${TESTBED_PROMETHEUS_URL}")
    assert provider["options"]["path"] == "${TESTBED_DASHBOARDS}"
    services = yaml.safe_load((DASHBOARDS / "compose.yaml").read_text())["services"]
    assert {"TESTBED_PROMETHEUS_URL", "TESTBED_DASHBOARDS"} <= services["grafana"]["environment"].keys()
    assert all(re.search(r":v?\d+\.\d+\.\d+$", service["image"]) for service in services.values())
    mounted = [volume.partition(":")[0] for service in services.values() for volume in service["volumes"]]
    assert all((DASHBOARDS / name).exists() for name in mounted if name.startswith("./"))


# ── promtool ────────────────────────────────────────────────────────────────────────────────────────────────────────
def promtool(*args):
    return subprocess.run(["promtool", *args], cwd=DASHBOARDS, capture_output=True, text=True, check=False)


@pytest.mark.prometheus
@pytest.mark.parametrize(
    "args",
    [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")],
)
def test_promtool_is_content(args):
    done = promtool(*args)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prometheus
def test_promtool_finds_what_is_wrong(tmp_path):
    """The tests of the rules can fail: with another limit, one does."""
    for name in ("rules.yml", "rules_test.yml"):
        shutil.copy(DASHBOARDS / name, tmp_path)
    rules_file = tmp_path / "rules.yml"
    rules_file.write_text(rules_file.read_text().replace("> 0.98", "> 0.999"))
    done = promtool("test", "rules", str(tmp_path / "rules_test.yml"))
    assert done.returncode == 1
    assert "DeviceMemoryAtLimit" in done.stdout + done.stderr


# ── up, status, down ────────────────────────────────────────────────────────────────────────────────────────────────
GRAFANA = '''#!{python}
"""Stands in for a Grafana: writes down how it was started, and answers."""
import http.server, json, os, sys
told = {{key: value for key, value in os.environ.items() if key.startswith(("GF_", "TESTBED_"))}}
with open("told.json", "w") as file:
    json.dump([sys.argv[1:], told], file)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()
place = os.environ["GF_SERVER_HTTP_ADDR"], int(os.environ["GF_SERVER_HTTP_PORT"])
http.server.HTTPServer(place, Answer).serve_forever()
'''


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A PATH of our own: empty but for the interpreter and what a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def install(programs, name, script=None):
    path = programs / name
    if script is None:
        path.symlink_to(shutil.which(name, path=os.defpath) or f"/usr/bin/{name}")
    else:
        path.write_text(script.format(python=sys.executable))
        path.chmod(0o755)


def run(*args, code=0):
    """In a process of its own: what it starts must outlive it."""
    command = [sys.executable, "-m", "testbed", "dashboards", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=DASHBOARDS.parent)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def standings(*args, code=0):
    return {each["name"]: each for each in json.loads(run(*args, "--json", code=code).stdout)}


@pytest.fixture
def taken_down(cache):
    yield
    run("down")


@pytest.mark.prometheus
def test_up_starts_a_prometheus_once_status_shows_it_and_down_ends_it(cache, taken_down, programs):
    install(programs, "prometheus")
    assert run("status", code=1).stdout.split() == ["prometheus", "down", "grafana", "not", "installed"]
    first = standings("up", "--port", "0", "--retention", "3d")
    assert first["prometheus"]["state"] == "ready"
    assert first["grafana"]["state"] == "not installed"
    assert first["prometheus"]["url"] in first["grafana"]["note"]
    flags = json.loads(get(f"{first['prometheus']['url']}/api/v1/status/flags"))["data"]
    assert flags["storage.tsdb.retention.time"] == "3d"
    assert flags["web.listen-address"].startswith("127.0.0.1:")
    assert flags["storage.tsdb.path"] == str(cache / "prometheus" / "data")
    again = standings("up")
    assert (again["prometheus"]["pid"], again["prometheus"]["url"]) == (
        first["prometheus"]["pid"],
        first["prometheus"]["url"],
    )
    assert standings("status")["prometheus"]["pid"] == first["prometheus"]["pid"]
    assert run("down").stdout == "ended: prometheus\n"
    assert run("down").stdout == "neither Prometheus nor Grafana was running\n"
    with pytest.raises(OSError, match="refused"):
        get(first["prometheus"]["url"])


@pytest.mark.prometheus
def test_its_configuration_is_ours_and_finds_who_announces_himself(cache, taken_down, programs):
    install(programs, "prometheus")
    url = standings("up", "--port", "0")["prometheus"]["url"]
    config = yaml.safe_load(json.loads(get(f"{url}/api/v1/status/config"))["data"]["yaml"])
    [job] = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [str(targets_folder() / "*.json")]
    loaded = json.loads(get(f"{url}/api/v1/rules"))["data"]["groups"][0]["rules"]
    assert {rule["name"] for rule in loaded} == {rule.get("alert") or rule["record"] for rule in rules()}


@pytest.mark.prometheus
def test_a_stale_file_and_another_process_with_its_number_are_not_taken_for_it(cache, taken_down, programs):
    install(programs, "prometheus")
    state = cache / "prometheus" / "process.json"
    standings("up", "--port", "0")
    kept = json.loads(state.read_text())
    os.kill(kept["process"]["pid"], signal.SIGKILL)
    kept["process"]["pid"] = os.getpid()  # this process began at another time
    state.write_text(json.dumps(kept))
    assert run("down").stdout == "neither Prometheus nor Grafana was running\n"
    state.write_text(json.dumps(kept))
    assert standings("status", code=1)["prometheus"]["state"] == "down"
    assert standings("up", "--port", "0")["prometheus"]["state"] == "ready"


@pytest.mark.prometheus
def test_a_grafana_is_started_with_the_source_and_the_dashboards(cache, taken_down, programs):
    """A stand-in: what a real one makes of it is not tried here."""
    install(programs, "prometheus")
    install(programs, "grafana", GRAFANA)
    found = standings("up", "--port", "0", "--grafana-port", "0")
    assert found["grafana"]["state"] == "ready"
    args, told = json.loads((cache / "grafana" / "told.json").read_text())
    assert args[0] == "server"
    assert args[1].startswith("--homepath=")
    assert told["TESTBED_PROMETHEUS_URL"] == found["prometheus"]["url"]
    assert (Path(told["TESTBED_DASHBOARDS"]) / "fleet.json").exists()
    assert (Path(told["GF_PATHS_PROVISIONING"]) / "datasources").is_dir()
    assert told["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    password = cache / "grafana" / "password"
    assert told["GF_SECURITY_ADMIN_PASSWORD"] == password.read_text() != "admin"
    assert password.stat().st_mode & 0o077 == 0
    assert run("down").stdout == "ended: grafana, prometheus\n"


def test_without_a_prometheus_the_way_to_one_is_told(programs, cache, capsys):
    assert main(["dashboards", "up"]) == 2
    assert "apt-get install --no-install-recommends prometheus" in capsys.readouterr().err
    assert main(["dashboards", "status"]) == 1
    assert capsys.readouterr().out.split() == ["prometheus", "not", "installed", "grafana", "not", "installed"]


def test_a_port_that_somebody_else_has_is_told_and_his_answer_is_not_taken_for_ours(programs, cache, capsys):
    install(programs, "prometheus", "#!{python}\nraise SystemExit('never started')\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["dashboards", "up", "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in capsys.readouterr().err


def test_one_that_ends_at_once_is_told_with_its_last_words(programs, cache):
    install(programs, "prometheus", "#!{python}\nraise SystemExit('the disk is full of cats')\n")
    done = run("up", "--port", "0", code=1)
    assert "prometheus ended at once: the disk is full of cats; see " in done.stderr
    assert standings("status", code=1)["prometheus"]["state"] == "down"
