"""Questions to an appliance over HTTP, answered in JSON; with a name and a password where it asks for them.

Basic authentication (RFC 7617), and digest with SHA-256 or MD5 (RFC 7616), which urllib knows with MD5 and SHA-1 only.
A password is never in a file: a setting names the environment variable that holds it.  Nothing is asked through a
proxy, and no redirection is followed, which could carry a password elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from base64 import b64encode
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from testbed.errors import MeterError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from email.message import Message

_TIMEOUT_SECONDS = 3.0
_MOST_BYTES = 32 << 20  # a range of a week at one second
_OK, _UNAUTHORIZED = 200, 401
_CHALLENGE = re.compile(r'(\w+)=(?:"([^"]*)"|([^\s,]+))')
_HASHES: dict[str, Callable[[bytes], Any]] = {
    "SHA-256": hashlib.sha256,
    "MD5": lambda data: hashlib.md5(data, usedforsecurity=False),
}


class _Stay(HTTPRedirectHandler):
    """Takes every redirection for the error that it is."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Answer(NamedTuple):
    code: int
    reason: str
    headers: Message
    data: bytes

    @classmethod
    def of(cls, response: Any) -> _Answer:
        return cls(response.status, response.reason, response.headers, response.read(_MOST_BYTES))


class Appliance:
    """One address that is asked again and again.  `who` begins every message, such as "shelly plug-1"."""

    def __init__(self, who: str, address: str, user: str, password_env: str | None) -> None:
        self.who = who
        self._base = (address if "://" in address else f"http://{address}").rstrip("/")
        self._user, self._variable = user, password_env
        self._opener = build_opener(ProxyHandler({}), _Stay())
        self._login: Callable[[str], str] | None = None  # path → what the appliance wants to see

    @property
    def password(self) -> str | None:
        """From the environment; None where the inventory names no variable.  Raises MeterError for an unset one."""
        if self._variable is None:
            return None
        found = os.environ.get(self._variable)
        if not found:
            raise MeterError(
                f"{self.who}: its password is to be in the environment variable {self._variable}, which is not set; "
                f"set it before the command"
            )
        return found

    def ask(
        self,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        told: Collection[int] = (),
        parse_float: Callable[[str], Any] = float,
    ) -> Any:
        """The answer's JSON; raises MeterError with the reason when there is none.

        `told` are the codes of refusals whose reason is JSON, too: they are answers.
        """
        target = f"{path}?{urlencode(query)}" if query else path
        answer = self._fetch(target)
        if answer.code == _UNAUTHORIZED:
            self._login = self._answer_to(answer)
            answer = self._fetch(target)
        if answer.code == _UNAUTHORIZED:
            self._login = None
            raise MeterError(f"{self.who}: it does not take the password in {self._variable} for user {self._user}")
        if answer.code not in {*told, _OK}:
            words = answer.data[:200].decode(errors="replace").strip()
            raise MeterError(
                f"{self.who}: {self._base}{path} answers {answer.code} {answer.reason}: {words}".rstrip(": ")
            )
        try:
            return json.loads(answer.data, parse_float=parse_float)
        except ValueError:
            start = answer.data[:40].decode(errors="replace").strip()
            raise MeterError(f"{self.who}: expected JSON from {self._base}{path}, got {start!r}") from None

    def _fetch(self, target: str) -> _Answer:
        try:
            request = Request(self._base + target)  # noqa: S310 -- the user's own inventory says where
            if self._login is not None:
                request.add_unredirected_header("Authorization", self._login(urlsplit(self._base).path + target))
            try:
                with self._opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
                    return _Answer.of(response)
            except HTTPError as refusal:
                with refusal:
                    return _Answer.of(refusal)
        except URLError as error:
            raise self._silent(error.reason) from None
        except (OSError, ValueError) as error:  # a timeout while it answers; an address that is none
            raise self._silent(error) from None
        except HTTPException as error:
            raise MeterError(f"{self.who}: {self._base} does not speak HTTP ({error!r})") from None

    def _silent(self, reason: object) -> MeterError:
        words = "no answer in time" if isinstance(reason, TimeoutError) else getattr(reason, "strerror", None) or reason
        return MeterError(f"{self.who}: {self._base} cannot be reached ({words}); is it on, and its address right?")

    def _answer_to(self, refusal: _Answer) -> Callable[[str], str]:
        password = self.password
        if password is None:
            raise MeterError(
                f"{self.who}: {self._base} asks for a password; put it into an environment variable, and name that in "
                f"the inventory: password_env: PLUG_PASSWORD"
            )
        challenges = refusal.headers.get_all("WWW-Authenticate") or ["none"]
        for challenge in challenges:
            scheme, _, rest = challenge.partition(" ")
            if scheme.lower() == "basic":
                word = b64encode(f"{self._user}:{password}".encode()).decode()
                return lambda _: f"Basic {word}"
            if scheme.lower() == "digest":
                told = {name.lower(): quoted or plain for name, quoted, plain in _CHALLENGE.findall(rest)}
                if told.get("algorithm", "MD5").upper() in _HASHES:
                    return Digest(self._user, password, told)
        raise MeterError(f"{self.who}: it asks for a login of a kind that is not known here: {challenges[0]}")


class Digest:
    """Answers one challenge, as often as the appliance takes it: each time with the next count."""

    def __init__(self, user: str, password: str, challenge: Mapping[str, str], client_nonce: str | None = None) -> None:
        self._algorithm = challenge.get("algorithm", "MD5").upper()
        self._told = challenge
        self._user = user
        self._secret = self._hash(f"{user}:{challenge.get('realm', '')}:{password}")
        self._client_nonce = client_nonce or os.urandom(16).hex()
        self._count = 0

    def __call__(self, uri: str) -> str:
        """The header for a GET of that path and query."""
        self._count += 1
        nonce, asked = self._told.get("nonce", ""), self._hash(f"GET:{uri}")
        fields = {"username": self._user, "realm": self._told.get("realm", ""), "nonce": nonce, "uri": uri}
        plain = {"algorithm": self._algorithm}
        if "qop" in self._told:
            count = f"{self._count:08x}"
            proof = self._hash(f"{self._secret}:{nonce}:{count}:{self._client_nonce}:auth:{asked}")
            plain |= {"qop": "auth", "nc": count}
            fields["cnonce"] = self._client_nonce
        else:
            proof = self._hash(f"{self._secret}:{nonce}:{asked}")
        if "opaque" in self._told:
            fields["opaque"] = self._told["opaque"]
        quoted = [f'{name}="{value}"' for name, value in {**fields, "response": proof}.items()]
        return "Digest " + ", ".join([*quoted, *(f"{name}={value}" for name, value in plain.items())])

    def _hash(self, text: str) -> str:
        digest: str = _HASHES[self._algorithm](text.encode()).hexdigest()
        return digest


def number(who: str, value: Any, what: str) -> float:
    """A figure of an answer; raises MeterError where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MeterError(f"{who}: it tells no {what}, but {value!r}")
    return float(value)
