"""What `testbed verify` finds out about a run: nouns.  Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HOLDS = "holds"
FAILS = "does not hold"
UNKNOWN = "cannot be checked"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    found      what was compared, or why nothing could be, in a sentence
    failures   what does not hold, one sentence each
    notes      what a reader should know of it, though it is no failure
    """

    name: str
    verdict: str  # HOLDS, FAILS or UNKNOWN
    found: str
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verification:
    """All checks of one run."""

    run: str
    state: str
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing was found that does not hold; what cannot be checked is no failure."""
        return all(check.verdict != FAILS for check in self.checks)

    @property
    def verdict(self) -> str:
        """FAILS where anything does, UNKNOWN where nothing could be checked, else HOLDS."""
        if not self.holds:
            return FAILS
        return HOLDS if any(check.verdict == HOLDS for check in self.checks) else UNKNOWN


def judged(name: str, found: str, failures: Sequence[str], notes: Sequence[str] = ()) -> Check:
    """A check that was made: it holds when there is no failure."""
    return Check(name, FAILS if failures else HOLDS, found, tuple(failures), tuple(notes))


def unknown(name: str, why: str, notes: Sequence[str] = ()) -> Check:
    """A check that cannot be made."""
    return Check(name, UNKNOWN, why, (), tuple(notes))


def counted(number: int, noun: str) -> str:
    """1 job, 2 jobs."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
