"""The right name for a wrong one, for messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """`did you mean "memory"? There are: cores, memory`, without the question when nothing is near."""
    names = sorted(known)
    by_plain = {_plain(name): name for name in names}
    nearest = get_close_matches(_plain(wrong), by_plain, n=1, cutoff=0.5)
    question = f'did you mean "{by_plain[nearest[0]]}"? There' if nearest else "there"
    return f"{question} are: {', '.join(names)}" if names else "there is none"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
