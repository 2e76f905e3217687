"""Bytes as people write them: "4 GiB", "700 MiB".  Powers of 1024 only: a decimal GB would be read both ways."""

from __future__ import annotations

import re

from testbed.errors import ConfigError

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
PATTERN = rf"^[0-9]+(\.[0-9]+)? ?({'|'.join(UNITS)})$"
EXPECTED = 'bytes such as "4 GiB"'


def parse_bytes(text: str) -> int:
    """From "1.5 GiB" to 1610612736; raises ConfigError for anything but a number and one of the binary units."""
    found = re.fullmatch(PATTERN, text.strip())
    if not found:
        raise ConfigError(f'expected {EXPECTED}, got "{text}"')
    unit = found[2]
    return round(float(text.strip().removesuffix(unit)) * UNITS[unit])


def format_bytes(size: int) -> str:
    """1610612736 → "1.5 GiB": the largest unit that leaves at least 1, with at most one decimal."""
    unit = next((unit for unit in reversed(UNITS) if abs(size) >= UNITS[unit]), "B")
    return f"{size / UNITS[unit]:.1f}".removesuffix(".0") + f" {unit}"
