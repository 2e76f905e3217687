"""The testbed's folder on a device is the login user's alone: it holds shards, which are private."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from testbed.devices import _board
from testbed.provision.part import Answer, Part
from testbed.provision.step import Change, Command, Facts

if TYPE_CHECKING:
    from testbed.inventory import Device

# Another user's folder cannot be closed, and is not asked for: `-O`.
_SCRIPT = '[ -O "$FOLDER" ] && stat -c %a "$FOLDER"'


def _parse(answer: Answer) -> dict[str, Any]:
    return {"folder_mode": answer.output.strip() or None}


PART = Part("own_folder", _parse, script=_SCRIPT)


class PrivateFolder:
    """Nobody else looks into the folder; one that is not there yet is nobody's matter."""

    name = "folder"

    def check(self, facts: Facts, device: Device) -> Change | None:
        mode = facts.get("folder_mode")
        if mode is None or mode.endswith("00"):
            return None
        # "~/" is not expanded in a command of a batch, which is quoted: the shell is given the way from home.
        close = 'case $1 in "~/"*) set -- "$HOME/${1#??}" ;; esac; chmod 700 "$1"'
        command = Command(("sh", "-c", close, "sh", _board.folder(device)))
        return Change(self.name, f"open to others (mode {mode})", "the login user's alone", (command,))
