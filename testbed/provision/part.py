"""A part of the facts about a device: what is read there, and how that becomes JSON.

All parts travel as one POSIX-sh script, in one round trip.  A part names files (each read where it exists and may be
read, all of all parts by a single process) and may add commands of its own, which run in a subshell with standard
error thrown away: whatever is missing on a board costs only the facts that it would have given.

In a script `$FOLDER` is the testbed's folder on the device, `$DEVICE` is the device's name (guests share a folder),
`$ME` and `$ME_UID` are the login user, `$IDS` what `id` says, `$DEVICE_PYTHON` is the interpreter that the inventory
names (or nothing), and `quick COMMAND …` runs a command for five seconds at most.  Every process that a script starts
is paid for by every device at every visit.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_SEPARATOR = "\x1e"  # ASCII's record separator: before the name of a section, in the answer
_FILES, _BEGUN, _ENDED = "files", "begun", "ended"  # sections that are no part's
_PRELUDE = """\
LC_ALL=C; PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin; export LC_ALL PATH
IDS=$(id); ME=${{IDS#*\\(}}; ME=${{ME%%\\)*}}; ME_UID=${{IDS#uid=}}; ME_UID=${{ME_UID%%[!0-9]*}}
FOLDER={folder}; DEVICE={device}; DEVICE_PYTHON={python}
case $FOLDER in /*) ;; "~/"*) FOLDER=$HOME/${{FOLDER#??}} ;; *) FOLDER=$HOME/$FOLDER ;; esac
if command -v timeout >/dev/null 2>&1; then quick() {{ timeout 5 "$@"; }}; else quick() {{ "$@"; }}; fi
section() {{ printf '\\n\\036%s\\n' "$1"; }}
section begun; date +%s.%N
"""
#: `sh -c` passes the script on as one argument, and Linux gives one argument 128 KiB.
_MAX_SCRIPT_BYTES = 90 << 10


@dataclass(frozen=True)
class Answer:
    """What a device answered to one part."""

    files: Mapping[str, str] = field(default_factory=dict)  # path → content, of every file that the part's globs fit
    output: str = ""  # of its script

    @property
    def values(self) -> dict[str, str]:
        """The `key=value` lines of the output; of a key that comes twice, the last."""
        pairs = (line.partition("=") for line in self.output.splitlines() if "=" in line)
        return {key.strip(): value.strip() for key, _, value in pairs}

    def text(self, path: str) -> str | None:
        """A file's content without the spaces around it; None where there was none to read."""
        return self.files[path].strip() if path in self.files else None


@dataclass(frozen=True)
class Part:
    """Facts that belong together.

    files    absolute paths, `*` and `?` allowed; text only, an empty file is as good as none
    script   commands of POSIX sh; what they print is `Answer.output`
    parse    gives the keys that this part adds to the facts
    """

    name: str
    parse: Callable[[Answer], dict[str, Any]]
    files: tuple[str, ...] = ()
    script: str = ""


def script_of(parts: Sequence[Part], folder: str, python: str | None = None, device: str = "device") -> str:
    """The one script for all parts.

    folder    the testbed's on the device: absolute, "~/…", or below the home
    python    the interpreter that the inventory names
    device    its name there
    """
    globs = " ".join(_quoted_glob(glob) for part in parts for glob in part.files)
    words = {"folder": folder, "python": python or "", "device": device}
    lines = [_PRELUDE.format(**{name: shlex.quote(word) for name, word in words.items()})]
    if globs:
        lines.append(f"section {_FILES}; grep -sH '' {globs} </dev/null 2>/dev/null\n")
    lines += [f"section {part.name}; (\n{part.script}\n) 2>/dev/null </dev/null\n" for part in parts if part.script]
    script = "".join([*lines, f"section {_ENDED}; date +%s.%N\n"])
    if len(script.encode()) > _MAX_SCRIPT_BYTES:
        raise ValueError("the parts of the facts do not fit into one command")
    return script


def facts_of(parts: Iterable[Part], answer: str) -> dict[str, Any]:
    """What every part makes of the answer to `script_of`."""
    sections = sections_of(answer)
    facts: dict[str, Any] = {}
    for part in parts:
        files = _files(sections.get(_FILES, ""), part.files)
        facts.update(part.parse(Answer(files, sections.get(part.name, ""))))
    return facts


def stamps_of(answer: str) -> tuple[float, float] | None:
    """The device's clock when the script began and when it ended; None without a clock that tells fractions."""
    sections = sections_of(answer)
    texts = [sections.get(name, "").strip() for name in (_BEGUN, _ENDED)]
    if not all(re.fullmatch(r"\d+\.\d+", text) for text in texts):
        return None
    return float(texts[0]), float(texts[1])


def sections_of(answer: str) -> dict[str, str]:
    """Section by name; what a login shell may have said before the first is dropped."""
    _, *pieces = answer.split(_SEPARATOR)
    named = (piece.partition("\n") for piece in pieces)
    return {name: text.removesuffix("\n") for name, _, text in named}


def _quoted_glob(glob: str) -> str:
    """For the shell: everything quoted but the wildcards."""
    return "".join(piece if piece in "*?" else shlex.quote(piece) for piece in re.split(r"([*?])", glob) if piece)


def _files(lines: str, globs: Iterable[str]) -> dict[str, str]:
    """From grep's `path:line` lines to content by path, of the paths that the globs fit.

    A path may hold colons (iio:device0), and so may a line: the globs say where a path ends.
    """
    patterns = "|".join(re.escape(glob).replace(r"\*", "[^/]*?").replace(r"\?", "[^/]") for glob in globs)
    if not patterns:
        return {}
    fits = re.compile(f"({patterns}):(.*)")
    found: dict[str, list[str]] = {}
    for line in lines.split("\n"):
        if match := fits.fullmatch(line):
            found.setdefault(match[1], []).append(match[2])
    return {path: "\n".join(content) for path, content in found.items()}
