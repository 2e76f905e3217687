"""How good a host's link is: bandwidth, delay and loss, as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from testbed.errors import UsageError

_BITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class LinkShape:
    """What is done to a host's packets, in each direction."""

    bits_per_second: int | None = None  # None: as fast as this machine is
    delay_seconds: float = 0.0  # of every packet: a round trip takes twice as long
    loss: float = 0.0  # the share of the packets that are dropped at random

    @property
    def needs_delay_line(self) -> bool:
        return self.delay_seconds > 0 or self.loss > 0

    def __str__(self) -> str:
        parts = []
        if self.bits_per_second is not None:
            parts.append(f"{self.bits_per_second / 1e6:g} Mbit/s")
        if self.delay_seconds:
            parts.append(f"{1000 * self.delay_seconds:g} ms each way")
        if self.loss:
            parts.append(f"{100 * self.loss:g} % lost")
        return ", ".join(parts) or "unshaped"


def parse_bandwidth(text: str) -> int:
    """From "20mbit" to 20 000 000 bits per second; raises UsageError."""
    bits = round(_number(text, _BITS, 'a bandwidth such as "20mbit"'))
    if bits < 8000:
        raise UsageError(f'expected a bandwidth of at least "8kbit", got "{text}"')
    return bits


def parse_delay(text: str) -> float:
    """From "50ms" to 0.05 seconds; raises UsageError."""
    return _number(text, _SECONDS, 'a delay such as "50ms"')


def parse_loss(text: str) -> float:
    """From "1%" to 0.01; raises UsageError."""
    share = _number(text, {"%": 0.01}, 'a loss such as "1%"')
    if share >= 1:
        raise UsageError(f'expected a loss below "100%", got "{text}"; a link that loses all is `testbed lab cut HOST`')
    return share


def _number(text: str, units: dict[str, float] | dict[str, int], expected: str) -> float:
    found = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?) ?({'|'.join(units)})", text.strip().lower())
    if not found:
        raise UsageError(f'expected {expected}, got "{text}"')
    return float(found[1]) * units[found[2]]
