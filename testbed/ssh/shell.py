"""A command as a line that means the same to every login shell, and the scripts that it becomes there.

What is given to sshd is only `exec /bin/sh -c 'PATH=…; eval "$(echo BASE64 | base64 -d)"'`: sh, bash, zsh, fish and csh
read it alike.  The script first writes a marker to both outputs; what the shell's start-up files wrote before it is
noise.  It then sets what they may have changed (locale, umask, folder) and becomes the command.

On the device it takes what every Debian, Ubuntu and busybox has: sh, base64, timeout, cat, stat, sha256sum, mv.
"""

from __future__ import annotations

import base64
import math
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

#: Linux takes 128 KiB for one argument; the line around it needs a little.
MOST_BYTES = 120_000
#: A command that is told to end has this long before it is killed.
MERCY_SECONDS = 2

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_START = """\
printf '%s%s\\n' {half} {other}; printf '%s%s\\n' {half} {other} >&2
LC_ALL=C; export PATH LC_ALL; unset ENV BASH_ENV CDPATH; umask 022; cd "$HOME" 2>/dev/null || cd /
set -- {words}
"""

# `timeout` ends what has not ended in time, on the device itself, so that it does not depend on a connection that may
# be gone.  Its child is this shell: told to end, it lets the command go first, then kills whatever of the process
# group is left, itself and `timeout` included.  (Children do not inherit a trap, as they would an ignored signal.)
_LIMITED = """\
late=; trap late=1 TERM; "$@"; code=$?; [ -z "$late" ] || kill -KILL 0; exit $code"""

# sudo has a umask of its own: what root makes for everybody must be readable for everybody.
_ROOT = "printf '%s%s\\n' {half} {other}; printf '%s%s\\n' {half} {other} >&2; umask 022; "


@dataclass(frozen=True)
class Marker:
    """A line that no start-up file writes; in two halves in the script, so that no trace of the script holds it."""

    half: str
    other: str

    @property
    def line(self) -> bytes:
        return f"{self.half}{self.other}\n".encode()


@dataclass(frozen=True)
class Script:
    """What to give to sshd, and the markers that will come back: the login shell's end, and root's beginning."""

    line: str
    started: Marker
    root: Marker | None = None


def new_marker() -> Marker:
    return Marker(secrets.token_hex(8), secrets.token_hex(8))


def word(text: str) -> str:
    """An argument in sh's quotes; "~/" at its start is the login user's home."""
    return f'"$HOME"/{shlex.quote(text[2:])}' if text.startswith("~/") else shlex.quote(text)


def plain(command: Sequence[str]) -> Script:
    """A command that lives as long as it likes."""
    marker = new_marker()
    return Script(_line(marker, command, 'exec "$@"'), marker)


def limited(command: Sequence[str], seconds: float) -> Script:
    """A command that has ended after `seconds`, with all of its process group."""
    marker = new_marker()
    return Script(_line(marker, command, f'exec {_timeout(seconds, _LIMITED)} "$@"'), marker)


def limited_as_root(command: Sequence[str], seconds: float, *, sudo: bool) -> Script:
    """The same as root: as it is where the login user is root, by sudo without a password (if at all) elsewhere."""
    marker, root = new_marker(), new_marker()
    inner = _timeout(seconds, _ROOT.format(half=root.half, other=root.other) + _LIMITED)
    otherwise = f'exec sudo -n -- {inner} "$@"' if sudo else "exit 1"
    script = f'[ "$(id -u)" -ne 0 ] || exec {inner} "$@"\n{otherwise}'
    return Script(_line(marker, command, script), marker, root)


def _timeout(seconds: float, inner: str) -> str:
    """(The one of busybox takes whole seconds only.)"""
    limit = f"{seconds:.3f}" if seconds < 1 else str(math.ceil(seconds))
    return f"timeout -k {MERCY_SECONDS} {limit} /bin/sh -c {shlex.quote(inner)} sh"


def _line(marker: Marker, command: Sequence[str], end: str) -> str:
    script = _START.format(half=marker.half, other=marker.other, words=" ".join(map(word, command))) + end
    encoded = base64.b64encode(script.encode()).decode()
    return f"exec /bin/sh -c 'PATH={PATH}:$PATH; eval \"$(echo {encoded} | base64 -d)\"'"
