"""What provisioning consists of: steps that compare a device's facts with what is wanted, and say what to do.

A step looks at facts only.  It answers None (as it should be), a Change (what is not, and how it is made so), a
Problem (what a person must do) or a Note (what a person should know).  So every step can be read, and tested, as a
table: facts in, exact commands out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from testbed.connection import Connection
    from testbed.inventory import Device

#: What `testbed.provision.facts` gathered on a device in one round trip; plain JSON.
Facts = Mapping[str, Any]
#: Says in a few words what is being done now, for the live table.
Say = Callable[[str], None]


#: The step of a problem that says that a device was reached, and then no more.
LOST_LINK = "link"


@dataclass(frozen=True)
class Command:
    """A command of a change; `become`: as root, by sudo."""

    argv: tuple[str, ...]
    become: bool = False
    data: bytes = b""
    patience_seconds: float = 60.0


@dataclass(frozen=True)
class Change:
    """What is not as it should be, and how it is made so.

    Done by `commands`, in order, or by `action` where more than commands is needed (files to put, progress to show).
    One with `needs_reboot` and neither of them has been made already: only the reboot is lacking.
    """

    step: str
    found: str  # what stands there now, in a few words
    wanted: str
    commands: tuple[Command, ...] = ()
    action: Callable[[Connection, Say], None] | None = None
    needs_reboot: bool = False  # it holds from the next boot on
    needs_login: bool = False  # it holds from the next login on (a group of the user)


@dataclass(frozen=True)
class Problem:
    """What provisioning cannot mend: the state, and the way out.  A `fatal` one keeps the later steps from running."""

    step: str
    text: str
    fatal: bool = False


@dataclass(frozen=True)
class Note:
    """What is recorded and told, and is no reason to fail."""

    step: str
    text: str


Finding = Change | Problem | Note


class Step(Protocol):
    """One thing that provisioning sees to."""

    name: str

    def check(self, facts: Facts, device: Device) -> Change | Problem | Note | None:
        """Compare; touches nothing."""
