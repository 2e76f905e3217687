"""Stand-ins for plugs and servers that meters ask over HTTP: real servers on 127.0.0.1, each in a thread.

    with ShellySecond(password="secret") as plug:
        make("shelly", {"host": plug.host, "password_env": "PLUG"})
        plug.watts = 7.5

`plug.mood` makes any of them misbehave: "slow" (no answer), "garbage" (no JSON), "broken" (500), "rude" (no HTTP).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64encode
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any, ClassVar, Self
from urllib.parse import parse_qsl, urlsplit


class StandIn:
    """Answers GET requests with what `answer` returns: (code, JSON)."""

    def __init__(self, password: str | None = None, watts: float = 4.2) -> None:
        self.password = password
        self.watts = watts
        self.on = True
        self.mood = ""
        self.asked: list[str] = []  # paths, with their queries
        self._awake = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._awake.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        raise NotImplementedError

    def challenge(self, request: BaseHTTPRequestHandler) -> str | None:
        """What a request without the right password is told; None where it has it, or none is needed."""
        return None

    def open_to_all(self, path: str) -> bool:
        return False

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        plug = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                plug.respond(self)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def respond(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append(request.path)
        if self.mood == "slow":
            self._awake.wait()
        elif self.mood == "rude":
            request.wfile.write(b"SSH-2.0-dropbear\r\n")
        elif self.mood == "garbage":
            self._send(request, 200, b"<html>Please log in</html>")
        elif self.mood == "broken":
            self._send(request, 500, b"out of memory")
        elif self.mood == "moved":
            request.send_response(302)
            request.send_header("Location", "http://127.0.0.1:1/elsewhere")
            request.end_headers()
        else:
            self._respond(request)

    def _respond(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        if not self.open_to_all(parts.path) and (challenge := self.challenge(request)) is not None:
            request.send_response(401)
            request.send_header("WWW-Authenticate", challenge)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        code, told = self.answer(parts.path, dict(parse_qsl(parts.query)))
        self._send(request, code, told if isinstance(told, bytes) else json.dumps(told).encode())

    def _send(self, request: BaseHTTPRequestHandler, code: int, data: bytes) -> None:
        request.send_response(code)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


class ShellyFirst(StandIn):
    """A Shelly Plug S: https://shelly-api-docs.shelly.cloud/gen1/; the figures of a public capture."""

    joules = 0.0
    valid = True

    def challenge(self, request: BaseHTTPRequestHandler) -> str | None:
        if self.password is None:
            return None
        right = b64encode(f"admin:{self.password}".encode()).decode()
        return None if request.headers.get("Authorization") == f"Basic {right}" else 'Basic realm="shellyplug-s"'

    def open_to_all(self, path: str) -> bool:
        return path == "/shelly"

    def answer(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        if path == "/shelly":
            return 200, {"type": "SHPLG-S", "mac": "E868E7000000", "auth": self.password is not None, "fw": "20190516"}
        if path == "/status":
            meter = {"power": self.watts, "is_valid": self.valid, "timestamp": 1680779310, "total": 439237}
            return 200, {"relays": [{"ison": self.on}], "meters": [{**meter, "counters": [2.115, 2.114, 2.142]}]}
        if path == "/relay/0":
            if self.mood != "stuck":
                self.on = query["turn"] == "on"
            return 200, {"ison": self.on, "has_timer": False}
        return 404, b"Not Found"


class ShellySecond(StandIn):
    """A Shelly Plus Plug S: https://shelly-api-docs.shelly.cloud/gen2/ with digest authentication by SHA-256."""

    REALM: ClassVar[str] = "shellyplusplugs-b0b21c000000"
    watt_hours: float | None = 9492.468
    measures = True
    algorithm = "SHA-256"

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.nonce = 1_716_556_501  # a test lets it expire by another one
        self.seen: set[tuple[str, str]] = set()  # nonces with the counts that were used

    def challenge(self, request: BaseHTTPRequestHandler) -> str | None:
        if self.password is None or self._proven(request):
            return None
        return f'Digest qop="auth", realm="{self.REALM}", nonce="{self.nonce}", algorithm={self.algorithm}'

    def _proven(self, request: BaseHTTPRequestHandler) -> bool:
        header = request.headers.get("Authorization", "")
        told = {name: quoted or plain for name, quoted, plain in re.findall(r'(\w+)=(?:"([^"]*)"|([^,\s]+))', header)}
        if not header.startswith("Digest ") or told["nonce"] != str(self.nonce):
            return False
        if (told["nonce"], told["nc"]) in self.seen:
            return False
        secret = _sha256(f"admin:{self.REALM}:{self.password}")
        asked = _sha256(f"GET:{request.path}")
        right = _sha256(f"{secret}:{self.nonce}:{told['nc']}:{told['cnonce']}:auth:{asked}")
        if told["uri"] != request.path or told["response"] != right:
            return False
        self.seen.add((told["nonce"], told["nc"]))
        return True

    def open_to_all(self, path: str) -> bool:
        return path == "/shelly"

    def answer(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        if path == "/shelly":
            return 200, {"id": self.REALM, "model": "SNPL-00112EU", "gen": 2, "auth_en": self.password is not None}
        if path == "/rpc/Switch.GetStatus" and query["id"] == "0":
            energy = {} if self.watt_hours is None else {"aenergy": {"total": self.watt_hours, "by_minute": [0, 0, 0]}}
            power = {"apower": self.watts, "voltage": 230.1, "current": 0.03, **energy} if self.measures else {}
            return 200, {"id": 0, "source": "init", "output": self.on, **power}
        if path == "/rpc/Switch.Set" and query["id"] == "0":
            was, self.on = self.on, self.on if self.mood == "stuck" else query["on"] == "true"
            return 200, {"was_on": was}
        return 404, b"No handler for that"


class Tasmota(StandIn):
    """A plug with Tasmota: public captures of `Status 8`; it asks for a password with a 200."""

    power = "26"  # as it writes it
    status = "Status 8"
    measures = True

    def answer(self, path: str, query: dict[str, str]) -> tuple[int, Any]:
        if path != "/cm":
            return 404, b"File not found"
        login = (query.get("user"), query.get("password"))
        if self.password is not None and login != ("admin", self.password):
            return 200, {"WARNING": "Need user=<username>&password=<password>"}
        command, _, word = query["cmnd"].partition(" ")
        if command.startswith("Power"):
            if self.mood != "stuck":
                self.on = word == "ON"
            return 200, {"POWER": "ON" if self.on else "OFF"}
        energy = f',"ENERGY":{{"Total":0.003,"Yesterday":0.000,"Today":0.003,"Power":{self.power},"Voltage":239}}'
        known = energy if self.measures and query["cmnd"] == self.status else ""
        return 200, f'{{"StatusSNS":{{"Time":"2019-09-06T20:06:19"{known}}}}}'.encode()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class KasaFirst:
    """An HS110: the protocol of TCP port 9999 (https://www.softscheck.com/en/reverse-engineering-tp-link-hs110/).

    Every message is its length in four bytes and JSON, in which each byte is combined with the one before by XOR.
    """

    def __init__(self) -> None:
        self.watts = 4.2
        self.on = True
        self.measures = True
        self.mood = ""
        self._connections: list[Any] = []
        plug = self

        class Handler(StreamRequestHandler):
            def handle(self) -> None:
                plug._connections.append(self.connection)
                while len(head := self.rfile.read(4)) == 4:
                    asked = json.loads(_unmixed(self.rfile.read(int.from_bytes(head, "big"))))
                    told = _mixed(json.dumps(plug.answer(asked)).encode())
                    self.wfile.write(len(told).to_bytes(4, "big") + told)

        class Server(ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = False

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.hang_up()

    def hang_up(self) -> None:
        """As a plug does that was switched off and on itself."""
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)
        self._connections.clear()

    def answer(self, asked: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            module: {command: self._answer(module, command, given) for command, given in commands.items()}
            for module, commands in asked.items()
        }

    def _answer(self, module: str, command: str, given: dict[str, Any]) -> dict[str, Any]:
        if (module, command) == ("system", "get_sysinfo"):
            return {
                "err_code": 0, "model": "HS110(EU)", "dev_name": "Wi-Fi Smart Plug With Energy Monitoring",
                "type": "IOT.SMARTPLUGSWITCH", "alias": "board", "mac": "50:C7:BF:00:00:00", "deviceId": "8006",
                "hwId": "45E2", "hw_ver": "1.0", "sw_ver": "1.2.5", "oemId": "3D34", "relay_state": int(self.on),
                "on_time": 0, "feature": "TIM:ENE" if self.measures else "TIM", "led_off": 0, "rssi": -55,
                "latitude": 0, "longitude": 0, "updating": 0, "icon_hash": "", "active_mode": "none",
            }  # fmt: skip
        if (module, command) == ("emeter", "get_realtime"):
            return {"current": 0.03, "voltage": 230.5, "power": self.watts, "total": 18.045, "err_code": 0}
        if (module, command) == ("system", "set_relay_state"):
            self.on = self.on if self.mood == "stuck" else bool(given["state"])
            return {"err_code": 0}
        if (module, command) == ("time", "get_timezone"):
            return {"index": 39, "err_code": 0}
        if (module, command) == ("time", "get_time"):
            return {"year": 2026, "month": 3, "mday": 1, "hour": 12, "min": 0, "sec": 0, "err_code": 0}
        return {"err_code": -1, "err_msg": "module not support"}


def _mixed(data: bytes) -> bytes:
    key, out = 171, bytearray()
    for byte in data:
        key ^= byte
        out.append(key)
    return bytes(out)


def _unmixed(data: bytes) -> bytes:
    return bytes(byte ^ before for byte, before in zip(data, b"\xab" + data[:-1], strict=True))
