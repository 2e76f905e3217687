"""Human units for tables and messages; everything stored and computed stays in base units."""

from __future__ import annotations

from testbed.byte_text import format_bytes

DASH = "–"


def bytes_text(value: float | None) -> str:
    """480 MiB, 1.5 GiB; a dash for None."""
    return DASH if value is None else format_bytes(round(value))


def seconds_text(value: float | None) -> str:
    """0.42 s, 12.3 s, 4 min 05 s, 2 h 03 min; a dash for None."""
    if value is None:
        return DASH
    if value < 60:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent_text(ratio: float | None) -> str:
    """+1.8 %; a dash for None."""
    return DASH if ratio is None else f"{100 * ratio:+.1f} %"


def number_text(value: float | None, digits: int = 3) -> str:
    """A loss, an accuracy, a rate; a dash for None."""
    return DASH if value is None else f"{value:.{digits}f}"
