"""Metrics over HTTP, on loopback unless told otherwise, where a Prometheus of this machine finds them by itself."""

from __future__ import annotations

import errno
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from testbed.errors import UsageError
from testbed.exporter.targets import all_targets, announced

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

LOOPBACK = "127.0.0.1"
_EVERYWHERE = {"0.0.0.0": LOOPBACK, "::": "::1"}  # noqa: S104 -- compared with, not bound to

Answer = Callable[..., Iterable[bytes]]


@contextmanager
def serve(
    registry: CollectorRegistry, address: str | int, *, serves: str = "run", linger_seconds: float = 0.0
) -> Iterator[str]:
    """Serve /metrics and /targets at `[HOST:]PORT` (port 0: a free one); gives the URL of the metrics.

    serves           "run" or "store": a label of everything that is scraped here
    linger_seconds   when the block ends as it should, and somebody has been scraping: how long to wait for one more
                     scrape, so that the end of a run is seen

    Raises UsageError for an address that is none, is not this machine's, or is in use.
    """
    host, port = parse_address(address)
    scrapes = _Scrapes()
    with _bound(host, port) as server:
        server.set_app(_app(registry, scrapes))
        target = join_address(_EVERYWHERE.get(host, host), server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            with announced(target, serves):
                yield f"http://{target}/metrics"
                scrapes.wait_for_another(linger_seconds)
        finally:
            server.shutdown()
            thread.join()


def parse_address(text: str | int) -> tuple[str, int]:
    """Host and port of "9101", "127.0.0.1:9101", "[::1]:9101"; raises UsageError."""
    host, colon, port = str(text).rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if colon else LOOPBACK
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"metrics: expected an address such as 9101, 127.0.0.1:9101 or [::1]:9101, got {str(text)!r}")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The reverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Scrapes:
    """How often somebody has asked."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def count(self) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def wait_for_another(self, patience_seconds: float) -> None:
        with self._changed:
            if before := self._count:
                self._changed.wait_for(lambda: self._count > before, patience_seconds)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Without the base's look-up of the host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def handle_error(self, *_: Any) -> None:
        """Whoever asked has gone: that is theirs to know."""


class _Quiet(WSGIRequestHandler):
    timeout = 30  # seconds; a connection that says nothing is let go

    def log_message(self, *_: Any) -> None:
        """The terminal belongs to the run."""


def _bound(host: str, port: int) -> _Server:
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        kind = type("_FamilyServer", (_Server,), {"address_family": family})
        server: _Server = kind(place[:2], _Quiet)
    except OSError as error:
        where = join_address(host, port)
        other = "port, or 0 for a free one" if error.errno == errno.EADDRINUSE else "address of this machine"
        raise UsageError(
            f"metrics cannot be served at {where}: {error.strerror or error}; choose another {other}"
        ) from error
    return server


def _app(registry: CollectorRegistry, scrapes: _Scrapes) -> Answer:
    from prometheus_client import make_wsgi_app

    metrics = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            answer: Iterable[bytes] = metrics(environ, start_response)
            scrapes.count()
            return answer
        if path == "/targets":
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(all_targets()).encode()]
        found = path == "/"
        start_response("200 OK" if found else "404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"edge-testbed: /metrics for Prometheus, /targets for its http_sd\n"]

    return app
