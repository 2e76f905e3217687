"""What a recording of a board must not tell: whose it is, where it stands, which of its kind it is.

Known words (the board's own host name, users, networks, serial numbers, addresses, asked for while recording) and
patterns (whatever looks like a hardware, network or disk address, a country or a time zone) are replaced by neutral
ones of the same shape, so that a program that reads the recording still finds what it expects.  Names that every board
of its kind has out of the box (raspberrypi, ubuntu) tell nothing and stay.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping

#: By kind of private word: what stands in its place, and whether it is a name.  Names are looked for as whole words,
#: and not in the kernel's own trees: a host called "cpu" must not rename the processors.
_REPLACEMENTS = {
    "serial numbers": ("0000000000000000", False),
    "machine ids": ("00000000000000000000000000000000", False),
    "hardware addresses": ("00:00:00:00:00:00", False),
    "host names": ("board", True),
    "user names": ("user", True),
    "network names": ("network", True),
}
#: Out of the box on Raspberry Pi OS, Ubuntu and JetPack; and what is no name.
_STOCK = frozenset(
    {
        *("board", "desktop", "jetson", "localhost", "localhost.localdomain", "network", "nobody", "nvidia"),
        *("nvidia-desktop", "orin", "pi", "raspberrypi", "root", "tegra-ubuntu", "ubuntu", "unknown", "user"),
    }
)
_LEAST_SERIAL = 6  # characters: a serial number of "0" or "none" is none
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
_IPV6 = re.compile(r"(?<![0-9A-Za-z:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![0-9A-Za-z:.])")
#: Of documentation (RFC 5737, RFC 3849); the first also as chronyc writes it, in hexadecimal.
_SOME_IPV4, _SOME_IPV4_DIGITS, _SOME_IPV6 = "192.0.2.1", "C0000201", "2001:db8::1"
_PATTERNS = (
    (
        "hardware addresses",
        re.compile(r"(?<![0-9A-Fa-f:])[0-9A-Fa-f]{2}(?:[:-][0-9A-Fa-f]{2}){5}(?![0-9A-Fa-f:])"),
        "00:00:00:00:00:00",
    ),
    (
        "disk identifiers",
        re.compile(r"\b[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}\b"),
        "00000000-0000-0000-0000-000000000000",
    ),
    ("disk identifiers", re.compile(r"(PARTUUID=)[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{2})\b"), r"\g<1>00000000\g<2>"),
    ("serial numbers", re.compile(r"(serial(?:no|_number)?=)\w{6,}", re.IGNORECASE), r"\g<1>0000000000000000"),
    ("machine ids", re.compile(r"(rpi-imager-)\d+"), r"\g<1>0"),  # of cloud-init, on the kernel's line
    ("places", re.compile(r"(ieee80211_regdom=)\w+"), r"\g<1>00"),
    ("places", re.compile(r"(Timezone=)\S+"), r"\g<1>Etc/UTC"),
)


class Privacy:
    """Cleans texts, and counts what it took out, by kind: every word once, however often it stood there."""

    def __init__(self, private: Mapping[str, Iterable[str]]) -> None:
        """`private`: words by kind, the kinds of `_REPLACEMENTS`; what is no secret among them is left out."""
        self._words = {
            kind: sorted(
                {word for word in map(str.strip, private.get(kind, ())) if _is_secret(kind, word)}, key=_longest
            )
            for kind in _REPLACEMENTS
        }
        self._found: dict[str, set[str]] = {}

    @property
    def removed(self) -> dict[str, int]:
        """How many different words of each kind were taken out."""
        return {kind: len(words) for kind, words in sorted(self._found.items())}

    def cleaned(self, text: str, *, of_kernel: bool = False) -> str:
        """The text without what is private; `of_kernel`: from /sys, where no name of a person or network stands."""
        for kind, words in self._words.items():
            replacement, is_name = _REPLACEMENTS[kind]
            if not (is_name and of_kernel):
                for word in words:
                    text = self._without(kind, _whole(word, is_name), replacement, text)
        return self._without_patterns(text)

    def _without_patterns(self, text: str) -> str:
        for kind, pattern, replacement in _PATTERNS:
            text = self._without(kind, pattern, replacement, text)
        for address in filter(_is_private_ipv4, _IPV4.findall(text)):
            digits = re.compile(rf"\b{ipaddress.IPv4Address(address).packed.hex()}\b", re.IGNORECASE)
            text = self._without("network addresses", digits, _SOME_IPV4_DIGITS, text)
        text = self._without("network addresses", _IPV6, _SOME_IPV6, text, _is_private_ipv6)
        return self._without("network addresses", _IPV4, _SOME_IPV4, text, _is_private_ipv4)

    def _without(
        self,
        kind: str,
        pattern: re.Pattern[str],
        replacement: str,
        text: str,
        counts: Callable[[str], bool] = lambda _: True,
    ) -> str:
        def put(found: re.Match[str]) -> str:
            new = found.expand(replacement)
            if new == found[0] or not counts(found[0]):
                return found[0]
            self._found.setdefault(kind, set()).add(found[0])
            return new

        return pattern.sub(put, text)


def _is_secret(kind: str, word: str) -> bool:
    if not word or word.lower() in _STOCK or not word.strip("0:.-"):
        return False
    return kind not in {"serial numbers", "machine ids"} or len(word) >= _LEAST_SERIAL


def _longest(word: str) -> int:
    """Longer words first: "orin-lab.example.org" before "orin-lab"."""
    return -len(word)


def _whole(word: str, is_name: bool) -> re.Pattern[str]:
    if not is_name:
        return re.compile(re.escape(word), re.IGNORECASE)
    return re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])", re.IGNORECASE)


def _is_private_ipv4(text: str) -> bool:
    """An address at all, and none that every machine has."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or text in {_SOME_IPV4, "255.255.255.255"})


def _is_private_ipv6(text: str) -> bool:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or text == _SOME_IPV6)
