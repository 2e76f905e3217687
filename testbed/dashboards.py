"""The Prometheus and the Grafana of this machine, started with our configuration and kept while they are wanted.

Everything of them lies in the cache: prometheus/ (configuration, targets, data, log) and grafana/.  Their processes are
known by identity, so that a stale file, or another process with the same id, is never taken for them.

Tried on: Prometheus 2.42 (Debian 12).  The Grafana part was tried with a stand-in only, never with a Grafana.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from testbed.cache import cache_folder
from testbed.durable import read_json, write_json
from testbed.errors import StoreError, TestbedError, UsageError
from testbed.exporter.serving import LOOPBACK, join_address
from testbed.exporter.targets import sweep, targets_folder
from testbed.package_data import data_folder
from testbed.process_identity import ProcessIdentity

PROMETHEUS, GRAFANA = "prometheus", "grafana"
READY, STARTING, DOWN, MISSING = "ready", "does not answer", "down", "not installed"
RETENTION = "90d"
_READY_PATHS = {PROMETHEUS: "/-/ready", GRAFANA: "/api/health"}
_START_SECONDS, _END_SECONDS, _PAUSE_SECONDS = 60.0, 15.0, 0.05
#: Where Grafana's packages for Debian and Red Hat put what its archive has beside bin/.
_GRAFANA_HOME = Path("/usr/share/grafana")
_NO_PROMETHEUS = (
    "there is no `prometheus` on the PATH (Debian, Ubuntu: apt-get install --no-install-recommends prometheus); "
    "or use dashboards/compose.yaml"
)


@dataclass(frozen=True)
class Standing:
    """How one of the two is."""

    name: str
    state: str
    url: str | None = None
    pid: int | None = None
    note: str | None = None


@dataclass(frozen=True)
class _Program:
    """What is to be started."""

    name: str
    url: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


# ── what a user asks for ─────────────────────────────────────────────────────────────────────────────────────────────
def up(*, port: int, grafana_port: int, listen: str = LOOPBACK, retention: str = RETENTION) -> list[Standing]:
    """Start what is installed and does not run yet; returns when it answers.  Port 0: a free one.

    Raises UsageError when there is no Prometheus or a port is taken, TestbedError when one ends at once.
    """
    binary = shutil.which(PROMETHEUS)
    if binary is None:
        raise UsageError(_NO_PROMETHEUS)
    _write_configuration()
    prometheus = _started(PROMETHEUS, lambda: _prometheus(binary, listen, port, retention))
    grafana = _grafana_command()
    if grafana is None:
        return [prometheus, _missing_grafana(prometheus)]
    url = prometheus.url or ""
    return [prometheus, _started(GRAFANA, lambda: _grafana(grafana, listen, grafana_port, url))]


def down() -> list[str]:
    """End what runs; the names of what was ended.  What was recorded stays."""
    return [name for name in (GRAFANA, PROMETHEUS) if _end(name)]


def status() -> list[Standing]:
    """How the two are."""
    missing = {PROMETHEUS: shutil.which(PROMETHEUS) is None, GRAFANA: _grafana_command() is None}
    return [_standing(name) or Standing(name, MISSING if missing[name] else DOWN) for name in (PROMETHEUS, GRAFANA)]


# ── Prometheus ───────────────────────────────────────────────────────────────────────────────────────────────────────
def _write_configuration() -> None:
    """Paths in it are relative to its own folder, where the targets are too."""
    folder = _folder(PROMETHEUS)
    targets_folder().mkdir(parents=True, exist_ok=True)
    sweep()
    for name in ("prometheus.yml", "rules.yml"):
        shutil.copyfile(data_folder("dashboards") / name, folder / name)


def _prometheus(binary: str, listen: str, port: int, retention: str) -> _Program:
    folder, port = _folder(PROMETHEUS), _free(listen, port, "--port")
    command = (
        binary,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--storage.tsdb.retention.time={retention}",
        f"--web.listen-address={join_address(listen, port)}",
    )
    return _Program(PROMETHEUS, _url(listen, port), command)


# ── Grafana (https://grafana.com/docs/grafana/latest/setup-grafana/configure-grafana/: GF_<SECTION>_<KEY>) ───────────
def _grafana_command() -> tuple[str, ...] | None:
    """Since version 9.4 it is `grafana server`; before, and in many packages still, `grafana-server`."""
    for words in (("grafana", "server"), ("grafana-server",)):
        if found := shutil.which(words[0]):
            home = _GRAFANA_HOME if _GRAFANA_HOME.is_dir() else Path(found).resolve().parent.parent
            return (found, *words[1:], f"--homepath={home}")
    return None


def _grafana(command: tuple[str, ...], listen: str, port: int, prometheus_url: str) -> _Program:
    ours, folder, port = data_folder("dashboards"), _folder(GRAFANA), _free(listen, port, "--grafana-port")
    environment = {
        "TESTBED_PROMETHEUS_URL": prometheus_url,
        "TESTBED_DASHBOARDS": str(ours / "json"),
        "GF_PATHS_PROVISIONING": str(ours / "provisioning"),
        "GF_PATHS_DATA": str(folder / "data"),
        "GF_PATHS_LOGS": str(folder / "log"),
        "GF_PATHS_PLUGINS": str(folder / "plugins"),
        "GF_SERVER_HTTP_ADDR": listen,
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_SECURITY_ADMIN_PASSWORD": _password(folder / "password"),
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": str(ours / "json" / "fleet.json"),
    }
    return _Program(GRAFANA, _url(listen, port), command, environment)


def _password(path: Path) -> str:
    """Of the user `admin`: drawn once, never the well-known one.  Whoever only looks needs none."""
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            stream.write(secrets.token_urlsafe(16))
    return path.read_text(encoding="ascii")


def _missing_grafana(prometheus: Standing) -> Standing:
    note = (
        f"install it from https://grafana.com/grafana/download, or give a Grafana that you have the data source "
        f"{prometheus.url} and the dashboards in {data_folder('dashboards') / 'json'}"
    )
    return Standing(GRAFANA, MISSING, note=note)


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _started(name: str, program: Callable[[], _Program]) -> Standing:
    """As it runs, once it answers; a Prometheus that runs already is told to read its configuration again."""
    running = _standing(name)
    if running is not None and running.pid is not None:
        if name == PROMETHEUS:
            with suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGHUP)
        return Standing(name, running.state, running.url, running.pid, "it ran already")
    process = _launch(program())
    try:
        _await_ready(name, process)
    except BaseException:
        _end(name)
        raise
    standing = _standing(name)
    if standing is None:
        raise TestbedError(_ended_at_once(name))
    return standing


def _launch(program: _Program) -> subprocess.Popen[bytes]:
    """In a session of its own: it outlives the command and its terminal."""
    folder = _folder(program.name)
    with (folder / f"{program.name}.log").open("ab") as log:
        process = subprocess.Popen(
            program.command,
            cwd=folder,
            env={**os.environ, **program.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    write_json(_state(program.name), {"process": asdict(ProcessIdentity.of(process.pid)), "url": program.url})
    return process


def _await_ready(name: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        standing = _standing(name)
        if standing is not None and standing.state == READY:
            return
        if process.poll() is not None:
            raise TestbedError(_ended_at_once(name))
        if time.monotonic() > deadline:
            log = _folder(name) / f"{name}.log"
            raise TestbedError(f"{name} does not answer after {_START_SECONDS:.0f} s and was ended; see {log}")
        time.sleep(_PAUSE_SECONDS)


def _ended_at_once(name: str) -> str:
    log = _folder(name) / f"{name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
    return f"{name} ended at once: {lines[-1]}; see {log}"


def _end(name: str) -> bool:
    """Whether there was something to end."""
    identity, _ = _kept(name)
    _state(name).unlink(missing_ok=True)
    if identity is None or not identity.alive:
        return False
    os.kill(identity.pid, signal.SIGTERM)
    deadline = time.monotonic() + _END_SECONDS
    while identity.alive:
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.kill(identity.pid, signal.SIGKILL)
        time.sleep(_PAUSE_SECONDS)
    return True


def _standing(name: str) -> Standing | None:
    """None when it does not run."""
    identity, url = _kept(name)
    if identity is None or url is None or not identity.alive:
        return None
    return Standing(name, READY if _answers(url + _READY_PATHS[name]) else STARTING, url, identity.pid)


def _kept(name: str) -> tuple[ProcessIdentity | None, str | None]:
    try:
        kept = read_json(_state(name))
        return ProcessIdentity(**kept["process"]), kept["url"]
    except (StoreError, KeyError, TypeError):  # nothing was started, or the file is not whole
        return None, None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 -- an http URL of our own
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _folder(name: str) -> Path:
    folder = cache_folder().absolute() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _state(name: str) -> Path:
    return _folder(name) / "process.json"


def _url(listen: str, port: int) -> str:
    return f"http://{join_address(LOOPBACK if listen in {'0.0.0.0', '::'} else listen, port)}"  # noqa: S104


def _free(listen: str, port: int, option: str) -> int:
    """The port, or for 0 a free one; raises UsageError when somebody has it: his answer would be taken for ours."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(listen, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UsageError(
            f"{join_address(listen, port)} cannot be listened on: {error.strerror or error}; "
            f"choose another port with {option}"
        ) from error
