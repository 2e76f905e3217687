"""The parameters of disturbances, from people's words ("1 Mbit/s") to base units and back.  Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from testbed.byte_text import UNITS as BYTES
from testbed.errors import UsageError

_RATES = {"bit/s": 0.125, "kbit/s": 125.0, "Mbit/s": 125e3, "Gbit/s": 125e6}  # in bytes per second, powers of 1000
_TIMES = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
#: Below it, one byte at a time takes seconds, and a link counts as dead.
_LEAST_RATE = 125.0
#: A quota of the kernel has a granularity: below a hundredth of a processor nothing moves.
_MOST_SLOWDOWN = 100.0
_MOST_PROCESSES = 256


@dataclass(frozen=True)
class Reader:
    """How a value is read and told: `read` gives None for what it cannot be."""

    read: Callable[[Any], float | None]
    expected: str
    example: str
    text: Callable[[float], Any] = lambda value: value


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name in base units, how it is read, and the word that people write."""

    name: str
    read: Reader
    stated_as: str | None = None  # None: as its name
    default: float | None = None  # None: it must be stated

    @property
    def word(self) -> str:
        return self.stated_as or self.name

    def value(self, words: Mapping[str, Any], where: str) -> float:
        """In base units; raises UsageError that begins with `where`."""
        if self.word not in words and self.default is not None:
            return self.default
        stated = words.get(self.word)
        found = self.read.read(stated)
        if found is None:
            raise UsageError(f"{where}: expected {self.read.expected}, got {stated!r}")
        return found

    def stated(self, values: Mapping[str, float]) -> bool:
        """Whether it says something that would not hold anyway."""
        return values[self.name] != self.default

    def text(self, value: float) -> Any:
        """As people write it, and as it can be read again."""
        return self.read.text(value)


def _number(stated: Any) -> float | None:
    if isinstance(stated, bool) or not isinstance(stated, int | float | str):
        return None
    try:
        value = float(stated)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _between(least: float, most: float) -> Callable[[Any], float | None]:
    def read(stated: Any) -> float | None:
        value = _number(stated)
        return value if value is not None and least < value <= most else None

    return read


def _whole(stated: Any) -> float | None:
    value = _number(stated)
    return int(value) if value is not None and value.is_integer() and 1 <= value <= _MOST_PROCESSES else None


def _in(units: Mapping[str, float], least: float, most: float) -> Callable[[Any], float | None]:
    """A number with its unit: a number alone could be read in two ways."""

    def read(stated: Any) -> float | None:
        found = (
            re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z/]+)", stated.strip()) if isinstance(stated, str) else None
        )
        if found is None or found[2] not in units:
            return None
        value = float(found[1]) * units[found[2]]
        return value if least <= value <= most else None

    return read


def _told_in(units: Mapping[str, float]) -> Callable[[float], str]:
    """In the largest unit in which it can be read again."""

    def text(value: float) -> str:
        for unit in reversed(tuple(units)):
            told = f"{value / units[unit]:.3f}".rstrip("0").rstrip(".")
            if value >= units[unit] and math.isclose(float(told) * units[unit], value, rel_tol=1e-12):
                return f"{told} {unit}"
        smallest = next(iter(units))
        return f"{value / units[smallest]:f}".rstrip("0").rstrip(".") + f" {smallest}"

    return text


def _bytes(stated: Any) -> float | None:
    value = _in(BYTES, 0, 2**50)(stated)
    return None if value is None else round(value)


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else value


ratio = Reader(_between(0.0, 1.0), "a number above 0 and up to 1", "0.3")
factor = Reader(_between(1.0, _MOST_SLOWDOWN), f"a number above 1 and up to {_MOST_SLOWDOWN:g}", "3", _plain)
count = Reader(_whole, f"a whole number from 1 to {_MOST_PROCESSES}", "1")
rate = Reader(
    _in(_RATES, _LEAST_RATE, math.inf), 'a rate from 1 kbit/s on, such as "1 Mbit/s"', '"1 Mbit/s"', _told_in(_RATES)
)
size = Reader(_bytes, 'bytes such as "64 MiB"', '"64 MiB"', _told_in({unit: float(one) for unit, one in BYTES.items()}))


def seconds(most: float | None) -> Reader:
    """A time with its unit, up to a limit where there is one."""
    limit = "" if most is None else f" of up to {most:g} s"
    read = _in(_TIMES, 0.0, math.inf if most is None else most)
    return Reader(read, f'a time{limit} with its unit, such as "50 ms" or "20 s"', '"20 s"', _told_in(_TIMES))
